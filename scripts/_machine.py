"""What this machine offers: versions, memory, devices."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from jmoe import native

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "safetensors", "tokenizers")


def describe() -> dict[str, Any]:
    """Versions, memory and devices, as JSON."""
    import jax

    import jmoe
    from jmoe import native
    from jmoe.planning import memory

    try:
        devices, problem = jax.devices(), None
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
        devices, problem = [], str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
    return {
        "versions": {"python": platform.python_version(), "jmoe": jmoe.__version__}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": memory.host_memory_bytes(),
        "available_host_bytes": memory.available_host_bytes(),
        "devices": [
            {"name": str(device), "kind": device.device_kind}
            | memory.device_memory(device)._asdict()
            for device in devices
        ],
        "devices_problem": problem,
        "cuda": _cuda_status(devices),
        "host_kernels": _host_kernels(native.status()),
    }


def _host_kernels(status: "native.Status") -> dict[str, Any]:
    return {"available": status.available, "isa": status.isa, "reason": status.reason}


def _cuda_status(devices: "list[jax.Device]") -> str:
    import jax

    if any(device.platform == "gpu" for device in devices):
        return "usable"
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return "not usable: no CUDA plugin of jax (pip install 'jax[cuda12]' or 'jax[cuda13]')"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"not usable: {error}"
    return "usable, but not the default"
