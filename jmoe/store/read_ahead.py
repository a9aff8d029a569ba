"""Reading experts into memory before somebody touches them, on threads.

Reading goes piece by piece, so that what is needed now waits for one piece of what may be needed
soon. The threads own no error: they touch no byte, and a range that cannot be read is met by
whoever does.

Ctrl-C can interrupt the caller between any two instructions, see residency/fetch_thread.py.
"""

import atexit
import contextlib
import copy
import queue
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Self

import numpy as np

from jmoe.store.reading_queue import AheadCounters, BlobKey, ReadingQueue, Work

THREAD_NAME = "jmoe-read-ahead"
# One was nearly enough for the disk that this was measured with (docs/measurements/disk-tier.md); a
# second one keeps a faster disk busy between two pieces.
NUM_THREADS = 4
MAX_QUEUED = 256
JOIN_TIMEOUT_S = 1.0


class ReadAhead:
    """Reads blobs into memory in the background.

    Any thread may call its methods. One that is no longer referred to, or whose process ends,
    stops by itself.
    """

    def __init__(
        self,
        blob: Callable[[BlobKey], np.ndarray],
        read: Callable[[np.ndarray], object],
        missing_bytes: Callable[[np.ndarray], int],
        *,
        max_ahead_bytes: int,
        max_queued: int = MAX_QUEUED,
        num_threads: int = NUM_THREADS,
    ):
        """Args:
        blob: a view of an expert's bytes: uint8 [num_bytes]. None of the three may refer to this
          object, which would then never be dropped.
        read: waits until the bytes of a view are in memory, or cannot be read.
        missing_bytes: how many bytes of a view are not in memory.
        max_ahead_bytes: of experts that were read and not used since, nor passed: more of them
          would drive each other out of memory.
        max_queued: predictions that may wait; older ones are forgotten.
        num_threads: that read.
        """
        jobs = ReadingQueue(lambda key: blob(key).nbytes, max_queued, max_ahead_bytes)
        self._state = _State(jobs, blob, read, missing_bytes)
        self._finalizer = weakref.finalize(self, self._state.stop)
        self._finalizer.atexit = False  # at exit the threads are joined too
        self._state.start(num_threads)

    @property
    def counters(self) -> AheadCounters:
        """So far."""
        with self._state.lock:
            return copy.copy(self._state.jobs.counters)

    def on_ready(self, call: Callable[[], object]) -> None:
        """Has a method called, on a thread of this, whenever a wanted expert has come.

        Args:
          call: a bound method, whose object this does not keep alive.
        """
        self._state.on_ready = weakref.WeakMethod(call)

    def demand(self, keys: Collection[BlobKey]) -> None:
        """Says that experts are needed now: they are read before all others, in this order."""
        state = self._state
        with state.lock:
            for key in keys:
                state.jobs.demand(key)
        state.wake()

    def predict(self, keys: Collection[BlobKey]) -> None:
        """Says that experts may be needed soon, the likeliest first: they go before older ones."""
        with self._state.lock:
            self._state.jobs.predict(keys)
        self._state.wake()

    def use(self, key: BlobKey) -> None:
        """Says that the bytes of an expert are being used: there is room for another one."""
        with self._state.lock:
            self._state.jobs.use(key)
        self._state.wake()

    def wish(self, keys: Iterable[BlobKey]) -> None:
        """Asks for experts when there is nothing else to do, instead of those asked for before."""
        with self._state.lock:
            self._state.jobs.wish(keys)
        self._state.wake()

    def pass_layer(self, layer: int) -> None:
        """Says that a layer's experts are known: what else was predicted for it was wrong."""
        with self._state.lock:
            self._state.jobs.pass_layer(layer)
        self._state.wake()  # for those that waited for room

    def settle(self) -> None:
        """Ends a batch: nothing is needed or predicted any more."""
        with self._state.lock:
            self._state.jobs.clear()

    def is_ready(self, key: BlobKey) -> bool:
        """Whether all of an expert is in memory; if it is not, it will be, later."""
        state = self._state
        with state.lock:
            job = state.jobs.job(key)
            if job is not None:
                return job.stage == "there"
        if state.missing_bytes(state.blob(key)) == 0:
            return True
        self.predict([key])
        return False

    def close(self) -> None:
        """Ends the threads, within a second; may be called again. What is queued is not read."""
        self._state.stop()
        self._state.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _State:
    """What a ReadAhead and its threads share. Does not refer to the former.

    Attributes:
      jobs: guarded by lock.
    """

    def __init__(
        self,
        jobs: ReadingQueue,
        blob: Callable[[BlobKey], np.ndarray],
        read: Callable[[np.ndarray], object],
        missing_bytes: Callable[[np.ndarray], int],
    ):
        self.lock = threading.Lock()
        self.jobs = jobs
        self.blob = blob
        self.missing_bytes = missing_bytes
        self.on_ready: weakref.WeakMethod | None = None
        self._read = read
        self._closed = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # may be put to in a finalizer
        self._num_idle = 0  # threads that wait for the bell, or are about to
        self._threads: list[threading.Thread] = []

    def start(self, num_threads: int) -> None:
        _live_states.add(self)
        for _ in range(num_threads):
            thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
            self._threads.append(thread)
            thread.start()

    def wake(self) -> None:
        for _ in range(self._num_idle):
            self._bell.put(None)

    def stop(self) -> None:
        """Lets the threads end. Takes no lock: a finalizer may call it, on any thread."""
        self._closed = True
        for _ in self._threads:
            self._bell.put(None)

    def join(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed:
            with self.lock:
                work = self.jobs.take()
                self._num_idle += work is None
            if work is not None:
                self._do(work)
                del work  # or memory would live as long as there is nothing to do
            else:
                self._bell.get()
                with self.lock:
                    self._num_idle -= 1

    def _do(self, work: Work) -> None:
        """Whatever fails here says nothing: who touches the bytes will find out."""
        view = self.blob(work.job.key)
        if not work.num_bytes:
            is_missing = True
            with contextlib.suppress(Exception):
                is_missing = self.missing_bytes(view) > 0
            with self.lock:
                self.jobs.checked(work.job, is_missing)
                is_ready = work.job.stage == "there"
        else:
            with contextlib.suppress(Exception):
                self._read(view[work.start : work.start + work.num_bytes])
            with self.lock:
                is_ready = self.jobs.finished(work)
        call = self.on_ready and self.on_ready()
        if is_ready and call is not None:
            call()


_live_states: "weakref.WeakSet[_State]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    states = list(_live_states)
    for state in states:
        state.stop()
    for state in states:
        state.join()
