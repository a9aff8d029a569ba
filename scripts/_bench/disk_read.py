"""How fast experts come from a disk, by the way in which they are asked for."""

import concurrent.futures
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from _bench.disk_subject import DiskSubject, random_blobs
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.errors import RequestError
from jmoe.store import page_cache
from jmoe.store.host_memory import allocate
from jmoe.store.mapped_experts import MappedExperts
from jmoe.store.reading_queue import PIECE_BYTES

_MAX_BYTES = 256 << 20  # of experts in one repetition
_DIRECT_BYTES = 4 << 20  # of a block
_NUM_THREADS = 4

_Row = dict[str, Any]
_Read = Callable[[Sequence[np.ndarray]], object]


class _Reading(NamedTuple):
    bytes_per_s: float
    read_over_needed: float | None


def measure(subject: DiskSubject, settings: Settings, report: Report) -> list[_Row]:
    """Reads random experts that are not in memory, in each way."""
    left_alone, exactly = subject.mapped(), subject.mapped()
    subject.drop()
    exactly.read_exactly()
    number = max(1, min(subject.num_experts, _MAX_BYTES // subject.expert_bytes))
    ways: dict[str, tuple[MappedExperts, _Read]] = {
        "touched, system left alone": (left_alone, _one_by_one(page_cache.populate)),
        "touched, exact": (exactly, _one_by_one(exactly.read)),
        f"touched, exact, {_NUM_THREADS} threads": (exactly, _in_pieces(exactly.read)),
        "asked for, then touched": (left_alone, _one_by_one(_ask_and_touch)),
    }
    contestants: dict[str, Callable[[], _Reading]] = {
        name: lambda experts=experts, read=read: _timed(subject, experts, read, number)
        for name, (experts, read) in ways.items()
    }
    for threads in (1, _NUM_THREADS):
        name = f"past the page cache, {threads} thread{'s' * (threads > 1)}"
        contestants[name] = lambda threads=threads: _direct(subject, threads)
    results, neighbours_share = watch_turns("read", contestants, settings)
    rows = []
    for name, readings in results.items():
        shares = [r.read_over_needed for r in readings if r.read_over_needed is not None]
        row = {
            "test": "read",
            "what": name,
            "bytes_per_s": summarize([reading.bytes_per_s for reading in readings]).to_json(),
            "read_over_needed": summarize(shares).to_json() if shares else None,
            "neighbours_cpu_share": neighbours_share,
        }
        rows.append(row)
        report.table({title: cell(row) for title, cell in _COLUMNS.items()})
    return rows


def best_bytes_per_s(rows: Sequence[_Row]) -> float:
    """What the disk gives at most, in whatever way."""
    return max(row["bytes_per_s"]["median"] for row in rows)


def _timed(subject: DiskSubject, experts: MappedExperts, read: _Read, number: int) -> _Reading:
    subject.drop()
    blobs = random_blobs(experts, number)
    num_bytes = sum(blob.nbytes for blob in blobs)
    before = page_cache.read_bytes_so_far()
    start = time.perf_counter()
    read(blobs)
    seconds = time.perf_counter() - start
    after = page_cache.read_bytes_so_far()
    share = None if before is None or after is None else (after - before) / num_bytes
    return _Reading(num_bytes / seconds, share)


def _one_by_one(read: Callable[[np.ndarray], object]) -> _Read:
    def read_all(blobs: Sequence[np.ndarray]) -> None:
        for blob in blobs:
            read(blob)

    return read_all


def _in_pieces(read: Callable[[np.ndarray], object]) -> _Read:
    def read_all(blobs: Sequence[np.ndarray]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(read, _pieces(blobs)))

    return read_all


def _pieces(blobs: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for blob in blobs:
        for start in range(0, blob.nbytes, PIECE_BYTES):
            yield blob[start : start + PIECE_BYTES]


def _ask_and_touch(blob: np.ndarray) -> None:
    page_cache.request(blob)
    page_cache.populate(blob)


def _direct(subject: DiskSubject, num_threads: int) -> _Reading:
    """Blocks at random places of the files, into huge pages."""
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in subject.paths]
    try:
        blocks = [
            (file, start)
            for file in files
            for start in range(0, os.fstat(file).st_size - _DIRECT_BYTES + 1, _DIRECT_BYTES)
        ]
        if not blocks:
            raise RequestError(
                "the experts are too small to measure a disk", do="give a larger --expert_times"
            )
        number = max(1, min(len(blocks), _MAX_BYTES // _DIRECT_BYTES))
        chosen = np.random.default_rng().permutation(len(blocks))[:number]
        parts = [[blocks[i] for i in chosen[first::num_threads]] for first in range(num_threads)]
        buffers = [allocate(_DIRECT_BYTES) for _ in range(num_threads)]

        def read(part: Sequence[tuple[int, int]], buffer: np.ndarray) -> None:
            for file, start in part:
                os.preadv(file, [buffer.data], start)

        for buffer in buffers:
            buffer[:: mmap.PAGESIZE] = 1
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read, parts, buffers))
        seconds = time.perf_counter() - start
    except OSError as error:
        raise RequestError(
            "the files cannot be read past the page cache",
            got=error.strerror,
            do="put the store on a disk (TMPDIR, or --model)",
        ) from None
    finally:
        for file in files:
            os.close(file)
    return _Reading(number * _DIRECT_BYTES / seconds, None)


_COLUMNS: dict[str, Callable[[_Row], str]] = {
    "experts                       ": lambda row: row["what"],
    "GB/s": lambda row: f"{row['bytes_per_s']['median'] / 1e9:.2f}",
    "  min - max": lambda row: (
        f"{row['bytes_per_s']['min'] / 1e9:.2f} - {row['bytes_per_s']['max'] / 1e9:.2f}"
    ),
    "read/needed": lambda row: (
        "" if row["read_over_needed"] is None else f"{row['read_over_needed']['median']:.2f}"
    ),
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}
