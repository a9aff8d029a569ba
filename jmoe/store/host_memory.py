"""Host memory for large read-only data: pages of the file itself, or memory filled from it.

A mapped file needs no loading and no memory of its own: the system keeps what is used and drops
it when it needs the room, so a model may be larger than memory. Memory of our own is never
dropped, and its pages are huge (2 MiB), which costs the processor less to look up.

The arrays own their memory: it is given back with the last view of it.
"""

import concurrent.futures
import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jmoe.errors import CapacityError, CheckpointError, ConfigError
from jmoe.store.reading import OnBytes, ignore_bytes, read_range, too_short

HostMemory = Literal["mmap", "ram"]
HOST_MEMORY_CHOICES = ("auto", "mmap", "ram")

HUGE_PAGE_BYTES = 1 << 21
_PIECE_BYTES = 1 << 24  # what one thread reads at a time; an interrupt waits for this much
_MAX_THREADS = 8
_COPY_AGAIN = "copy the file again"
_MARGIN_BYTES = 1 << 30  # what the rest of the process may need, beside a tenth of free memory


class FileRange(NamedTuple):
    path: Path
    offset: int
    num_bytes: int


def check_choice(requested: str) -> None:
    """Raises ConfigError unless this is one of HOST_MEMORY_CHOICES."""
    if requested not in HOST_MEMORY_CHOICES:
        raise ConfigError(
            "unknown kind of host memory",
            got=repr(requested),
            expected=f"one of {', '.join(HOST_MEMORY_CHOICES)}",
        )


def choose_host_memory(
    num_bytes: int, requested: str, available_bytes: int
) -> tuple[HostMemory, str]:
    """Decides between mapped files and memory of our own.

    What the files lie on, and whether they are in the page cache, plays no part: pages of a
    file can be dropped, and then an expert comes from the disk.

    Args:
      num_bytes: to hold.
      requested: "auto", "mmap" or "ram".
      available_bytes: free memory.

    Returns:
      The kind, and the reason for it: a clause to show to the user.

    Raises:
      ConfigError: no such request.
      CapacityError: "ram" was asked for and does not fit.
    """
    check_choice(requested)
    sizes = f"{format_size(num_bytes)} of experts, {format_size(available_bytes)} of memory free"
    if requested == "mmap":
        return "mmap", "as asked for"
    if requested == "ram":
        if num_bytes > available_bytes:
            raise CapacityError(
                "the experts do not fit into host memory",
                got=f"{format_size(available_bytes)} available",
                expected=format_size(num_bytes),
                do="use --host_memory=mmap, or convert to fewer bits",
            )
        return "ram", "as asked for"
    if num_bytes + _MARGIN_BYTES <= 0.9 * available_bytes:
        return "ram", sizes
    return "mmap", f"{sizes}, too little to hold them with a margin"


def map_file(part: FileRange) -> np.ndarray:
    """Part of a file as a read-only uint8 array, read when it is touched.

    The file must not be shortened while the array lives: touching what is gone ends the process
    (SIGBUS). Replacing the file by another is harmless.

    Raises:
      CheckpointError: the file cannot be mapped, or is shorter than the range.
    """
    try:
        with open(part.path, "rb") as file:
            end = part.offset + part.num_bytes
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes < end:
                raise too_short(part.path, num_bytes, end, _COPY_AGAIN)
            # From the start of the file: an offset must be a multiple of the system's pages,
            # which may be larger than those that the file was aligned for.
            mapped = mmap.mmap(file.fileno(), end, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{part.path.name} cannot be mapped into memory",
            where=part.path.parent,
            got=getattr(error, "strerror", None) or error,
            do="copy it to another file system, or use --host_memory=ram if there is room for it",
        ) from None
    # No other advice: to read ahead is what the system does by itself, and reading everything
    # at once, or dropping what was read, is what a mapped file is chosen to avoid.
    _advise_huge_pages(mapped)
    return np.frombuffer(mapped, np.uint8, part.num_bytes, part.offset)


def allocate(num_bytes: int) -> np.ndarray:
    """Zeroed uint8 memory in huge pages where the system has them, starting at one.

    Raises:
      CapacityError: the system refuses.
    """
    try:
        # One huge page more, as the system may start anywhere; what is not touched costs nothing.
        mapped = mmap.mmap(
            -1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except (OSError, ValueError, MemoryError) as error:
        raise CapacityError(
            "the system gives no more memory",
            got=getattr(error, "strerror", None) or error,
            expected=format_size(num_bytes),
            do="use --host_memory=mmap",
        ) from None
    _advise_huge_pages(mapped)
    memory = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]


def read_files(
    parts: Sequence[tuple[FileRange, np.ndarray]],
    on_bytes: OnBytes = ignore_bytes,
) -> None:
    """Fills arrays from files, several pieces at a time.

    Args:
      parts: where to read from, and a C-contiguous array of as many bytes.
      on_bytes: told the size of every piece that has been read, in the calling thread.

    Raises:
      CheckpointError: a file is shorter than a range, or cannot be read.
    """
    pieces = []
    for source, array in parts:
        flat = array.reshape(-1).view(np.uint8)
        assert flat.size == source.num_bytes and np.shares_memory(flat, array)
        for start in range(0, source.num_bytes, _PIECE_BYTES):
            piece = flat[start : start + _PIECE_BYTES]
            pieces.append((FileRange(source.path, source.offset + start, piece.size), piece))
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(pieces))
    if num_threads <= 1:
        for source, piece in pieces:
            on_bytes(_read_piece(source, piece))
        return
    pool = concurrent.futures.ThreadPoolExecutor(num_threads, "jmoe-read")
    try:
        futures = [pool.submit(_read_piece, source, piece) for source, piece in pieces]
        for future in concurrent.futures.as_completed(futures):
            on_bytes(future.result())
    finally:  # also after an error or Ctrl-C: nobody may still write when this has returned
        pool.shutdown(cancel_futures=True)


def _read_piece(source: FileRange, destination: np.ndarray) -> int:
    read_range(source.path, source.offset, destination.data, do=_COPY_AGAIN)
    return source.num_bytes


def _advise_huge_pages(mapped: mmap.mmap) -> None:
    # Not in every kernel, and for files not on every file system: it is advice only.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)


def format_size(num_bytes: int) -> str:
    """In GiB or MiB."""
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"
