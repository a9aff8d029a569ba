"""One copy of one expert: what is asked for, what came of it, and the error of one that failed."""

import threading
import time
import traceback
from typing import Literal, NamedTuple

import jax

from jmoe.errors import JmoeError, TransferError
from jmoe.residency.eviction import ExpertKey

TransferKind = Literal["demand", "prefetch"]


class Transfer(NamedTuple):
    """A copy that has arrived. Times are those of ``time.perf_counter``.

    Attributes:
      key: the expert.
      kind: "demand" if it was needed at once when the copy started, else "prefetch".
      queued_s: when it was asked for first.
      started_s: when the copy was started; it may have waited for others on the link after that.
      finished_s: when it was seen to have arrived.
      num_bytes: of the blob.
      wanted: False if it was cancelled while it was under way.
    """

    key: ExpertKey
    kind: TransferKind
    queued_s: float
    started_s: float
    finished_s: float
    num_bytes: int
    wanted: bool


class Job:
    """One copy of one expert. ``arrived`` is released once, when ``done`` is set."""

    __slots__ = (
        "array",
        "arrived",
        "done",
        "error",
        "handed_over",
        "key",
        "kind",
        "num_bytes",
        "queued_s",
        "started",
        "started_s",
    )

    def __init__(self, key: ExpertKey, kind: TransferKind):
        self.key = key
        self.kind: TransferKind = kind
        self.queued_s = time.perf_counter()
        self.started_s = 0.0
        self.num_bytes = 0
        self.started = False
        self.done = False  # may be waited for without blocking
        self.handed_over = False
        self.array: jax.Array | None = None
        self.error: Exception | None = None
        self.arrived = threading.Lock()
        self.arrived.acquire()

    def publish(self) -> None:
        if not self.done:
            self.done = True
            self.arrived.release()


def name_of(key: ExpertKey) -> str:
    return f"layer {key.layer}, expert {key.expert}"


def explained(error: Exception, key: ExpertKey) -> JmoeError:
    """The error for the user, saying which expert it is about."""
    where = name_of(key)
    if isinstance(error, JmoeError):
        placed = type(error)(
            error.what,
            where=where if error.where is None else f"{where}; {error.where}",
            got=error.got,
            expected=error.expected,
            do=error.do,
        )
    else:
        placed = TransferError(
            "copying an expert to the device failed",
            where=where,
            got=f"{type(error).__name__}: {error}",
        )
    placed.__cause__ = error
    # Memory that was to be copied to would otherwise live as long as the error.
    traceback.clear_frames(error.__traceback__)
    return placed
