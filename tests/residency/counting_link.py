"""A link that knows how many of its copies are in memory."""

import threading
import time
import weakref

import jax
import numpy as np

from jmoe.residency.link import DeviceLink


class CountingLink(DeviceLink):
    """The CPU backend's link, which counts copies until their memory is free.

    An array that is dropped while a program reads it is counted until that has ended.

    Attributes:
      peak: most at one time since ``reset``.
      limit: of copies in memory. Before it is passed, a copy waits a while: a program's results are
        there shortly before the runtime gives up its arguments.
    """

    def __init__(self, device: jax.Device | None = None, dtype: str = "uint8"):
        super().__init__(device or jax.local_devices(backend="cpu")[0], dtype)
        self.peak = 0
        self.limit = 1 << 62
        self._num_alive = 0
        self._lock = threading.RLock()

    @property
    def num_alive(self) -> int:
        """Copies in memory now."""
        # JAX gives numpy arrays back when it is called the next time.
        jax.device_put(np.zeros(1, np.uint8), self._device)
        return self._num_alive

    def _copy(self, blob: np.ndarray) -> np.ndarray:
        end_s = time.monotonic() + 1
        while self.num_alive >= self.limit and time.monotonic() < end_s:
            time.sleep(1e-4)
        copy = super()._copy(blob)
        owner = copy
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        weakref.finalize(owner, self._note, -1)
        self._note(1)
        with self._lock:
            self.peak = max(self.peak, self.num_alive)
        return copy

    def _note(self, change: int) -> None:
        with self._lock:
            self._num_alive += change

    def reset(self) -> None:
        self.peak = self.num_alive
