"""Experts that the host computes while link and device do something else.

One thread takes one job after another: tokens of a layer through those of its experts that are not
on the device, out of the host's own copy. It knows no arithmetic; who makes it says how to compute.
Locks are those of the interpreter itself, as in fetch_thread.py and for the same reason.
"""

import atexit
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
import weakref
from typing import Protocol, Self

import jax
import numpy as np

from jmoe.errors import ComputeError, JmoeError
from jmoe.residency.link import CLOSED
from jmoe.residency.timeline import Timeline

THREAD_NAME = "jmoe-host-experts"
JOIN_TIMEOUT_S = 1.0
# A job takes milliseconds, and seconds if a machine swaps or a disk is slow.
STALL_S = 120.0

Tokens = jax.Array | np.ndarray


@dataclasses.dataclass(slots=True)
class HostCounters:
    """What was computed on the host: experts of jobs, their rows and bytes, and seconds."""

    experts: int = 0
    rows: int = 0
    bytes: int = 0
    busy_s: float = 0.0

    def snapshot(self) -> Self:
        return dataclasses.replace(self)

    def __sub__(self, earlier: "HostCounters") -> "HostCounters":
        """What happened since a snapshot."""
        return HostCounters(
            self.experts - earlier.experts,
            self.rows - earlier.rows,
            self.bytes - earlier.bytes,
            self.busy_s - earlier.busy_s,
        )


class Compute(Protocol):
    """Takes rows through experts of a layer."""

    def __call__(
        self, layer: int, x_TD: Tokens, rows_R: np.ndarray, ids_R: np.ndarray, /
    ) -> np.ndarray:
        """Args:
          layer: of the experts.
          x_TD: what they read; may still be on its way to the host.
          rows_R: assignments t * K + k, int32; any for rows that are not computed.
          ids_R: the expert of each row, int32; -1 for none.

        Returns:
          float32 [R, D]; zeros for rows that are not computed.
        """
        ...


class HostJob:
    """Tokens of a layer on their way through experts. ``done`` is released at the end."""

    __slots__ = ("done", "error", "experts", "ids_R", "layer", "rows_R", "seconds", "x_TD", "y_RD")

    def __init__(self, layer: int, x_TD: Tokens, rows_R: np.ndarray, ids_R: np.ndarray):
        self.layer = layer
        self.x_TD: Tokens | None = x_TD
        self.rows_R = rows_R
        self.ids_R = ids_R
        self.experts = np.unique(ids_R[ids_R >= 0]).tolist()
        self.seconds = 0.0
        self.y_RD: np.ndarray | None = None
        self.error: Exception | None = None
        self.done = threading.Lock()
        self.done.acquire()

    @property
    def name(self) -> str:
        return f"layer {self.layer}, experts {', '.join(map(str, self.experts))}"


class HostExperts:
    """Computes experts in the background. All methods but ``close`` belong to one thread.

    One that is no longer referred to, or whose process ends, stops by itself.

    Attributes:
      counters: of the jobs that are done.
    """

    def __init__(
        self,
        compute: Compute,
        blob_bytes: int,
        timeline: Timeline | None = None,
        stall_s: float = STALL_S,
    ):
        """Args:
        compute: called on the thread; must not refer to this.
        blob_bytes: of an expert.
        timeline: where to enter jobs.
        stall_s: after which a job counts as one that will never end.
        """
        self.counters = HostCounters()
        self._blob_bytes = blob_bytes
        self._timeline = timeline
        self._stall_s = stall_s
        self._last: HostJob | None = None
        self._worker = _Worker(compute)
        self._finalizer = weakref.finalize(self, self._worker.stop)
        self._finalizer.atexit = False  # the thread is joined too, see _close_all

    def start(self, layer: int, x_TD: Tokens, rows_R: np.ndarray, ids_R: np.ndarray) -> HostJob:
        """Begins a job; see ``Compute`` for the arguments.

        Raises:
          ComputeError: an earlier one has come to a halt, or this is closed.
        """
        self._worker.check_open()
        self.settle()
        job = self._last = HostJob(layer, x_TD, rows_R, ids_R)
        self._worker.jobs.put(job)
        return job

    def wait(self, job: HostJob) -> np.ndarray:
        """The result of a job, float32 [R, D].

        Raises:
          ComputeError: it failed, came to a halt, or was given up because this was closed.
        """
        self._await(job)
        self._last = None
        if job.error is not None:
            self._worker.check_open()
            raise _explained(job)
        assert job.y_RD is not None
        counters = self.counters
        counters.experts += len(job.experts)
        counters.rows += int(np.count_nonzero(job.ids_R >= 0))
        counters.bytes += len(job.experts) * self._blob_bytes
        counters.busy_s += job.seconds
        if self._timeline is not None:
            end_s = self._worker.ended_s
            self._timeline.span(
                "host", "experts", end_s - job.seconds, end_s, layer=job.layer, experts=job.experts
            )
        return job.y_RD

    def settle(self) -> None:
        """Waits for the end of a job that nobody waits for any more (ComputeError)."""
        if self._last is not None:
            self._await(self._last)
            self._last = None

    def close(self) -> None:
        """Ends the thread, within a second. From any thread; a second call does nothing."""
        self._worker.stop()
        self._worker.join()

    def _await(self, job: HostJob) -> None:
        if not job.done.acquire(timeout=self._stall_s):
            self._worker.check_open()
            raise ComputeError(
                "computing experts on the host has come to a halt",
                where=job.name,
                got=f"nothing within {self._stall_s:g} s",
                do="look at the machine's load and memory; --misses=load computes all experts on "
                "the device",
            )
        job.done.release()  # who waits again gets it again


class ThrottledCompute:
    """A slower host than there is: for tests, and to study a machine on another one.

    Every expert of a job takes at least the time in which its bytes are read at this speed.
    """

    def __init__(self, inner: Compute, blob_bytes: int, bytes_per_s: float):
        self._inner = inner
        self._expert_s = blob_bytes / bytes_per_s

    def __call__(
        self, layer: int, x_TD: Tokens, rows_R: np.ndarray, ids_R: np.ndarray, /
    ) -> np.ndarray:
        due_s = time.perf_counter() + self._expert_s * len(np.unique(ids_R[ids_R >= 0]))
        y_RD = self._inner(layer, x_TD, rows_R, ids_R)
        time.sleep(max(0.0, due_s - time.perf_counter()))
        return y_RD


class _Worker:
    """The thread and what it shares with its owner, to whom it does not refer."""

    def __init__(self, compute: Compute):
        self.jobs: queue.SimpleQueue[HostJob | None] = queue.SimpleQueue()
        self.closed = False
        self.ended_s = 0.0  # of the last job
        self._compute = compute
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        _live_workers.add(self)
        self._thread.start()

    def check_open(self) -> None:
        if self.closed:
            raise ComputeError(CLOSED)

    def stop(self) -> None:
        """Lets the thread end. Takes no lock: a finalizer may call it, on any thread."""
        self.closed = True
        self.jobs.put(None)

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            start_s = time.perf_counter()
            try:
                if self.closed:
                    raise ComputeError(CLOSED)
                assert job.x_TD is not None
                job.y_RD = self._compute(job.layer, job.x_TD, job.rows_R, job.ids_R)
            except Exception as error:
                job.error = error
            self.ended_s = time.perf_counter()
            job.seconds = self.ended_s - start_s
            job.x_TD = None
            job.done.release()
            del job  # or its arrays would live until the next one


def _explained(job: HostJob) -> JmoeError:
    error = job.error
    assert error is not None
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, JmoeError):
        return error
    placed = ComputeError(
        "computing experts on the host failed",
        where=job.name,
        got=f"{type(error).__name__}: {error}",
        do="--misses=load computes all experts on the device",
    )
    placed.__cause__ = error
    return placed


_live_workers: "weakref.WeakSet[_Worker]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Before JAX takes its backends down, which it registered earlier.
    workers = list(_live_workers)
    for worker in workers:
        with contextlib.suppress(Exception):
            worker.stop()
    for worker in workers:
        worker.join()
