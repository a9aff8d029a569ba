"""Links: what arrives is a copy of its own, and a slow link is slow by the book."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.errors import CapacityError, RequestError, TransferError
from jmoe.quant.layout import aligned_empty
from jmoe.residency import link as link_module
from jmoe.residency.link import DeviceLink, LinkCounters, StopFlag, ThrottledLink


def _blob(num_bytes: int = 4096, seed: int = 0) -> np.ndarray:
    blob = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    blob.flags.writeable = False
    return blob


def _device_link(dtype: str = "uint8") -> DeviceLink:
    return DeviceLink(jax.devices("cpu")[0], dtype)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("num_bytes", [64, 3 * link_module._PIECE_BYTES + 64])
def test_a_blob_arrives_byte_by_byte(dtype, num_bytes):
    blob, link = _blob(num_bytes), _device_link(dtype)
    array = link.start(blob)
    link.finish(array)
    assert array.dtype == dtype
    assert array.shape == (num_bytes // jnp.dtype(dtype).itemsize,)
    np.testing.assert_array_equal(np.asarray(array).view(np.uint8), blob)


def test_no_array_shares_memory_with_the_host_copy():
    blob = np.frombuffer(bytearray(range(64)) * 2, np.uint8)
    aligned = aligned_empty((64,), np.uint8)  # which device_put would not copy
    aligned[:] = blob[:64]
    link = _device_link()
    array = link.start(aligned)
    link.finish(array)
    assert array.unsafe_buffer_pointer() != aligned.ctypes.data
    aligned[:] = 0
    np.testing.assert_array_equal(array, blob[:64])


def test_on_the_cpu_there_is_one_copy_and_not_two(monkeypatch):
    made = []

    def noted(*args) -> np.ndarray:
        made.append(aligned_empty(*args))
        return made[-1]

    monkeypatch.setattr(link_module, "aligned_empty", noted)
    array = _device_link().start(_blob())
    assert array.unsafe_buffer_pointer() == made[0].ctypes.data


def test_a_link_counts_what_arrived():
    link = _device_link()
    before = link.counters.snapshot()
    for array in [link.start(_blob(128)), link.start(_blob(64))]:
        link.finish(array)
    moved = link.counters - before
    assert (moved.copies, moved.bytes) == (2, 192)
    assert before == LinkCounters(0, 0, 0.0)
    assert moved.to_json() == {"copies": 2, "bytes": 192, "busy_s": moved.busy_s}
    assert moved.busy_s > 0


def test_a_closed_link_copies_nothing_more():
    link = _device_link()
    link.close()
    link.close()
    with pytest.raises(TransferError, match="the engine was closed"):
        link.start(_blob())


def test_closing_ends_a_copy_between_two_pieces(monkeypatch):
    link = _device_link()

    class ClosingBlob(np.ndarray):
        def __getitem__(self, index):
            link.close()
            return super().__getitem__(index)

    target = np.zeros(2 * link_module._PIECE_BYTES, np.uint8)
    monkeypatch.setattr(link_module, "aligned_empty", lambda shape, dtype: target)
    with pytest.raises(TransferError, match="the engine was closed"):
        link.start(np.ones(target.shape, np.uint8).view(ClosingBlob))
    assert target[0] == 1 and target[-1] == 0


_NO_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of it\nand how")
_BROKEN = jax.errors.JaxRuntimeError("INTERNAL: DMA failed")


@pytest.mark.parametrize(
    "when, error, kind, text",
    [
        ("start", _NO_MEMORY, CapacityError, "out of it$"),
        ("finish", _NO_MEMORY, CapacityError, "out of it$"),
        ("start", MemoryError(), CapacityError, "MemoryError"),
        ("start", _BROKEN, TransferError, "DMA failed"),
        ("finish", _BROKEN, TransferError, "DMA failed"),
    ],
)
def test_errors_of_the_backend_become_the_users(monkeypatch, when, error, kind, text):
    class Failing:
        nbytes = 64

        def block_until_ready(self):
            raise error

    def device_put(*_):
        if when == "start":
            raise error
        return Failing()

    monkeypatch.setattr(jax, "device_put", device_put)
    link = DeviceLink(_accelerator())
    with pytest.raises(kind, match=f"(?m){text}") as caught:
        link.finish(link.start(_blob()))
    assert caught.value.__cause__ is error
    assert caught.value.do
    assert link.counters.copies == 0


def test_an_accelerator_gets_the_blob_as_it_is_and_without_waiting(monkeypatch):
    given, waited = [], []

    class Array:
        nbytes = 64

        def block_until_ready(self):
            waited.append(self)

    def device_put(array, device):
        given.append((array, device))
        return Array()

    monkeypatch.setattr(jax, "device_put", device_put)
    device, blob = _accelerator(), _blob(64)
    link = DeviceLink(device, "float32")
    assert link.hands_out_early
    arrays = [link.start(blob), link.start(blob)]
    assert not waited and link.counters.copies == 0
    for array in arrays:
        link.finish(array)
    assert waited == arrays
    assert link.counters.copies == 2
    assert all(np.shares_memory(array, blob) and array.dtype == "float32" for array, _ in given)
    assert all(where is device for _, where in given)


def _accelerator() -> Any:
    return SimpleNamespace(platform="gpu")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now_s = 100.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.sleeps.append(seconds)
        self.now_s += seconds
        return False


def _throttled(clock: Clock, bytes_per_s: float = 1000.0, latency_s: float = 0.5) -> ThrottledLink:
    return ThrottledLink(_device_link(), bytes_per_s, latency_s, clock=clock, wait=clock.wait)


def test_copies_go_one_after_another_over_a_throttled_link():
    clock = Clock()
    link = _throttled(clock)
    assert not link.hands_out_early
    first, second = link.start(_blob(2000)), link.start(_blob(500))
    link.finish(first)
    assert clock.now_s == 102.5
    third = link.start(_blob(64))
    link.finish(second)
    assert clock.now_s == 103.5
    link.finish(third)
    assert clock.now_s == pytest.approx(104.064)
    assert (link.counters.copies, link.counters.bytes) == (3, 2564)
    assert link.counters.busy_s == pytest.approx(4.064)


def test_an_idle_link_starts_at_once_and_does_not_catch_up():
    clock = Clock()
    link = _throttled(clock)
    link.finish(link.start(_blob(1000)))
    clock.now_s = 200.0
    array = link.start(_blob(1000))
    clock.now_s = 200.5
    link.finish(array)
    assert clock.now_s == 201.5
    clock.sleeps.clear()
    array = link.start(_blob(1000))
    clock.now_s = 300.0  # the copy has arrived long ago
    link.finish(array)
    assert clock.sleeps == []
    assert link.counters.busy_s == 4.5


def test_a_real_copy_that_takes_longer_delays_the_throttled_link():
    clock = Clock()

    class SlowLink(DeviceLink):
        def start(self, blob: np.ndarray) -> jax.Array:
            clock.now_s += 10
            return super().start(blob)

    link = ThrottledLink(SlowLink(jax.devices("cpu")[0]), 1000.0, clock=clock, wait=clock.wait)
    first = link.start(_blob(1000))
    second = link.start(_blob(1000))
    link.finish(first)
    link.finish(second)
    assert clock.now_s == 120.0 and clock.sleeps == []


def test_a_failed_start_does_not_occupy_a_throttled_link():
    clock = Clock()
    link = _throttled(clock)
    inner: Any = link._inner
    start = inner.start
    inner.start = lambda blob: (_ for _ in ()).throw(TransferError("injected"))
    with pytest.raises(TransferError):
        link.start(_blob())
    inner.start = start
    link.finish(link.start(_blob(1000)))
    assert clock.now_s == 101.5


def test_a_sleeping_link_wakes_up_too_early_and_goes_on_sleeping():
    clock = Clock()
    link = ThrottledLink(
        _device_link(), 1000.0, clock=clock, wait=lambda seconds: clock.wait(seconds / 2)
    )
    link.finish(link.start(_blob(1000)))
    assert clock.now_s == pytest.approx(101.0)
    assert len(clock.sleeps) > 2


def test_closing_wakes_a_sleeping_link():
    link = ThrottledLink(_device_link(), 1e-6)
    array = link.start(_blob())
    link.close()
    with pytest.raises(TransferError, match="the engine was closed"):
        link.finish(array)


def test_an_infinite_speed_leaves_the_latency():
    clock = Clock()
    link = _throttled(clock, math.inf, 0.25)
    link.finish(link.start(_blob()))
    assert clock.now_s == 100.25


@pytest.mark.parametrize(
    "bytes_per_s, latency_s",
    [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, -1.0), (1.0, math.nan), (1.0, math.inf)],
)
def test_a_link_that_cannot_be_is_refused(bytes_per_s, latency_s):
    with pytest.raises(RequestError, match="a link needs a"):
        ThrottledLink(_device_link(), bytes_per_s, latency_s)


def test_a_stop_flag_stays_set():
    flag = StopFlag()
    assert not flag and not flag.wait(0) and not flag.wait(0.001)
    flag.set()
    flag.set()
    assert flag and flag.wait(0) and flag.wait(1000) and flag.wait(math.inf)
