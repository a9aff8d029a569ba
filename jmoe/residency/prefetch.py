"""Moving experts to the device while the engine does something else.

Two queues: what the engine waits for goes before what it may need soon. A copy that was started
is never given up. An error belongs to its expert: the next wait for that one raises it, once, and
later copies go on.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Self

import jax
import numpy as np

from jmoe.residency.eviction import ExpertKey
from jmoe.residency.fetch_thread import FetchState
from jmoe.residency.link import Link
from jmoe.residency.transfers import Job, Transfer, name_of

__all__ = ["Fetcher", "Transfer"]


class Fetcher:
    """Copies experts to a device in the background.

    All methods but ``close`` belong to one thread. A fetcher that is no longer referred to, or
    whose process ends, stops by itself.
    """

    def __init__(
        self,
        link: Link,
        read_blob: Callable[[ExpertKey], np.ndarray],
        *,
        max_in_flight: int = 2,
        max_queued: int = 256,
        on_transfer: Callable[[Transfer], None] | None = None,
        is_ready: Callable[[ExpertKey], bool] | None = None,
    ):
        """Args:
        link: what moves them. Closed together with the fetcher.
        read_blob: the bytes of an expert: uint8 [num_bytes]. Called on the thread. Must not refer
          to the fetcher, which would then never be dropped.
        max_in_flight: how many copies to start before the first has arrived: with two the link
          does not wait for the host in between.
        max_queued: how many prefetches may wait.
        on_transfer: called for every copy that has arrived, on the thread; must be quick.
        is_ready: whether an expert's bytes are in memory. Prefetches of others wait, so that the
          thread does not: a demand might come meanwhile. Called on the thread; must be quick, and
          not refer to the fetcher. When it may have changed, ``look_again`` is to be called.
        """
        assert max_in_flight >= 1 and max_queued >= 0
        self._state = FetchState(link, read_blob, max_in_flight, on_transfer, is_ready)
        self._max_queued = max_queued
        self._finalizer = weakref.finalize(self, self._state.stop)
        self._finalizer.atexit = False  # at exit the thread is joined too, see fetch_thread.py

    def demand(self, keys: Collection[ExpertKey]) -> None:
        """Asks for experts that are needed now: before all prefetches, in the order given.

        Nothing happens for one that is under way, or there. A queued prefetch is promoted.

        Raises:
          TransferError: closed.
        """
        state = self._state
        state.ensure_thread()
        with state.lock:
            for key in keys:
                job = state.jobs.get(key)
                if job is None:
                    job = state.flying_job(key) or Job(key, "demand")
                    if not job.started:
                        state.demands[key] = job
                    state.jobs[key] = job
                elif not job.started:
                    state.promote(job)
        state.wake()

    def prefetch(self, keys: Collection[ExpertKey]) -> list[ExpertKey]:
        """Asks for experts that may be needed soon: after everything that was asked for.

        Returns:
          Those of the keys that will come: all, unless more than ``max_queued`` are waiting.

        Raises:
          TransferError: closed.
        """
        state = self._state
        accepted = []
        state.ensure_thread()
        with state.lock:
            for key in keys:
                if key not in state.jobs:
                    job = state.flying_job(key) or Job(key, "prefetch")
                    if not job.started:
                        if len(state.prefetches) >= self._max_queued:
                            continue
                        state.prefetches[key] = job
                    state.jobs[key] = job
                accepted.append(key)
        state.wake()
        return accepted

    def cancel(self, key: ExpertKey) -> bool:
        """Says that an expert is no longer wanted.

        Returns:
          True if its copy was queued, and will not happen. False if it is under way or done (its
          array is dropped, its error forgotten), or was never asked for.
        """
        state = self._state
        with state.lock:
            job = state.jobs.pop(key, None)
            state.demands.pop(key, None)
            state.prefetches.pop(key, None)
        return job is not None and not job.started

    def wait(self, key: ExpertKey) -> jax.Array:
        """Blocks until an expert that was asked for may be used, and hands its array over.

        It may be used when it has arrived, or before if ``link.hands_out_early``; an error that
        the copy has later is then that of whoever uses the array. A queued prefetch is promoted.
        The key is forgotten: to wait for it again it must be asked for again.

        Raises:
          CapacityError: the device had no memory for it.
          TransferError: the copy failed, or the fetcher was closed.
        """
        state = self._state
        job = state.jobs.get(key)
        if job is None:
            state.check_open()
            raise AssertionError(f"{name_of(key)} was never asked for")
        if not job.done:
            if not job.started:
                with state.lock:
                    if not job.started:
                        state.promote(job)
            state.wake()
            state.check_open()
            job.arrived.acquire()
        state.check_open()
        array, error = job.array, job.error
        job.handed_over = True
        state.jobs.pop(key, None)
        if error is not None:
            try:
                raise error
            finally:  # it would refer to itself through this frame
                del error, job
        assert array is not None
        return array

    def poll_ready(self, key: ExpertKey) -> bool:
        """Whether ``wait`` would not block."""
        job = self._state.jobs.get(key)
        return job is None or job.done

    @property
    def look_again(self) -> Callable[[], None]:
        """Says that ``is_ready`` may have changed; a method that does not refer to the fetcher."""
        return self._state.look_again

    @property
    def in_flight(self) -> frozenset[ExpertKey]:
        """Experts whose copy has been started and has not arrived, wanted or not."""
        with self._state.lock:
            return frozenset(job.key for job in self._state.flying)

    @property
    def num_queued(self) -> int:
        """Copies that were asked for and have not been started."""
        return len(self._state.demands) + len(self._state.prefetches)

    def arrivals_s(self, copy_s: float) -> dict[ExpertKey, float]:
        """When the copies under way will have arrived, if each takes so long: ``perf_counter``."""
        with self._state.lock:
            flying = [(job.key, job.started_s) for job in self._state.flying]
        arrivals, free_s = {}, 0.0
        for key, started_s in flying:
            free_s = max(free_s, started_s or time.perf_counter()) + copy_s
            arrivals[key] = free_s
        return arrivals

    def drain(self) -> None:
        """Cancels what is queued, waits for what is under way, and forgets all results."""
        state = self._state
        with state.lock:
            state.jobs.clear()
            state.demands.clear()
            state.prefetches.clear()
            if not state.flying or state.closed:
                return
            landed = threading.Lock()
            landed.acquire()
            state.landed = landed
        landed.acquire()

    def set_recording(self, recording: bool) -> None:
        """Begins a new list of transfers, or drops it."""
        self._state.transfers = [] if recording else None

    @property
    def transfers(self) -> list[Transfer]:
        """Since recording began: every copy that arrived, in order."""
        return list(self._state.transfers or ())

    def close(self) -> None:
        """Ends the thread, within a second, and closes the link. A second call does nothing.

        What is queued will not happen; who waits, or asks for something later, gets a
        TransferError. From any thread, even in a finalizer.
        """
        self._state.stop()
        self._state.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
