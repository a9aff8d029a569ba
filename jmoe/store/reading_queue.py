"""In which order experts are read ahead, and what became of each; without threads and locks.

What is needed now goes first, in the order in which it was asked for. Then what may be needed soon,
the newest prediction first: it is the better the later it was made. Then wishes.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, NamedTuple, Self

BlobKey = tuple[int, int]  # layer, expert

PIECE_BYTES = 1 << 21  # which a disk reads in about a millisecond


@dataclasses.dataclass(slots=True)
class AheadCounters:
    """What became of predicted experts that were not all in memory. Each is counted once."""

    begun: int = 0  # to be read
    useful: int = 0  # in memory when their bytes were asked for
    late: int = 0  # asked for while they were being read
    useless: int = 0  # not asked for

    def __sub__(self, earlier: Self) -> Self:
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(*(getattr(self, name) - getattr(earlier, name) for name in names))


class Work(NamedTuple):
    """What a thread is to do next.

    Attributes:
      job: whose bytes.
      start: first of them.
      num_bytes: to read; 0 is to find out whether any is missing at all.
    """

    job: "Job"
    start: int
    num_bytes: int


class Job:
    """An expert that is to be read.

    Attributes:
      stage: "new"; "checked", while somebody finds out whether something is missing; "reading",
        piece by piece; "there", when all of it is in memory, or could not be read.
      begun: of a prediction: something was missing.
      used: somebody reads the bytes, and will drop what they take of memory.
    """

    __slots__ = ("_done_bytes", "_taken_bytes", "begun", "key", "num_bytes", "stage", "used")

    def __init__(self, key: BlobKey, num_bytes: int):
        self.key = key
        self.num_bytes = num_bytes
        self.stage: Literal["new", "checked", "reading", "there"] = "new"
        self.begun = self.used = False
        self._taken_bytes = self._done_bytes = 0

    @property
    def has_pieces(self) -> bool:
        """Whether there is something for a thread to do."""
        return self.stage == "new" or (
            self.stage == "reading" and self._taken_bytes < self.num_bytes
        )

    @property
    def holds_room(self) -> bool:
        """Whether it has been read for later, in whole or in part, or is about to be."""
        if self.used:
            return False
        return self._taken_bytes > 0 or self.begun or self.stage == "checked"

    def take(self) -> Work:
        start = self._taken_bytes
        self._taken_bytes = min(start + PIECE_BYTES, self.num_bytes)
        return Work(self, start, self._taken_bytes - start)

    def finish(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._done_bytes == self.num_bytes:
            self.stage = "there"


class ReadingQueue:
    """Experts to be read, by key.

    A demand is forgotten when it has been read and used, a prediction when it is demanded, used or
    given up. Invariants: a key is among the demands or the predictions, not both. At most
    ``max_queued`` predictions are new. What was read and not used yet has at most
    ``max_ahead_bytes``, or is one expert; besides there may be the most urgent demand.

    Attributes:
      counters: of predictions.
    """

    def __init__(
        self,
        num_bytes: Callable[[BlobKey], int],
        max_queued: int,
        max_ahead_bytes: int,
    ):
        self.counters = AheadCounters()
        self._num_bytes = num_bytes
        self._max_queued = max_queued
        self._max_ahead_bytes = max_ahead_bytes
        self._demands: dict[BlobKey, Job] = {}
        self._predictions: dict[BlobKey, Job] = {}  # the least urgent first
        self._wishes: collections.deque[BlobKey] = collections.deque()
        self._wish: Job | None = None  # that is being read

    @property
    def num_predicted(self) -> int:
        """Predictions that are neither needed nor given up."""
        return len(self._predictions)

    def demand(self, key: BlobKey) -> None:
        job = self._predictions.pop(key, None)
        if job is None:
            old = self._demands.get(key)
            if old is None or old.stage == "there":  # its bytes may have gone
                self._demands.pop(key, None)
                self._demands[key] = self._reading(key)
            return
        if job.begun:
            self.counters.useful += job.stage == "there"
            self.counters.late += job.stage != "there"
        if job.stage in ("new", "checked"):
            job = self._reading(key)  # the check, if there is one, is nobody's any more
        self._demands[key] = job

    def predict(self, keys: Collection[BlobKey]) -> None:
        """Adds predictions, or renews them; the likeliest first."""
        for key in reversed(list(dict.fromkeys(keys))):
            if key not in self._demands:
                job = self._predictions.pop(key, None) or Job(key, self._num_bytes(key))
                self._predictions[key] = job
        new = [job.key for job in self._predictions.values() if job.stage == "new"]
        for key in new[: max(0, len(new) - self._max_queued)]:
            self.give_up(key)

    def use(self, key: BlobKey) -> None:
        """Says that the bytes of an expert are being used: reading it goes on, if it has begun."""
        if key in self._predictions:
            self.demand(key)
        job = self._demands.get(key)
        if job is not None:
            job.used = True
            if job.stage == "there":
                del self._demands[key]

    def wish(self, keys: Iterable[BlobKey]) -> None:
        """Replaces all wishes."""
        self._wishes = collections.deque(keys)

    def give_up(self, key: BlobKey) -> None:
        self.counters.useless += self._predictions.pop(key).begun

    def pass_layer(self, layer: int) -> None:
        """Gives up what else was predicted for a layer, and what was read for others in vain."""
        for key in [key for key in self._predictions if key[0] == layer]:
            self.give_up(key)
        for key, job in list(self._demands.items()):
            if key[0] != layer and job.stage == "there":
                del self._demands[key]

    def clear(self) -> None:
        """Forgets all but wishes."""
        for key in list(self._predictions):
            self.give_up(key)
        self._demands.clear()

    def job(self, key: BlobKey) -> Job | None:
        """Of an expert that is needed or predicted."""
        return self._predictions.get(key) or self._demands.get(key)

    def take(self) -> Work | None:
        """The next thing to do; ``checked`` or ``finished`` has to follow."""
        for job in self._order():
            if job.has_pieces:
                if job.stage == "new":
                    job.stage = "checked"
                    return Work(job, 0, 0)
                return job.take()
        return None

    def checked(self, job: Job, is_missing: bool) -> None:
        """Says whether something of an expert is missing."""
        if self._predictions.get(job.key) is not job:
            return  # needed by now, or given up
        job.stage = "reading" if is_missing else "there"
        if is_missing:
            job.begun = True
            self.counters.begun += 1

    def finished(self, work: Work) -> bool:
        """Says that a piece has been read; returns whether an expert that is wanted is there."""
        job = work.job
        job.finish(work.num_bytes)
        if job.stage != "there":
            return False
        if self._demands.get(job.key) is job:
            if job.used:
                del self._demands[job.key]
            return True
        return self._predictions.get(job.key) is job

    def _order(self) -> Iterator[Job]:
        demands, predictions = self._demands.values(), self._predictions.values()
        held = [job.num_bytes for job in (*demands, *predictions) if job.holds_room]
        room = self._max_ahead_bytes - sum(held)
        first = next((job for job in demands if not job.used), None)
        for job in demands:
            if job is first or job.used or job.holds_room or job.num_bytes <= room:
                yield job
        for job in reversed(predictions):
            if job.holds_room or not held or job.num_bytes <= room:
                yield job
        if self._wish is None or not self._wish.has_pieces:
            self._wish = self._reading(self._wishes.popleft()) if self._wishes else None
        if self._wish is not None:
            yield self._wish

    def _reading(self, key: BlobKey) -> Job:
        """Of which something is missing, or probably: that makes no difference."""
        job = Job(key, self._num_bytes(key))
        job.stage = "reading"
        return job
