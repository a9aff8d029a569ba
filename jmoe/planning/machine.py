"""Which machine this is: what a measurement was made on, and whether another one is of the same.

Reads what the system says; measures nothing.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from jmoe.native import library

# Of processors that do not say: many times what one core has to itself.
_DEFAULT_CACHE_BYTES = 32 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def num_threads() -> int:
    """Threads that XLA computes with on a CPU: as PJRT_NPROC says, or all it may have."""
    named = os.environ.get("PJRT_NPROC", "")
    return (int(named) if named.isdecimal() else 0) or len(os.sched_getaffinity(0))


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Size of the processors' last caches, all of them together."""
    by_level: dict[int, dict[str, int]] = {}  # by cores that share one
    for index in sorted(root.glob("cpu[0-9]*/cache/index*")):
        try:
            level, size, cores = (
                (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
            num_bytes = int(size.rstrip("KMG")) * _UNITS.get(size[-1:], 1)
            by_level.setdefault(int(level), {})[cores] = num_bytes
        except (OSError, ValueError):
            continue
    if not by_level:
        return _DEFAULT_CACHE_BYTES
    return sum(by_level[max(by_level)].values())


def fingerprint(device: jax.Device, host_threads: int) -> str:
    """Everything that what is measured depends on: equal on equal machines, and nowhere else.

    Args:
      device: of the model.
      host_threads: that the host kernels compute with.
    """
    return "; ".join(
        [
            f"{processor_name()}, {host_threads} of {num_threads()} threads",
            f"{device.platform} {device.device_kind}",
            f"jax {version('jax')}, jaxlib {version('jaxlib')}",
            _kernels(),
        ]
    )


def _kernels() -> str:
    found = library.library()
    if found is None:
        return "no host kernels"
    # Its file, as a build with another compiler has other speeds.
    with open(found._name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    return f"host kernels {library.status().isa} {digest}"
