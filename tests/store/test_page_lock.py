"""Locking pages: the best way that the backend offers, and why not a better one."""

import gc
import mmap
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jmoe.quant.layout import aligned_empty
from jmoe.store import host_memory, page_lock
from jmoe.store.page_lock import lock_pages

_PAGE = mmap.PAGESIZE


class FakeClient:
    """A backend's client that keeps account of what is registered with it."""

    def __init__(self, refuse_from: int | None = None):
        self.mapped: dict[int, int] = {}
        self._refuse_from = refuse_from

    def dma_map(self, address: int, num_bytes: int) -> None:
        if self._refuse_from is not None and len(self.mapped) >= self._refuse_from:
            raise RuntimeError("UNIMPLEMENTED: DmaMap not supported.\nand more lines")
        assert address % _PAGE == 0 and num_bytes % _PAGE == 0
        self.mapped[address] = num_bytes

    def dma_unmap(self, address: int) -> None:
        del self.mapped[address]


def _device(client: Any, platform: str = "gpu") -> Any:
    return SimpleNamespace(platform=platform, client=client)


def _layers(num_layers: int = 3, num_bytes: int = 10_000) -> list[np.ndarray]:
    layers = [host_memory.allocate(num_bytes).reshape(4, -1) for _ in range(num_layers)]
    for i, layer in enumerate(layers):
        layer[:] = i + 1
        layer.flags.writeable = False
    return layers


@pytest.fixture
def pinned_by_cpu(monkeypatch):
    """Lets a fake device have the pinned_host arrays of the CPU backend."""
    real = page_lock._pinned_copy
    cpu = jax.devices("cpu")[0]

    def pinned_copy(layer: np.ndarray, device: jax.Device) -> jax.Array:
        copy = aligned_empty(layer.shape, layer.dtype)
        copy[:] = layer  # as a GPU would do, where the CPU backend takes over what it is given
        return real(copy, cpu)

    monkeypatch.setattr(page_lock, "_pinned_copy", pinned_copy)


def test_on_the_cpu_nothing_is_to_be_locked():
    layers = _layers()
    before = list(layers)
    lock = lock_pages(layers, jax.devices("cpu")[0], may_move=True, spare_bytes=0)
    assert lock.kind == "plain"
    assert lock.reason == "the CPU backend reads host memory where it is"
    assert all(a is b for a, b in zip(layers, before, strict=True))
    lock.close()


def test_memory_is_registered_page_by_page_and_given_back():
    client, layers = FakeClient(), _layers()
    lock = lock_pages(layers, _device(client), may_move=True, spare_bytes=0)
    assert (lock.kind, lock.reason) == ("dma_map", "registered with the driver")
    assert client.mapped == {layer.ctypes.data: 3 * _PAGE for layer in layers}
    lock.close()
    assert client.mapped == {}
    lock.close()


def test_memory_within_a_page_is_registered_with_all_of_its_pages():
    client = FakeClient()
    memory = host_memory.allocate(8 * _PAGE)
    lock_pages([memory[100 : _PAGE + 101]], _device(client), may_move=True, spare_bytes=0)
    assert client.mapped == {memory.ctypes.data: 2 * _PAGE}


def test_memory_is_unregistered_before_it_is_freed():
    client, layers = FakeClient(), _layers(1)
    lock_pages(layers, _device(client), may_move=True, spare_bytes=0)
    gc.collect()
    assert len(client.mapped) == 1
    view = layers[0][1:].view(np.uint16)[0]  # what a transfer under way holds
    layers.clear()
    gc.collect()
    assert len(client.mapped) == 1
    assert view[0] == 0x0101
    del view
    gc.collect()
    assert client.mapped == {}


def test_where_registering_fails_the_layers_move(pinned_by_cpu):
    client, layers = FakeClient(refuse_from=2), _layers()
    addresses = [layer.ctypes.data for layer in layers]
    lock = lock_pages(layers, _device(client), may_move=True, spare_bytes=1 << 20)
    assert lock.kind == "pinned_host"
    assert lock.reason == (
        "moved into pinned_host arrays (dma_map: UNIMPLEMENTED: DmaMap not supported)"
    )
    assert client.mapped == {}  # two had succeeded
    assert len(lock.pinned) == len(layers)
    for i, (layer, array) in enumerate(zip(layers, lock.pinned, strict=True)):
        assert layer.ctypes.data == array.unsafe_buffer_pointer() != addresses[i]
        assert layer.ctypes.data % 64 == 0
        assert not layer.flags.writeable
        assert layer.shape == array.shape == (4, 2500)
        assert (layer == i + 1).all()
    lock.close()
    assert lock.pinned == ()
    assert (layers[0] == 1).all()


def test_at_most_one_layer_is_in_memory_twice(monkeypatch, pinned_by_cpu):
    """By the time a layer is copied, the memory of those before it is given back."""
    import weakref

    client, layers = FakeClient(refuse_from=0), _layers()
    owners = [weakref.ref(page_lock._owner(layer)) for layer in layers]
    alive = []
    copy = page_lock._pinned_copy

    def spy(layer: np.ndarray, device: jax.Device) -> jax.Array:
        gc.collect()
        alive.append(sum(owner() is not None for owner in owners))
        return copy(layer, device)

    monkeypatch.setattr(page_lock, "_pinned_copy", spy)
    lock_pages(layers, _device(client), may_move=True, spare_bytes=1 << 20)
    assert alive == [3, 2, 1]


def test_a_client_without_dma_map(pinned_by_cpu):
    lock = lock_pages(_layers(), _device(object()), may_move=True, spare_bytes=1 << 20)
    assert lock.kind == "pinned_host"
    assert "'object' object has no attribute 'dma_map'" in lock.reason


@pytest.mark.parametrize(
    ("may_move", "spare_bytes", "limit_gb", "words"),
    [
        (False, 1 << 30, "64", "it would copy the mapped files into memory"),
        (True, 29_999, "64", "it may take 0.0 GiB more, and 0.0 GiB are free"),
        (True, 1 << 30, "0", "are above XLA's limit of 0.0 GiB (XLA_PJRT_GPU_HOST_MEMORY_LIMIT"),
    ],
)
def test_when_layers_do_not_move(
    may_move: bool, spare_bytes: int, limit_gb: str, words: str, monkeypatch, pinned_by_cpu
):
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", limit_gb)
    layers = _layers()
    before = list(layers)
    device = _device(FakeClient(refuse_from=0))
    lock = lock_pages(layers, device, may_move=may_move, spare_bytes=spare_bytes)
    assert lock.kind == "plain"
    assert lock.reason.startswith("dma_map: UNIMPLEMENTED: DmaMap not supported; pinned_host: not")
    assert words in lock.reason
    assert all(a is b for a, b in zip(layers, before, strict=True))


def test_the_limit_of_the_pool_is_that_of_gpus_only(monkeypatch, pinned_by_cpu):
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "0")
    device = _device(FakeClient(refuse_from=0), platform="tpu")
    assert lock_pages(_layers(), device, may_move=True, spare_bytes=1 << 20).kind == "pinned_host"


def test_the_limit_of_the_pool():
    limit = page_lock._pool_limit_bytes
    assert limit({}) == 64 << 30
    assert limit({"XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE": "true"}) == 16 << 30
    assert limit({"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "100"}) == 100 << 30
    assert limit({"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "much"}) == 64 << 30


def test_a_pool_that_runs_out_half_way_costs_nothing(monkeypatch, pinned_by_cpu):
    copy, copied = page_lock._pinned_copy, []

    def run_out(layer: np.ndarray, device: jax.Device) -> jax.Array:
        if len(copied) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")
        copied.append(layer.shape)
        return copy(layer, device)

    monkeypatch.setattr(page_lock, "_pinned_copy", run_out)
    layers = _layers()
    device = _device(FakeClient(refuse_from=0))
    lock = lock_pages(layers, device, may_move=True, spare_bytes=1 << 20)
    assert lock.kind == "plain"
    assert "RESOURCE_EXHAUSTED: out of pinned memory after 2 of 3 layers" in lock.reason
    gc.collect()
    assert [int(layer[0, 0]) for layer in layers] == [1, 2, 3]


def test_arrays_that_numpy_cannot_see_in_place_are_of_no_use(monkeypatch):
    elsewhere = SimpleNamespace(
        __array__=lambda *_, **__: np.zeros(4), unsafe_buffer_pointer=lambda: 0
    )
    monkeypatch.setattr(page_lock, "_pinned_copy", lambda layer, device: elsewhere)
    device = _device(FakeClient(refuse_from=0))
    lock = lock_pages(_layers(), device, may_move=True, spare_bytes=1 << 20)
    assert lock.kind == "plain"
    assert lock.reason.endswith("pinned_host: numpy gets a copy of a pinned_host array")
