"""A limit of memory for this process, page cache included: a control group below its own.

Pages belong to the group that first read them. So what the limit holds is what is allocated and
read from then on; memory that the process had before stays with the group around it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jmoe.errors import RequestError

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited_memory(num_bytes: int | None) -> Iterator[Path | None]:
    """Holds this process to so many bytes until the end of ``with``; None does nothing.

    Yields:
      The control group.

    Raises:
      RequestError: the system makes no such group.
    """
    if num_bytes is None:
        yield None
        return
    own, limit_name = _own_group()
    group = own / f"jmoe-bench-{os.getpid()}"
    try:
        group.mkdir()
        try:
            (group / limit_name).write_text(str(num_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        raise RequestError(
            "this process cannot be held to a limit of memory",
            where=own,
            got=error.strerror,
            do="run it inside of one, without --memory_gib: "
            "systemd-run --user --scope -p MemoryMax=1G python scripts/bench.py ...",
        ) from None
    try:
        yield group
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # pages that nobody holds go first; then it can go
            (group / "memory.force_empty").write_text("0")
        with contextlib.suppress(OSError):
            group.rmdir()


def _own_group() -> tuple[Path, str]:
    """The group of this process that counts memory, and the file of its limit."""
    unified = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers:
            unified = _ROOT / path.lstrip("/"), "memory.max"
    if unified is None:
        raise RequestError("this system has no control groups", do="leave out --memory_gib")
    return unified
