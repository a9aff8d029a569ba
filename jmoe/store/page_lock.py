"""Locking host memory in place, so that the device's DMA engine reads it without a detour.

Copies from ordinary memory go through a staging buffer, by one host thread. Three ways, the best
first, unless programs are to read the memory: to register it with the driver (``dma_map``, not a
public part of JAX); to move it into arrays of the backend's own locked memory (``pinned_host``); to
leave it as it is.
"""

import dataclasses
import mmap
import os
import weakref
from collections.abc import Mapping, MutableSequence
from typing import Any, Literal

import jax
import numpy as np

PageLockKind = Literal["dma_map", "pinned_host", "plain"]


@dataclasses.dataclass(slots=True)
class PageLock:
    """What became of an attempt to lock memory. Made by ``lock_pages``.

    Attributes:
      kind: how it is locked; "plain" is not at all.
      reason: why so, for the user; with what failed before.
      pinned: by layer the device's view of the memory, of kind "pinned_host" only: in the dtype
        that was asked for, sharing the layer's bytes.
    """

    kind: PageLockKind
    reason: str
    pinned: tuple[jax.Array, ...] = ()
    _locks: tuple[weakref.finalize, ...] = ()

    def close(self) -> None:
        """Unlocks the memory. No transfer may be under way. A second call does nothing.

        Without it registered memory is unlocked when the last view of it goes, which a transfer
        holds too.
        """
        for unlock in self._locks:
            unlock()
        self.pinned = ()


def lock_pages(
    layers: MutableSequence[np.ndarray],
    device: jax.Device,
    *,
    may_move: bool,
    spare_bytes: int,
    may_register: bool = True,
    dtype: str = "uint8",
    as_arrays: bool = False,
) -> PageLock:
    """Locks arrays for transfers to a device, as well as it can be done.

    Args:
      layers: C-contiguous arrays. If they move into pinned_host arrays the entries are replaced,
        one after another: no more than one layer is in memory twice, provided that nobody else
        holds the arrays that were there.
      device: where the transfers go.
      may_move: whether moving is allowed. A mapped file stays where it is: to copy it would take
        the memory that it was mapped to save.
      spare_bytes: free memory, beside the arrays.
      may_register: whether the driver may keep all of them in memory.
      dtype: of pinned_host arrays.
      as_arrays: whether to try pinned_host first, whose arrays programs can read.

    Returns:
      The lock. Nothing is raised where the backend refuses: that is in its reason.
    """
    if device.platform == "cpu":
        return PageLock("plain", "the CPU backend reads host memory where it is")

    def register() -> PageLock:
        if not may_register:
            raise RuntimeError("not tried, the files are larger than the memory that is free")
        return PageLock("dma_map", "registered with the driver", _locks=_map_all(layers, client))

    def move() -> PageLock:
        obstacle = _obstacle_to_moving(layers, device, may_move, spare_bytes, os.environ)
        if obstacle is not None:
            raise RuntimeError(obstacle)
        return PageLock(
            "pinned_host", "moved into pinned_host arrays", _move(layers, device, dtype)
        )

    client = device.client
    ways = [("dma_map", register), ("pinned_host", move)]
    failures = []
    for name, lock_by in reversed(ways) if as_arrays else ways:
        try:
            lock = lock_by()
        except Exception as error:  # of whatever type the backend or its version has
            failures.append(f"{name}: {_sentence(error)}")
        else:
            lock.reason += f" ({failures[0]})" if failures else ""
            return lock
    return PageLock("plain", "; ".join(failures))


def _move(
    layers: MutableSequence[np.ndarray], device: jax.Device, dtype: str
) -> tuple[jax.Array, ...]:
    """Moves all arrays into pinned_host ones, which are returned.

    If that fails, those that have moved stay there: it is host memory like any other.
    """
    pinned = []
    try:
        for i in range(len(layers)):
            array = _pinned_copy(layers[i].view(dtype), device)
            layers[i] = _host_view(array).view(np.uint8)
            pinned.append(array)
    except Exception as error:
        done = f" after {len(pinned)} of {len(layers)} layers" if pinned else ""
        raise RuntimeError(_sentence(error) + done) from error
    return tuple(pinned)


def _map_all(layers: MutableSequence[np.ndarray], client: Any) -> tuple[weakref.finalize, ...]:
    """Registers all arrays or none; returns what unregisters each."""
    locks = []
    try:
        for layer in layers:
            address = layer.ctypes.data
            first = address - address % mmap.PAGESIZE
            num_bytes = address + layer.nbytes - first
            client.dma_map(first, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            # Memory must not be freed while it is registered, and views outlive the store.
            unlock = weakref.finalize(_owner(layer), client.dma_unmap, first)
            unlock.atexit = False  # the process takes everything with it
            locks.append(unlock)
    except Exception:
        for unlock in locks:
            unlock()
        raise
    return tuple(locks)


def _owner(array: np.ndarray) -> np.ndarray:
    """The array that every view of this memory refers to."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _obstacle_to_moving(
    layers: MutableSequence[np.ndarray],
    device: jax.Device,
    may_move: bool,
    spare_bytes: int,
    environ: Mapping[str, str],
) -> str | None:
    num_bytes = sum(layer.nbytes for layer in layers)
    if not may_move:
        return "not tried, it would copy the mapped files into memory"
    limit = _pool_limit_bytes(environ)
    if device.platform == "gpu" and num_bytes > limit:
        return (
            f"not tried, {_gib(num_bytes)} are above XLA's limit of {_gib(limit)} "
            "(XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB)"
        )
    # XLA's pool grows by doubling, so that it may lock up to twice of what is used.
    if num_bytes > spare_bytes:
        spare = _gib(max(0, spare_bytes))
        return f"not tried, it may take {_gib(num_bytes)} more, and {spare} are free"
    return None


def _pool_limit_bytes(environ: Mapping[str, str]) -> int:
    """Of XLA:GPU's pinned memory. Source: GetHostMemoryAllocator in xla/pjrt/gpu."""
    preallocated = environ.get("XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE", "").lower()
    default = "16" if preallocated in ("true", "1") else "64"
    value = environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", default)
    return int(value if value.isdecimal() else default) << 30


def _pinned_copy(layer: np.ndarray, device: jax.Device) -> jax.Array:
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return jax.block_until_ready(jax.device_put(layer, sharding))


def _host_view(array: jax.Array) -> np.ndarray:
    """The array's memory as numpy sees it; a copy would be a second one of everything."""
    view = np.asarray(array)
    if view.ctypes.data != array.unsafe_buffer_pointer():
        raise RuntimeError("numpy gets a copy of a pinned_host array")
    return view


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
