"""The fetcher: what goes first, whose error it is, and that it always ends."""

import jax
import numpy as np
import pytest

from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import DeviceLink
from jmoe.residency.prefetch import Fetcher
from tests.residency.faulty_link import HeldLink, make_blob


def _keys(*experts: int, layer: int = 3) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


@pytest.fixture
def held():
    """A link whose copies wait for the test, and a fetcher of it."""
    link = HeldLink()
    with Fetcher(link, make_blob) as fetcher:
        yield link, fetcher


def _order(link: HeldLink, num_keys: int = 8) -> list[int]:
    """Experts of layer 3, as they were started."""
    by_bytes = {make_blob(key).tobytes(): key.expert for key in _keys(*range(num_keys))}
    return [by_bytes[blob.tobytes()] for blob in link.started]


def test_experts_arrive_as_they_are():
    keys = _keys(0, 1, 2, layer=0) + _keys(0, 5, layer=1)
    with Fetcher(DeviceLink(jax.devices()[0]), make_blob) as fetcher:
        fetcher.demand(keys[:2])
        fetcher.prefetch(keys[2:])
        for key in reversed(keys):
            np.testing.assert_array_equal(fetcher.wait(key), make_blob(key))
        assert fetcher.in_flight == frozenset()


def test_what_is_needed_overtakes_what_may_be(held):
    link, fetcher = held
    fetcher.prefetch(_keys(0, 1, 2, 3, 4))
    link.await_started(2)  # no more may be in flight
    fetcher.demand(_keys(5, 6))
    fetcher.demand(_keys(7, 3))  # which is promoted
    link.let_arrive(8)
    for key in _keys(*range(8)):
        fetcher.wait(key)
    assert _order(link) == [0, 1, 5, 6, 7, 3, 2, 4]
