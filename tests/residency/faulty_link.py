"""Links that fail or are slow when they are told to, or at random."""

import random
import threading
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from jmoe.errors import TransferError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import CLOSED, DeviceLink, Link, LinkCounters, StopFlag

BLOB_BYTES = 256


def make_blob(key: ExpertKey, num_bytes: int = BLOB_BYTES) -> np.ndarray:
    """Bytes that no other expert has: uint8 [num_bytes]."""
    blob = np.arange(num_bytes, dtype=np.uint32) * (1 + key.layer) + 7 * key.expert
    return (blob % 251).astype(np.uint8)


class FaultyLink:
    """Some copies fail, in ``start`` or in ``finish``, and some take their time.

    Attributes:
      num_failed: copies that failed so far.
    """

    def __init__(
        self,
        inner: Link,
        *,
        seed: int = 0,
        failure_rate: float = 0.0,
        slow_rate: float = 0.0,
        slow_s: float = 0.01,
        script: Iterable[str] = (),
        hands_out_early: bool = False,
    ):
        """Args:
        inner: makes the copies.
        seed: of what happens.
        failure_rate: share of the copies that fail, half of them when they are started.
        slow_rate: share of the others that take time.
        slow_s: at most so much.
        script: what happens to the first copies, before chance rules: "ok", "start" (fails when
          started), "finish" (fails when awaited), or "slow".
        hands_out_early: not for copies that may fail when awaited.
        """
        self.hands_out_early = hands_out_early
        self.counters: LinkCounters = inner.counters
        self.num_failed = 0
        self._inner = inner
        self._fates = _fates(random.Random(seed), failure_rate, slow_rate, script)
        self._delay = random.Random(seed + 1)
        self._slow_s = slow_s
        self._closed = StopFlag()
        self._under_way: dict[int, str] = {}

    def start(self, blob: np.ndarray) -> jax.Array:
        fate = next(self._fates)
        if fate == "start":
            self.num_failed += 1
            raise TransferError("injected failure", got="at the start")
        array = self._inner.start(blob)
        self._under_way[id(array)] = fate
        return array

    def remaining_s(self, array: jax.Array) -> float:
        return self._inner.remaining_s(array)

    def finish(self, array: jax.Array) -> None:
        fate = self._under_way.pop(id(array))
        self._inner.finish(array)
        if fate == "slow" and self._closed.wait(self._delay.uniform(0, self._slow_s)):
            raise TransferError(CLOSED)
        if fate == "finish":
            self.num_failed += 1
            raise TransferError("injected failure", got="on the way")

    def close(self) -> None:
        self._closed.set()
        self._inner.close()


def _fates(
    rng: random.Random, failure_rate: float, slow_rate: float, script: Iterable[str]
) -> Iterator[str]:
    yield from script
    while True:
        if rng.random() < failure_rate:
            yield rng.choice(["start", "finish"])
        else:
            yield "slow" if rng.random() < slow_rate else "ok"


class HeldLink:
    """Copies arrive when the test says so, one by one: what overtakes what is then no chance."""

    hands_out_early = False

    def __init__(self, device: jax.Device | None = None):
        self._inner = DeviceLink(device or jax.devices()[0])
        self.counters = self._inner.counters
        self.started: list[np.ndarray] = []
        self._changed = threading.Condition()
        self._to_arrive = 0
        self._closed = False

    def start(self, blob: np.ndarray) -> jax.Array:
        array = self._inner.start(blob)
        with self._changed:
            self.started.append(blob)
            self._changed.notify_all()
        return array

    def remaining_s(self, array: jax.Array) -> float:
        return 0.0 if self._to_arrive or self._closed else 0.001

    def finish(self, array: jax.Array) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._to_arrive > 0 or self._closed)
            if self._closed:
                raise TransferError(CLOSED)
            self._to_arrive -= 1
        self._inner.finish(array)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def let_arrive(self, num_copies: int = 1) -> None:
        with self._changed:
            self._to_arrive += num_copies
            self._changed.notify_all()

    def await_started(self, num_copies: int) -> None:
        """Until so many copies have been started, in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.started) >= num_copies, 20)


def await_true(condition, timeout_s: float = 20) -> None:
    """Waits for another thread's doing that sends no sign."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)
