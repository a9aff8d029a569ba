"""The thread behind the Fetcher (prefetch.py), and what the two share.

Ctrl-C can interrupt the engine between any two instructions. So changes are ordered to leave
something consistent behind at every point; locks are those of the interpreter itself, which
``with`` cannot be interrupted in taking or giving back (``threading.Condition`` can, and stays
locked); and nobody waits while holding one.
"""

import atexit
import collections
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from jmoe.errors import TransferError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import CLOSED, Link
from jmoe.residency.transfers import Job, Transfer, explained

THREAD_NAME = "jmoe-fetcher"
JOIN_TIMEOUT_S = 1.0


class FetchState:
    """What the Fetcher and its thread share; guarded by ``lock``. Does not refer to the Fetcher.

    A job is queued (in ``demands`` or ``prefetches``), then flying, then neither. Those that the
    engine still wants are in ``jobs``: what is in a queue and not in there is skipped.
    """

    def __init__(
        self,
        link: Link,
        read_blob: Callable[[ExpertKey], np.ndarray],
        max_in_flight: int,
        on_transfer: Callable[[Transfer], None] | None,
        is_ready: Callable[[ExpertKey], bool] | None = None,
    ):
        self.lock = threading.Lock()
        self.jobs: dict[ExpertKey, Job] = {}
        self.demands: dict[ExpertKey, Job] = {}
        self.prefetches: dict[ExpertKey, Job] = {}
        self.flying: collections.deque[Job] = collections.deque()
        self.landed: threading.Lock | None = None  # released when nothing is flying
        self.transfers: list[Transfer] | None = None
        self.closed = False
        self._failure: BaseException | None = None
        self._link = link
        self._read_blob = read_blob
        self._max_in_flight = max_in_flight
        self._on_transfer = on_transfer
        self._is_ready = is_ready
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # may be put to in a finalizer
        self._idle = False  # the thread waits for the bell, or is about to
        self._thread: threading.Thread | None = None
        # Ctrl-C while a thread starts may leave one that will run, or one that never will. So it
        # says itself that it runs; if a second one was started, one of them ends at once.
        self._running = False
        self._claimed = threading.Lock()
        self._ready = threading.Lock()
        self._ready.acquire()

    # Called by the engine's thread.

    def check_open(self) -> None:
        if self._failure is not None:
            raise TransferError("the thread that copies experts has failed") from self._failure
        if self.closed:
            raise TransferError(CLOSED)

    def ensure_thread(self) -> None:
        self.check_open()
        if self._running:
            return
        _live_states.add(self)
        thread = threading.Thread(target=_run, args=(self,), name=THREAD_NAME, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # Ctrl-C in there may become another error, on the way out.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        self._ready.acquire()

    def flying_job(self, key: ExpertKey) -> Job | None:
        """The job of a key that is under way, wanted or not."""
        return next((job for job in self.flying if job.key == key), None)

    def promote(self, job: Job) -> None:
        self.demands[job.key] = job
        self.prefetches.pop(job.key, None)
        job.kind = "demand"

    def wake(self) -> None:
        if self._idle:
            self._bell.put(None)

    def look_again(self) -> None:
        """Says that a prefetch may have become ready. From any thread."""
        # Always, as the thread may have looked a moment ago and be about to listen.
        self._bell.put(None)

    def stop(self) -> None:
        """Lets the thread end. Takes no lock: a finalizer may call it, on any thread."""
        self.closed = True
        self._bell.put(None)
        self._link.close()

    def join(self) -> None:
        """Waits for the thread's end, but not for a device that does not answer."""
        if self._thread is threading.current_thread():
            return  # in a finalizer, perhaps with the lock taken
        if self._thread is not None:
            self._thread.join(JOIN_TIMEOUT_S)
        self._abandon()

    # Called by the thread.

    def run(self) -> None:
        if not self._claimed.acquire(blocking=False):
            return
        self._thread = threading.current_thread()
        self._running = True
        self._ready.release()
        try:
            while not self.closed:
                self._step()
        except BaseException as error:  # or the engine would wait for ever
            self._failure = error
            self.stop()
        self._abandon()
        self.flying.clear()

    def _step(self) -> None:
        """Starts a copy if there is one and it may, else finishes the oldest if that is due."""
        with self.lock:
            job = self._next_job()
            # Until the oldest arrives there may be something to start behind it.
            has_room = len(self.flying) < self._max_in_flight
            if job is None and has_room:
                self._idle = True
        if job is not None:
            self._start(job)
        elif not self.flying:
            self._listen(None)
        elif not has_room or (remaining_s := self._remaining_s()) <= 0:
            self._idle = False
            self._finish(self.flying[0])
        else:
            self._listen(remaining_s)

    def _listen(self, timeout_s: float | None) -> None:
        """Waits for new work, or the end."""
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=timeout_s)
        self._idle = False

    def _remaining_s(self) -> float:
        array = self.flying[0].array
        assert array is not None
        return self._link.remaining_s(array)

    def _next_job(self) -> Job | None:
        if len(self.flying) >= self._max_in_flight:
            return None
        for waiting in (self.demands, self.prefetches):
            for job in list(waiting.values()):
                is_wanted = not job.started and self.jobs.get(job.key) is job
                if is_wanted and waiting is self.prefetches and not self._may_start(job):
                    continue
                del waiting[job.key]
                if is_wanted:
                    job.started = True
                    self.flying.append(job)
                    return job
        return None

    def _may_start(self, prefetch: Job) -> bool:
        return self._is_ready is None or self._is_ready(prefetch.key)

    def _start(self, job: Job) -> None:
        job.started_s = time.perf_counter()
        try:
            blob = self._read_blob(job.key)
            job.num_bytes = blob.nbytes
            job.array = self._link.start(blob)
        except Exception as error:
            self._land(job, error)
        else:
            if self._link.hands_out_early:
                with self.lock:
                    job.publish()

    def _finish(self, job: Job) -> None:
        assert job.array is not None
        try:
            self._link.finish(job.array)
        except Exception as error:
            self._land(job, error)
        else:
            self._record(job, time.perf_counter())
            self._land(job, None)

    def _record(self, job: Job, now_s: float) -> None:
        if self.transfers is None and self._on_transfer is None:
            return
        wanted = job.handed_over or self.jobs.get(job.key) is job
        transfer = Transfer(
            job.key, job.kind, job.queued_s, job.started_s, now_s, job.num_bytes, wanted
        )
        if (transfers := self.transfers) is not None:
            transfers.append(transfer)
        if self._on_transfer is not None:
            self._on_transfer(transfer)

    def _land(self, job: Job, error: Exception | None) -> None:
        with self.lock:
            self.flying.remove(job)
            if error is not None:
                # In this order: wait() reads them in the other one, and without the lock.
                job.error = explained(error, job.key)
                job.array = None
            elif self.jobs.get(job.key) is not job:
                job.array = None
            job.publish()
            if not self.flying:
                self._release_landed()

    def _abandon(self) -> None:
        """Wakes whoever waits: nothing will come any more."""
        with self.lock:
            for job in self.jobs.values():
                job.publish()
            self._release_landed()
            self.demands.clear()
            self.prefetches.clear()
            self.jobs.clear()

    def _release_landed(self) -> None:
        if self.landed is not None:
            self.landed.release()
            self.landed = None


def _run(state: FetchState) -> None:
    state.run()


_live_states: "weakref.WeakSet[FetchState]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Before JAX takes its backends down, which it registered earlier: a thread that is inside of
    # one then would crash.
    states = list(_live_states)
    for state in states:
        with contextlib.suppress(Exception):
            state.stop()
    for state in states:
        state.join()
