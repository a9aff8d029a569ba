"""A link that fails and is slow at random."""

import random
import threading

import jax
import numpy as np

from jmoe.errors import TransferError
from jmoe.residency.link import DeviceLink, LinkCounters


class RandomLink:
    """Some copies fail, when they are started or on the way, and some take their time.

    Attributes:
      failure_rate: share of the copies that fail.
      slow_rate: share of the others that take up to ``slow_s`` longer.
      slow_s: most seconds that a copy is late.
      num_failed: copies that failed so far.
      num_late: copies that were late so far.
    """

    hands_out_early = False

    def __init__(self, inner: DeviceLink, seed: int):
        self.counters: LinkCounters = inner.counters
        self.failure_rate = 0.0
        self.slow_rate = 0.0
        self.slow_s = 0.0
        self.num_failed = 0
        self.num_late = 0
        self._inner = inner
        self._random = random.Random(seed)
        self._closed = threading.Event()

    def start(self, blob: np.ndarray) -> jax.Array:
        self._fail()
        return self._inner.start(blob)

    def remaining_s(self, array: jax.Array) -> float:
        return self._inner.remaining_s(array)

    def finish(self, array: jax.Array) -> None:
        self._inner.finish(array)
        if self._random.random() < self.slow_rate:
            self.num_late += 1
            if self._closed.wait(self._random.uniform(0, self.slow_s)):
                raise TransferError("the engine was closed")
        self._fail()

    def _fail(self) -> None:
        if self._random.random() < self.failure_rate / 2:
            self.num_failed += 1
            raise TransferError("injected failure")

    def close(self) -> None:
        self._closed.set()
        self._inner.close()
