"""How much memory this machine has and has left, on the host and on a device.

Reads what the system says; decides nothing.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import psutil


class _CgroupFiles(NamedTuple):
    limit: str
    use: str
    files: tuple[str, str]  # keys in memory.stat


_V1 = _CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _CgroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


class DeviceMemory(NamedTuple):
    limit_bytes: int | None
    in_use_bytes: int | None
    peak_bytes: int | None  # most that were in use so far


def host_memory_bytes() -> int:
    """Memory that this process could use at most: the machine's, or less in a container."""
    limits = [limit for limit, _ in _cgroup_limits()]
    return min([psutil.virtual_memory().total, *limits])


def available_host_bytes() -> int:
    """Memory that can be allocated now without swapping.

    Files in the page cache count as available: the system drops them when it needs the memory.
    """
    left = [max(0, limit - used) for limit, used in _cgroup_limits()]
    return min([psutil.virtual_memory().available, *left])


def device_memory(device: jax.Device) -> DeviceMemory:
    """What the backend says of a device's memory; None for what it does not say.

    On a GPU the limit is the share that XLA may take (by default three quarters of the memory),
    not what the device has. The CPU backend says nothing.
    """
    stats = device.memory_stats() or {}
    names = ("bytes_limit", "bytes_in_use", "peak_bytes_in_use")
    return DeviceMemory(*(stats.get(name) for name in names))


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each control group around this process that has a limit.

    Use is without pages of files, which the system drops, but for those that are locked.
    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory.
    """
    limits = []
    for line in _read_lines(proc):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, _V2
        elif "memory" in controllers.split(","):
            base, files = root / "memory", _V1
        else:
            continue
        # A limit holds for all groups below it. In a container the path may be the host's and
        # not exist here; then the base is the container's own group.
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            limit = _read_lines(directory / files.limit)
            use = _read_lines(directory / files.use)
            if limit and use and limit[0].isdigit():  # "max" is none
                stat = dict(entry.split(" ", 1) for entry in _read_lines(directory / "memory.stat"))
                dropped = sum(int(stat.get(name, 0)) for name in files.files)
                limits.append((int(limit[0]), max(0, int(use[0]) - dropped)))
    return limits


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
