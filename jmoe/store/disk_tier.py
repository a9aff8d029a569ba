"""Experts that do not all fit into memory: mapped, read ahead, and the most used ones locked.

The system's page cache holds what is in memory. This decides what is read when, and what is not
dropped, and counts what it costs. Nothing here changes a result: the bytes are those of the files.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from jmoe.metrics import DiskStats, DiskTraffic
from jmoe.store import page_cache
from jmoe.store.host_memory import FileRange, format_size
from jmoe.store.locked_experts import LockedExperts
from jmoe.store.mapped_experts import MappedExperts
from jmoe.store.read_ahead import NUM_THREADS, ReadAhead
from jmoe.store.reading_queue import AheadCounters, BlobKey

# Of the memory that is free once the model is loaded. The rest is for experts that come and go, and
# for what the process still needs: locked pages are lost to it.
LOCKED_SHARE = 0.75
# Experts that must have room besides: some that are predicted, and some that are used.
_MIN_AHEAD, _MIN_USED = 4, 2
_MIN_UNLOCKED = _MIN_AHEAD + _MIN_USED


@dataclasses.dataclass(slots=True)
class _Reads:
    """What happened to experts whose bytes were asked for."""

    is_told: bool  # which of them were in memory
    needed: int = 0
    waited_for: int = 0
    missing_bytes: int = 0
    waited_s: float = 0.0


class DiskCounts:
    """Counters at one moment; the difference of two is a ``DiskTraffic``."""

    def __init__(self, reads: _Reads, ahead: AheadCounters, read_bytes: int | None):
        self._reads, self._ahead, self._read_bytes = reads, ahead, read_bytes

    def __sub__(self, earlier: "DiskCounts") -> DiskTraffic:
        reads, before = self._reads, earlier._reads
        ahead = self._ahead - earlier._ahead
        read_bytes = None
        if self._read_bytes is not None and earlier._read_bytes is not None:
            read_bytes = self._read_bytes - earlier._read_bytes
        return DiskTraffic(
            read_bytes=read_bytes,
            needed=reads.needed - before.needed,
            waited_for=reads.waited_for - before.waited_for if reads.is_told else None,
            missing_bytes=reads.missing_bytes - before.missing_bytes,
            waited_s=reads.waited_s - before.waited_s,
            read_ahead=ahead.begun,
            useful=ahead.useful,
            late=ahead.late,
            useless=ahead.useless,
        )


class DiskTier:
    """Brings the bytes of experts into memory, ahead of time where it is told.

    ``demand`` to ``settle`` are hints, and belong to one thread. ``read`` gives the bytes, to any.

    Attributes:
      experts: where they are.
      bytes_per_s: at which the disk gave experts when this was made; None if nothing was missing.
      is_larger: they do not all fit into memory.
      notes: what was decided and what a miss costs, a sentence each.
    """

    def __init__(
        self,
        layers: Sequence[np.ndarray],
        files: Sequence[FileRange],
        *,
        available_bytes: int,
        is_larger: bool,
        has_hints: bool = True,
        read_ahead: bool = True,
    ):
        """Looks at what the disk gives, which takes a third of a second at most; starts threads.

        Args:
          layers: by layer uint8 [num_experts, bytes of a blob], mapped.
          files: where they are.
          available_bytes: free memory.
          is_larger: whether they do not all fit into that.
          has_hints: whether somebody will say what is needed, predicted or popular.
          read_ahead: whether to read what is predicted.
        """
        self.experts = experts = MappedExperts(layers, files)
        self.is_larger = is_larger
        self._reads = _Reads(experts.is_told)
        self._guard = threading.Lock()  # of _reads and _locked
        self._locked = LockedExperts(experts.lock, experts.unlock, 0)
        self._ahead: ReadAhead | None = None
        self.bytes_per_s: float | None = None
        self.notes: list[str] = []
        if is_larger:
            experts.read_exactly()
        self._measure(available_bytes)
        self._predicts = read_ahead and experts.is_told
        if has_hints:
            # Of what is not locked, one half for what is predicted, one for what is used.
            half_bytes = int((1 - LOCKED_SHARE) / 2 * available_bytes)
            self._ahead = ReadAhead(
                experts.blob,
                experts.read,
                experts.missing_bytes,
                max_ahead_bytes=max(_MIN_AHEAD * experts.blob_bytes, half_bytes),
            )
        self.notes.append(self._describe_reading(read_ahead))

    @property
    def reads_ahead(self) -> bool:
        """Whether predicted experts are read."""
        return self._ahead is not None and self._predicts

    def read(self, key: BlobKey) -> np.ndarray:
        """The bytes of an expert, uint8 [blob_bytes]; waits until they are in memory.

        What cannot be read is left to whoever touches it.
        """
        experts = self.experts
        blob = experts.blob(key)
        missing_bytes = experts.missing_bytes(blob)
        if self._ahead is not None:
            self._ahead.use(key)
        start = time.perf_counter()
        experts.read(blob)
        seconds = time.perf_counter() - start
        with self._guard:
            reads = self._reads
            reads.needed += 1
            reads.waited_for += missing_bytes > 0
            reads.missing_bytes += missing_bytes
            reads.waited_s += seconds
            is_new = self._locked.note_use(key)
        if is_new:
            experts.read(blob)  # all of it is there, but only what is used again is locked
        return blob

    def demand(self, keys: Collection[BlobKey]) -> None:
        """Says that these will be read now, in this order."""
        if self._ahead is not None and keys:
            self._ahead.demand(keys)

    def predict(self, keys: Collection[BlobKey]) -> None:
        """Says that these may be read soon, the likeliest first."""
        if self._ahead is not None and self._predicts and keys:
            self._ahead.predict(keys)

    def pass_layer(self, layer: int) -> None:
        """Says that all of a layer that is needed now was demanded."""
        if self._ahead is not None:
            self._ahead.pass_layer(layer)

    def settle(self) -> None:
        """Ends a batch, or begins one: lets go of locked experts if memory became scarce."""
        if self._ahead is not None:
            self._ahead.settle()
        with self._guard:
            self._locked.give_back()

    def is_ready(self, key: BlobKey) -> bool:
        """Whether ``read`` would not wait, or waiting would not help: nothing is read ahead."""
        return self._ahead is None or not self._predicts or self._ahead.is_ready(key)

    def on_ready(self, call: Callable[[], object]) -> None:
        """Has a method called, on another thread, when ``is_ready`` may have changed."""
        if self._ahead is not None:
            self._ahead.on_ready(call)

    def lock_most_used(
        self,
        available: Callable[[], int],
        shares: Iterable[tuple[BlobKey, float]] = (),
        *,
        reserve_bytes: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        """Keeps the experts in memory whose bytes are asked for most, from now on.

        Args:
          available: says how much memory is free.
          shares: of tokens that used each expert in recorded runs, to begin with; without them all
            is learnt.
          reserve_bytes: that are free now and will be in use.
          max_bytes: to lock; None is LOCKED_SHARE of what is left.
        """
        experts, size = self.experts, self.experts.blob_bytes
        available_bytes = max(0, available() - reserve_bytes)
        room_bytes = available_bytes - _MIN_UNLOCKED * size
        free = format_size(available_bytes)
        if max_bytes is None:
            max_bytes = int(LOCKED_SHARE * available_bytes)
            limit = f"{LOCKED_SHARE:.0%} of the {free} that are free"
        else:
            limit = f"{format_size(max_bytes)} asked for"
        if room_bytes < max_bytes:
            limit = f"{free} are free, less {_MIN_UNLOCKED} experts that come and go"
        allowed, refusal = self._try_locking(max(0, min(max_bytes, room_bytes)) // size)
        # What else needs memory may grow into half of the rest.
        least_bytes = max(_MIN_USED * size, (available_bytes - allowed * size) // 2)
        with self._guard:
            self._locked = LockedExperts(
                experts.lock, experts.unlock, allowed, lambda: available() >= least_bytes
            )
            popular = self._locked.start_with(shares)
        if self._ahead is not None:
            self._ahead.wish(popular)
        if refusal is not None:
            limit = f"the system refuses more: {refusal}; ulimit -l says what it allows"
        what = "nothing is"
        if allowed:
            learnt = "first those of the recorded routing" if popular else "as that is learnt"
            what = f"the {allowed} of {len(list(experts.keys))} most used experts are, {learnt},"
        self.notes.append(f"disk: {what} locked in memory ({limit})")

    def counts(self) -> DiskCounts:
        """Counters so far; the difference of two is a ``DiskTraffic``."""
        with self._guard:
            reads = dataclasses.replace(self._reads)
        ahead = self._ahead.counters if self._ahead is not None else AheadCounters()
        return DiskCounts(reads, ahead, page_cache.read_bytes_so_far())

    def stats(self, prefill: DiskTraffic, decode: DiskTraffic) -> DiskStats:
        with self._guard:
            num_locked = len(self._locked.keys)
        return DiskStats(
            prefill=prefill,
            decode=decode,
            expert_bytes=self.experts.blob_bytes,
            locked_experts=num_locked,
            locked_bytes=num_locked * self.experts.blob_bytes,
            bytes_per_s=self.bytes_per_s,
        )

    def close(self) -> None:
        """Ends the threads, and lets go of locked pages; may be called again."""
        if self._ahead is not None:
            self._ahead.close()
        with self._guard:
            self._locked.clear()
            self.experts.unlock_all()

    def _try_locking(self, num_experts: int) -> tuple[int, str | None]:
        """How many experts the system lets be locked at once, and why no more; locks none."""
        refusal, locked = None, []
        for key, _ in zip(self.experts.keys, range(num_experts), strict=False):
            if (refusal := self.experts.lock(key)) is not None:
                break
            locked.append(key)
        self.experts.unlock_all()
        return len(locked), refusal

    def _measure(self, available_bytes: int) -> None:
        experts = self.experts
        room = f"{format_size(experts.num_bytes)} of experts are mapped, and "
        room += f"{format_size(available_bytes)} of memory are free"
        speed = experts.measure(NUM_THREADS)
        if speed is None:
            self.notes.append(f"disk: {room}; nothing is missing now, so its speed is not known")
            return
        self.bytes_per_s = speed.bytes_per_s
        self.notes.append(
            f"disk: {room}; an expert that is missing takes "
            f"{1e3 * experts.blob_bytes / speed.bytes_per_s:.3g} ms, "
            f"{format_size(experts.blob_bytes)} at {speed.bytes_per_s / 1e9:.2f} GB/s "
            f"(measured on {speed.num_experts})"
        )

    def _describe_reading(self, wanted: bool) -> str:
        if self._ahead is None:
            return "disk: nothing is read ahead; experts are read when they are touched"
        threads = f"by {NUM_THREADS} threads"
        if self._predicts:
            return f"disk: predicted experts are read ahead, {threads}"
        if wanted:
            return (
                f"disk: experts are read when they are needed, {threads}; none ahead, as the "
                "system does not say which pages of files of another user are in memory"
            )
        return f"disk: experts are read when they are needed, {threads}; none ahead"
