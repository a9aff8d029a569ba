"""Where and with what a measurement was made."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from jmoe.planning import machine, memory

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def describe_commit() -> dict[str, Any]:
    """The commit of this checkout, and whether tracked files differ; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


def describe_machine() -> dict[str, Any]:
    """Processor, memory, device and versions; the load is that before the measurement."""
    device = jax.local_devices()[0]
    return {
        "cpu": machine.processor_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "host_memory_bytes": memory.host_memory_bytes(),
        "device": device.device_kind,
        "device_memory_bytes": memory.device_memory(device).limit_bytes,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


class Neighbours:
    """How much of the machine other processes used inside ``with Neighbours() as n``.

    Child processes are one's own, if they start and end inside.

    Attributes:
      share: of all cores; 0 is a machine of one's own.
    """

    def __enter__(self) -> "Neighbours":
        self.share = 0.0
        self._before = self._read()
        return self

    def __exit__(self, *exc_info) -> None:
        idle, own, everything = np.subtract(self._read(), self._before)
        if everything > 0:
            self.share = float(np.clip((everything - idle - own) / everything, 0, 1))

    def _read(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        children = own.children_user + own.children_system  # that have ended
        everything = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        idle = times.idle + getattr(times, "iowait", 0)
        return idle, own.user + own.system + children, everything


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
