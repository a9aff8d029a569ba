"""The pages of a mapped file: which are in memory, reading them, and keeping them there.

Views of the mapping say which pages are meant: those that they touch. Nothing here touches the
memory itself, so a failing disk is met by whoever reads the bytes, not here. Calls block without
the GIL. Source: mincore(2), madvise(2), mlock2(2), proc_pid_io(5).
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 1 << 21
LARGE_WINDOW_BYTES = 2 * HUGE_PAGE_BYTES
# What one request for reading ahead covers: the system cuts longer ones off, silently, at the
# larger of the device's request size and its own read-ahead.
_REQUEST_BYTES = 1 << 20

_MADV_POPULATE_READ = 22  # since Linux 5.14; not in every Python
_MLOCK_ONFAULT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_RANGE = (ctypes.c_void_p, ctypes.c_size_t)


def missing_bytes(view: np.ndarray) -> int:
    """Bytes of the pages of a view that are not in memory; all of them if nobody can say."""
    start, length = _pages(view)
    in_memory = np.zeros(length // PAGE_BYTES, np.uint8)
    if _call("mincore", start, length, ctypes.c_void_p(in_memory.ctypes.data)):
        return length
    return PAGE_BYTES * int(np.count_nonzero(in_memory & 1 == 0))


def is_told(path: Path) -> bool:
    """Whether the system says which pages of a file are in memory.

    It does to those who own the file or may write it. Others hear that all are.
    """
    try:
        return os.stat(path).st_uid == os.geteuid() or os.access(path, os.W_OK)
    except OSError:
        return False


def populate(view: np.ndarray) -> bool:
    """Reads the pages of a view, and maps them; returns whether that worked."""
    return not _call("madvise", *_pages(view), ctypes.c_int(_MADV_POPULATE_READ))


def request(view: np.ndarray) -> None:
    """Lets the system begin to read exactly the pages of a view, and does not wait for them."""
    start, length = _pages(view)
    for first in range(0, length, _REQUEST_BYTES):
        part = min(_REQUEST_BYTES, length - first)
        _call("madvise", start + first, part, ctypes.c_int(mmap.MADV_WILLNEED))


def reads_large(window: np.ndarray) -> bool:
    """Whether the system can read 2 MiB at a time where a byte is missing, and nothing else.

    It does in huge pages with random access, if it has huge pages for files. Without them it reads
    page by page then, thirty times slower: so it is tried.

    Args:
      window: 4 MiB of a mapping for which huge pages were asked for, nothing of it in memory.
    """
    assert window.nbytes == LARGE_WINDOW_BYTES
    advise_random(window)
    populate(window[HUGE_PAGE_BYTES : HUGE_PAGE_BYTES + 1])
    found_bytes = window.nbytes - missing_bytes(window)
    _call("madvise", *_pages(window), ctypes.c_int(mmap.MADV_NORMAL))
    return HUGE_PAGE_BYTES // 2 <= found_bytes <= HUGE_PAGE_BYTES


def advise_random(view: np.ndarray) -> None:
    """Lets the system read nothing around what is missing, but for the rest of a huge page."""
    _call("madvise", *_pages(view), ctypes.c_int(mmap.MADV_RANDOM))


def lock(view: np.ndarray) -> str | None:
    """Keeps the pages of a view in memory, each from when it is used next; reads none.

    Also those that are in memory now: splitting a huge page takes its parts out of the mapping.

    Returns:
      What the system refused for; None if it did not.
    """
    number = _call("mlock2", *_pages(view), ctypes.c_uint(_MLOCK_ONFAULT))
    if number == 0:
        return None
    _call("munlock", *_pages(view))  # of what it had locked by then
    return errno.errorcode.get(number, str(number)) + ", " + os.strerror(number)


def unlock(view: np.ndarray) -> None:
    """Lets go of the pages that are wholly in a view: those at its ends may be a neighbour's."""
    start, length = _pages(view)
    end = start + length
    if start < view.ctypes.data:
        start += PAGE_BYTES
    if end > view.ctypes.data + view.nbytes:
        end -= PAGE_BYTES
    if start < end:
        _call("munlock", start, end - start)


def unlock_all(view: np.ndarray) -> None:
    """Lets go of all pages that a view touches."""
    _call("munlock", *_pages(view))


def drop(view: np.ndarray, path: Path) -> None:
    """Gives up the pages of a file, unless they are locked: the next use reads the disk.

    Args:
      view: all of it that this process has mapped.
      path: the file.
    """
    _call("madvise", *_pages(view), ctypes.c_int(mmap.MADV_DONTNEED))
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes_so_far() -> int | None:
    """What this process had disks read since it began; None if the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    return int(fields["read_bytes"]) if "read_bytes" in fields else None


def _pages(view: np.ndarray) -> tuple[int, int]:
    """Address and length of the pages that a view touches."""
    start = view.ctypes.data
    first = start - start % PAGE_BYTES
    return first, -(-(start + view.nbytes - first) // PAGE_BYTES) * PAGE_BYTES


def _call(name: str, start: int, length: int, *more: object) -> int:
    """Calls the C library; returns 0, or the number of the error."""
    function = getattr(_libc, name, None)
    if function is None:
        return errno.ENOSYS
    result = function(*(kind(x) for kind, x in zip(_RANGE, (start, length), strict=True)), *more)
    return ctypes.get_errno() if result else 0
