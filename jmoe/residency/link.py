"""The way from host memory to the device: every copy of an expert goes through here.

A link is used by one thread (residency/prefetch.py), except for ``close``. It knows bytes; which
expert they are is for the caller to say in errors.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol, Self

import jax
import numpy as np

from jmoe.errors import CapacityError, RequestError, TransferError
from jmoe.quant.layout import aligned_empty

_PIECE_BYTES = 1 << 22  # the host copies so much at a time; shorter pieces were slower
_POLL_S = 2e-4  # a backend tells only whether a copy has arrived, not when it will
CLOSED = "the engine was closed"


@dataclasses.dataclass(slots=True)
class LinkCounters:
    """What a link has done: copies that arrived, their bytes, and the seconds it was occupied."""

    copies: int = 0
    bytes: int = 0
    busy_s: float = 0.0

    def snapshot(self) -> Self:
        return dataclasses.replace(self)

    def __sub__(self, earlier: "LinkCounters") -> "LinkCounters":
        """What happened since a snapshot."""
        return LinkCounters(
            self.copies - earlier.copies, self.bytes - earlier.bytes, self.busy_s - earlier.busy_s
        )

    def to_json(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


class Link(Protocol):
    """Copies blobs to a device, in the order of ``start``; each is finished once, in that order.

    Attributes:
      hands_out_early: whether an array may be used before ``finish`` has returned: it is there
        already, or the backend lets those wait who use it.
      counters: what was done so far.
    """

    hands_out_early: bool
    counters: LinkCounters

    def start(self, blob: np.ndarray) -> jax.Array:
        """Begins a copy.

        Args:
          blob: uint8 [num_bytes], C-contiguous; must not change until ``finish`` has returned.

        Returns:
          [num_items] of the link's dtype, in memory of its own.

        Raises:
          CapacityError: the device has no memory for it.
          TransferError: the backend refuses, or the link was closed.
        """
        ...

    def remaining_s(self, array: jax.Array) -> float:
        """For how long ``finish`` would block, or when to ask again. 0: not at all, or unknown."""
        ...

    def finish(self, array: jax.Array) -> None:
        """Waits until a copy has arrived (errors: those of ``start``)."""
        ...

    def close(self) -> None:
        """Lets a waiting ``start`` or ``finish`` give up. From any thread, even in a finalizer."""
        ...


class StopFlag:
    """A flag to be waited for that takes no lock to set.

    The lock of a ``threading.Event`` may be held by the very thread in which a finalizer runs.
    """

    def __init__(self):
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # set already
            self._unset.release()

    def __bool__(self) -> bool:
        return not self._unset.locked()

    def wait(self, timeout_s: float) -> bool:
        """Returns whether it is set, as soon as it is or when time is over. For one thread."""
        if timeout_s > 0 and self._unset.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            self._unset.release()
        return bool(self)


class DeviceLink:
    """The device's own link: one ``jax.device_put`` per blob.

    On an accelerator the copy goes on behind the caller's back; from memory that the store has
    locked (``PageLock`` of kind "dma_map") without a detour. Blobs in pinned_host arrays are taken
    as the host memory that they share, which older versions of jaxlib copy once more.

    On the CPU backend, where XLA would read the host's memory in place, the host makes a copy that
    XLA takes over: so there is something to cache, as on other devices. ``device_put`` with
    ``may_alias=False`` is several times slower.
    """

    # On the CPU backend the copy is complete when start() returns.
    hands_out_early = True

    def __init__(self, device: jax.Device, dtype: str = "uint8"):
        """Args:
        device: where to.
        dtype: of the arrays: that of the layout (``ExpertLayout.dtype``).
        """
        self.counters = LinkCounters()
        self._device = device
        self._dtype = jax.numpy.dtype(dtype)
        self._closed = StopFlag()
        self._starts_s: dict[int, float] = {}  # by id of the array
        self._idle_since_s = 0.0

    def start(self, blob: np.ndarray) -> jax.Array:
        start_s = time.perf_counter()
        try:
            source = blob if self._device.platform != "cpu" else self._copy(blob)
            array = jax.device_put(source.view(self._dtype), self._device)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            raise _typed(error, blob.nbytes) from error
        if self._device.platform == "cpu":
            self._count(array, start_s)
        else:
            self._starts_s[id(array)] = start_s
        return array

    def remaining_s(self, array: jax.Array) -> float:
        return 0.0 if array.is_ready() else _POLL_S  # pyright: ignore[reportAttributeAccessIssue]

    def finish(self, array: jax.Array) -> None:
        if self._device.platform == "cpu":
            return
        # Not to be interrupted, but a copy under way takes milliseconds.
        start_s = self._starts_s.pop(id(array))
        try:
            array.block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            raise _typed(error, array.nbytes) from error
        self._count(array, start_s)

    def close(self) -> None:
        self._closed.set()

    def _copy(self, blob: np.ndarray) -> np.ndarray:
        copy = aligned_empty(blob.shape, np.uint8)
        for first in range(0, blob.nbytes, _PIECE_BYTES):
            if self._closed:
                raise TransferError(CLOSED)
            # Without the GIL.
            copy[first : first + _PIECE_BYTES] = blob[first : first + _PIECE_BYTES]
        return copy

    def _count(self, array: jax.Array, start_s: float) -> None:
        now_s = time.perf_counter()
        self.counters.copies += 1
        self.counters.bytes += array.nbytes
        # Copies may overlap, or wait for each other.
        self.counters.busy_s += now_s - max(start_s, self._idle_since_s)
        self._idle_since_s = now_s


class ThrottledLink:
    """A slower link than there is: for tests, and to study a machine on another one.

    Copies go one after another: each occupies the link for ``latency_s + bytes / bytes_per_s``,
    from its start or from when the link is free. The real copy is made meanwhile; if it takes
    longer than that, so does the link.
    """

    hands_out_early = False

    def __init__(
        self,
        inner: Link,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], bool] | None = None,
    ):
        """Args:
          inner: makes the copies.
          bytes_per_s: above 0; may be infinite.
          latency_s: of every copy, during which nothing else moves.
          clock: what time it is, in seconds.
          wait: sleeps so many seconds, and returns whether the link was closed.

        Raises:
          RequestError: a speed or a latency that no link has.
        """
        if not bytes_per_s > 0:
            raise RequestError(
                "a link needs a speed", got=f"{bytes_per_s} bytes/s", expected="more than 0"
            )
        if not 0 <= latency_s < math.inf:
            raise RequestError(
                "a link needs a latency", got=f"{latency_s} s", expected="0 or more seconds"
            )
        self.counters = LinkCounters()
        self._inner = inner
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._clock = clock
        self._closed = StopFlag()
        self._wait = wait or self._closed.wait
        self._free_at_s = -math.inf
        self._due: dict[int, tuple[float, float]] = {}  # by id of the array: duration, end

    def start(self, blob: np.ndarray) -> jax.Array:
        begin_s = max(self._clock(), self._free_at_s)
        array = self._inner.start(blob)
        duration_s = self._latency_s + blob.nbytes / self._bytes_per_s
        self._free_at_s = begin_s + duration_s
        self._due[id(array)] = duration_s, self._free_at_s
        return array

    def remaining_s(self, array: jax.Array) -> float:
        return self._due[id(array)][1] - self._clock()

    def finish(self, array: jax.Array) -> None:
        duration_s, due_s = self._due.pop(id(array))
        self._inner.finish(array)
        while (remaining_s := due_s - self._clock()) > 0:
            if self._wait(remaining_s):
                raise TransferError(CLOSED)
        self.counters.copies += 1
        self.counters.bytes += array.nbytes
        self.counters.busy_s += duration_s

    def close(self) -> None:
        self._closed.set()
        self._inner.close()


def _typed(error: Exception, num_bytes: int) -> CapacityError | TransferError:
    sentence = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return CapacityError(
            "the device has no memory left for an expert",
            got=sentence,
            expected=f"{num_bytes / 2**20:.1f} MiB",
            do="use a smaller device_memory_gib, so that the rest of the device has room",
        )
    return TransferError(
        "copying an expert to the device failed",
        got=sentence,
        do="try again; if it goes on, look at the device's log",
    )
