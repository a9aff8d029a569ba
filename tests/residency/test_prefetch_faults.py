"""The fetcher when copies fail: whose error it is, and that everything else goes on."""

import random
import threading
import time

import jax
import numpy as np
import pytest

from jmoe.errors import CapacityError, CheckpointError, TransferError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import DeviceLink, ThrottledLink
from jmoe.residency.prefetch import Fetcher
from tests.residency.faulty_link import FaultyLink, HeldLink, await_true, make_blob


def _key(expert: int) -> ExpertKey:
    return ExpertKey(3, expert)


def _device_link() -> DeviceLink:
    return DeviceLink(jax.devices()[0])


def test_an_error_belongs_to_its_expert_and_is_raised_once():
    link = FaultyLink(_device_link(), script=["ok", "start", "finish", "ok"])
    with Fetcher(link, make_blob) as fetcher:
        fetcher.demand([_key(expert) for expert in range(4, 8)])
        for expert in (7, 4):
            np.testing.assert_array_equal(fetcher.wait(_key(expert)), make_blob(_key(expert)))
        for expert, when in ((6, "on the way"), (5, "at the start")):
            with pytest.raises(TransferError, match=f"layer 3, expert {expert}") as caught:
                fetcher.wait(_key(expert))
            assert caught.value.got == when
            assert isinstance(caught.value.__cause__, TransferError)
            with pytest.raises(AssertionError, match="never asked for"):
                fetcher.wait(_key(expert))
        fetcher.demand([_key(5)])
        np.testing.assert_array_equal(fetcher.wait(_key(5)), make_blob(_key(5)))


def test_an_error_that_nobody_waits_for_is_forgotten():
    link = FaultyLink(_device_link(), script=["start", "finish", "finish"])
    with Fetcher(link, make_blob) as fetcher:
        fetcher.prefetch([_key(0), _key(1)])
        await_true(lambda: fetcher.poll_ready(_key(0)) and fetcher.poll_ready(_key(1)))
        assert not fetcher.cancel(_key(0))
        fetcher.prefetch([_key(2)])
        await_true(lambda: fetcher.poll_ready(_key(2)))
        fetcher.drain()
        fetcher.demand([_key(0), _key(1), _key(2)])
        for expert in range(3):
            np.testing.assert_array_equal(fetcher.wait(_key(expert)), make_blob(_key(expert)))


def test_a_device_without_memory_is_a_capacity_error(monkeypatch):
    def no_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    with Fetcher(_device_link(), make_blob) as fetcher:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_put", no_memory)
            fetcher.demand([_key(5)])
            with pytest.raises(CapacityError, match="layer 3, expert 5") as caught:
                fetcher.wait(_key(5))
            assert "allocating 99 bytes" in str(caught.value)
        fetcher.demand([_key(5)])
        fetcher.wait(_key(5))


@pytest.mark.parametrize(
    "error, kind",
    [
        (CheckpointError("the file is cut short", where="experts-3"), CheckpointError),
        (KeyError(5), TransferError),
    ],
)
def test_a_blob_that_cannot_be_read_is_its_experts_error(error, kind):
    def read_blob(key: ExpertKey) -> np.ndarray:
        if key == _key(5):
            raise error
        return make_blob(key)

    with Fetcher(_device_link(), read_blob) as fetcher:
        fetcher.demand([_key(5), _key(6)])
        fetcher.wait(_key(6))
        with pytest.raises(kind, match="layer 3, expert 5") as caught:
            fetcher.wait(_key(5))
        assert caught.value.__cause__ is error


def test_a_failed_copy_frees_its_memory_before_anybody_asks():
    released = threading.Event()

    class Copy(np.ndarray):
        def __del__(self):
            released.set()

    class FailingLink(HeldLink):
        def start(self, blob: np.ndarray) -> jax.Array:
            copy = np.empty(100, np.uint8).view(Copy)
            raise TransferError("injected", got=len(copy))

    with Fetcher(FailingLink(), make_blob) as fetcher:
        fetcher.demand([_key(0)])
        await_true(lambda: fetcher.poll_ready(_key(0)))
        assert released.wait(20)
        with pytest.raises(TransferError, match="injected"):
            fetcher.wait(_key(0))


def test_a_thread_that_fails_itself_is_no_silence():
    def on_transfer(_):
        raise ZeroDivisionError

    with Fetcher(_device_link(), make_blob, on_transfer=on_transfer) as fetcher:
        fetcher.demand([_key(0), _key(1), _key(2)])
        for call in (lambda: fetcher.wait(_key(2)), lambda: fetcher.demand([_key(0)])):
            with pytest.raises(TransferError, match="thread that copies") as caught:
                call()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("seed", range(4))
def test_random_work_over_a_faulty_link_is_like_a_table(seed):
    rng = random.Random(seed)
    link = FaultyLink(
        ThrottledLink(_device_link(), 1e8),
        seed=seed,
        failure_rate=0.2,
        slow_rate=0.2,
        slow_s=0.002,
        hands_out_early=False,
    )
    asked: set[ExpertKey] = set()
    num_errors = num_arrived = 0
    with Fetcher(link, make_blob, max_in_flight=rng.randint(1, 3), max_queued=6) as fetcher:
        fetcher.set_recording(True)
        end_s = time.monotonic() + 2
        while time.monotonic() < end_s:
            keys = [ExpertKey(rng.randrange(3), rng.randrange(8)) for _ in range(3)]
            match rng.choice(["demand", "prefetch", "prefetch", "cancel", "wait", "drain"]):
                case "demand":
                    fetcher.demand(keys)
                    asked.update(keys)
                case "prefetch":
                    accepted = fetcher.prefetch(keys)
                    assert asked & set(keys) <= set(accepted) <= set(keys)
                    asked.update(accepted)
                case "cancel":
                    cancelled = fetcher.cancel(keys[0])
                    assert not (cancelled and keys[0] not in asked)
                    asked.discard(keys[0])
                case "drain":
                    if rng.random() < 0.1:
                        fetcher.drain()
                        asked.clear()
                        assert fetcher.in_flight == frozenset()
                case "wait":
                    for key in keys:
                        if key in asked:
                            asked.remove(key)
                            try:
                                array = fetcher.wait(key)
                            except TransferError as error:
                                assert f"layer {key.layer}, expert {key.expert}" in str(error)
                                num_errors += 1
                            else:
                                np.testing.assert_array_equal(array, make_blob(key))
                                num_arrived += 1
            assert len(fetcher.in_flight) <= 3
            assert asked == fetcher._state.jobs.keys()
        fetcher.drain()
        transfers = fetcher.transfers
    assert num_arrived > 10 and num_errors > 2 and link.num_failed >= num_errors
    assert sum(transfer.wanted for transfer in transfers) >= num_arrived
    assert link.counters.copies >= len(transfers)
