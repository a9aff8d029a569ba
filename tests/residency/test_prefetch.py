"""The fetcher: what goes first, and what becomes of what is no longer wanted."""

import threading
import weakref
from typing import Any

import jax
import numpy as np
import pytest

from jmoe.errors import TransferError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import DeviceLink
from jmoe.residency.prefetch import Fetcher
from tests.residency.faulty_link import BLOB_BYTES, FaultyLink, HeldLink, await_true, make_blob


def _keys(*experts: int, layer: int = 3) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def _key(expert: int) -> ExpertKey:
    return ExpertKey(3, expert)


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


def test_the_link_is_kept_busy_but_not_flooded(held):
    link, fetcher = held
    fetcher.demand(_keys(0, 1, 2, 3))
    for arrived in range(3):
        link.await_started(arrived + 2)
        await_true(lambda: len(fetcher.in_flight) == 2)
        assert len(link.started) == arrived + 2
        link.let_arrive()
        fetcher.wait(_key(arrived))


def test_a_copy_starts_behind_one_that_is_awaited(held):
    link, fetcher = held
    fetcher.demand(_keys(0))
    link.await_started(1)
    fetcher.prefetch(_keys(1))
    link.await_started(2)
    assert fetcher.in_flight == frozenset(_keys(0, 1))
    link.let_arrive(2)
    fetcher.wait(_key(1))


def test_an_expert_asked_for_twice_comes_once(held):
    link, fetcher = held
    fetcher.demand(_keys(0, 0))
    assert fetcher.prefetch(_keys(0, 1)) == _keys(0, 1)
    fetcher.demand(_keys(0))
    link.let_arrive(2)
    fetcher.wait(_key(0))
    fetcher.wait(_key(1))
    assert _order(link) == [0, 1]
    with pytest.raises(AssertionError, match="layer 3, expert 0 was never asked for"):
        fetcher.wait(_key(0))


def test_waiting_for_a_prefetch_makes_it_a_demand(held):
    link, fetcher = held
    fetcher.set_recording(True)
    fetcher.prefetch(_keys(0, 1, 2, 3, 4))
    link.await_started(2)
    threading.Timer(0.05, link.let_arrive, [5]).start()
    fetcher.wait(_key(4))
    kinds = [(transfer.key.expert, transfer.kind) for transfer in fetcher.transfers]
    assert kinds[:3] == [(0, "prefetch"), (1, "prefetch"), (4, "demand")]


def test_too_many_prefetches_are_refused_by_name():
    link = HeldLink()
    with Fetcher(link, make_blob, max_in_flight=1, max_queued=2) as fetcher:
        fetcher.prefetch(_keys(0))
        link.await_started(1)
        assert fetcher.prefetch(_keys(1, 2, 3, 4)) == _keys(1, 2)
        # What is coming anyway needs no room, and demands always have some.
        assert fetcher.prefetch(_keys(5, 2, 0)) == _keys(2, 0)
        fetcher.demand(_keys(5, 6, 7, 1))
        assert fetcher.prefetch(_keys(3, 4)) == _keys(3)
        link.let_arrive(7)
        for key in _keys(0, 1, 2, 3, 5, 6, 7):
            fetcher.wait(key)
    assert _order(link) == [0, 5, 6, 7, 1, 2, 3]


def test_what_is_cancelled_in_the_queue_never_starts(held):
    link, fetcher = held
    fetcher.demand(_keys(0, 1, 2))
    fetcher.prefetch(_keys(3, 4))
    link.await_started(2)
    assert fetcher.cancel(_key(2)) and fetcher.cancel(_key(3))
    assert not fetcher.cancel(_key(2))
    link.let_arrive(3)
    fetcher.wait(_key(4))
    assert _order(link) == [0, 1, 4]


def test_what_is_cancelled_under_way_is_dropped(held):
    link, fetcher = held
    fetcher.set_recording(True)
    fetcher.prefetch(_keys(0, 1))
    link.await_started(2)
    assert not fetcher.cancel(_key(0))
    assert fetcher.in_flight == frozenset(_keys(0, 1))
    link.let_arrive(2)
    fetcher.wait(_key(1))
    assert [transfer.wanted for transfer in fetcher.transfers] == [False, True]
    with pytest.raises(AssertionError, match="never asked for"):
        fetcher.wait(_key(0))


def test_what_is_wanted_again_under_way_is_not_moved_again(held):
    link, fetcher = held
    fetcher.set_recording(True)
    fetcher.prefetch(_keys(0))
    link.await_started(1)
    assert not fetcher.cancel(_key(0))
    assert not fetcher.cancel(_key(0))
    fetcher.demand(_keys(0))
    link.let_arrive()
    np.testing.assert_array_equal(fetcher.wait(_key(0)), make_blob(_key(0)))
    assert len(link.started) == 1
    assert [transfer.wanted for transfer in fetcher.transfers] == [True]


def test_what_is_cancelled_when_it_is_there_is_dropped(held):
    link, fetcher = held
    fetcher.demand(_keys(0))
    assert not fetcher.poll_ready(_key(0))
    link.let_arrive()
    await_true(lambda: fetcher.poll_ready(_key(0)))
    assert not fetcher.cancel(_key(0))
    fetcher.demand(_keys(0))  # comes a second time
    link.let_arrive()
    fetcher.wait(_key(0))
    assert len(link.started) == 2
    assert not fetcher.cancel(_key(0)) and not fetcher.cancel(_key(7))


def test_nothing_is_kept_of_what_was_handed_over():
    with Fetcher(DeviceLink(jax.devices()[0]), make_blob) as fetcher:
        fetcher.demand(_keys(0, 1))
        arrays = [weakref.ref(fetcher.wait(key)) for key in _keys(0, 1)]
        fetcher.drain()
        assert [array() for array in arrays] == [None, None]


def test_drain_forgets_everything_and_waits_for_what_is_under_way():
    link = FaultyLink(HeldLink(), script=["ok", "start", "ok", "ok"])
    held: Any = link._inner
    with Fetcher(link, make_blob) as fetcher:
        fetcher.drain()
        fetcher.demand(_keys(0, 1, 2))
        fetcher.prefetch(_keys(3, 4))
        held.await_started(2)
        timer = threading.Timer(0.05, held.let_arrive, [2])
        timer.start()
        fetcher.drain()
        timer.join()
        assert fetcher.in_flight == frozenset()
        assert len(held.started) == 2
        for key in _keys(0, 1, 2, 3):
            with pytest.raises(AssertionError, match="never asked for"):
                fetcher.wait(key)
        fetcher.demand(_keys(1))
        held.let_arrive()
        fetcher.wait(_key(1))


def test_transfers_tell_what_happened_when():
    told = []
    with Fetcher(DeviceLink(jax.devices()[0]), make_blob, on_transfer=told.append) as fetcher:
        fetcher.demand(_keys(0))
        fetcher.wait(_key(0))
        fetcher.drain()
        assert fetcher.transfers == []  # nobody asked for a recording
        fetcher.set_recording(True)
        fetcher.prefetch(_keys(1, 2))
        for key in _keys(2, 1):
            fetcher.wait(key)
        fetcher.drain()
        recorded = fetcher.transfers
        assert told[1:] == recorded
        assert [transfer.key for transfer in told] == [_key(0), *(t.key for t in recorded)]
        for transfer in told:
            assert transfer.queued_s <= transfer.started_s <= transfer.finished_s
            assert transfer.num_bytes == BLOB_BYTES and transfer.wanted
        fetcher.set_recording(False)
        assert fetcher.transfers == []


class EarlyLink(HeldLink):
    """The backend lets those wait who use an array."""

    hands_out_early = True


def test_an_array_is_handed_out_before_it_has_arrived():
    link = EarlyLink()
    with Fetcher(link, make_blob) as fetcher:
        fetcher.set_recording(True)
        fetcher.demand(_keys(0))
        array = fetcher.wait(_key(0))
        assert fetcher.in_flight == frozenset(_keys(0))
        # Evicted and needed again before it arrived: the same array will do.
        fetcher.demand(_keys(0))
        assert fetcher.wait(_key(0)) is array
        link.let_arrive()
        fetcher.drain()
        assert len(link.started) == 1
        assert [transfer.wanted for transfer in fetcher.transfers] == [True]


def test_an_array_that_fails_after_it_was_handed_out_is_its_users_matter():
    link = FaultyLink(EarlyLink(), script=["finish", "finish"], hands_out_early=True)
    held: Any = link._inner
    with Fetcher(link, make_blob) as fetcher:
        fetcher.demand(_keys(0, 1))
        fetcher.wait(_key(0))
        held.let_arrive(2)
        await_true(lambda: not fetcher.in_flight)
        with pytest.raises(TransferError, match="layer 3, expert 1"):
            fetcher.wait(_key(1))
        fetcher.demand(_keys(0))
        fetcher.wait(_key(0))
        held.let_arrive()


def test_what_is_not_ready_waits_and_lets_others_pass():
    """Whose bytes come from a disk: the thread must be free for what is needed meanwhile."""
    link, ready = HeldLink(), set()
    with Fetcher(link, make_blob, is_ready=lambda key: key.expert in ready) as fetcher:
        fetcher.prefetch(_keys(0, 1, 2, 3))
        assert not link.started
        ready |= {2, 3}
        fetcher.look_again()
        link.await_started(2)
        fetcher.demand(_keys(5, 0))  # needed now: promoted, ready or not
        assert fetcher.cancel(_key(1))
        link.let_arrive(8)
        for key in _keys(0, 2, 3, 5):
            fetcher.wait(key)
        assert _order(link) == [2, 3, 5, 0]
        fetcher.look_again()  # of which nothing comes
    fetcher.look_again()
