"""Compiles jitted functions for an NVIDIA H100 on a machine without one.

XLA:GPU is a cross compiler: it needs JAX's CUDA plugin, a description of the device
(h100_sxm.txtpb, from the XLA project), and of CUDA only ptxas and libdevice. What comes out
cannot run, but its optimized HLO and its memory use can be read.

There is no autotuning without a device: on the GPU, XLA may replace a matrix product by a
library call that needs its operands in memory. Products written as multiply and sum are not
subject to that.
"""

import functools
import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICE = Path(__file__).with_name("h100_sxm.txtpb")
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def why_unavailable() -> str | None:
    """What is missing to compile for the H100; None if nothing is. Starts no backend."""
    plugins = [name for name in PLUGINS if _version(name) is not None]
    if not plugins:
        return "JAX's CUDA plugin is not installed (jax-cuda13-plugin and jax-cuda13-pjrt)"
    if all(_version(name) != version("jaxlib") for name in plugins):
        found = ", ".join(f"{name} {_version(name)}" for name in plugins)
        return f"JAX's CUDA plugin does not belong to jaxlib {version('jaxlib')}: {found}"
    if cuda_directory() is None:
        return "no ptxas and libdevice of CUDA (nvidia-cuda-nvcc and nvidia-nvvm have them)"
    return None


@functools.cache
def cuda_directory() -> Path | None:
    """Where bin/ptxas and nvvm/libdevice are: CUDA_DIR, CUDA's wheels, or a CUDA toolkit."""
    places = [Path(os.environ["CUDA_DIR"])] if "CUDA_DIR" in os.environ else []
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia and nvidia.submodule_search_locations) or ():
        places += [Path(root) / "cu13", Path(root) / "cuda_nvcc"]
    if ptxas := shutil.which("ptxas"):
        places.append(Path(ptxas).resolve().parent.parent)
    places += [
        Path("/usr/local/cuda"),
        *sorted(Path("/usr/local").glob("cuda-*")),
        Path("/opt/cuda"),
    ]
    parts = (Path("bin/ptxas"), Path("nvvm/libdevice/libdevice.10.bc"))
    return next((d for d in places if all((d / part).is_file() for part in parts)), None)


def abstract(tree: Any) -> Any:
    """A pytree of shapes as arguments that lie on the absent device."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding())

    return jax.tree.map(place, tree)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    # Not by XLA_FLAGS: the directory that JAX itself guesses would win.
    return lowered.compile(compiler_options={"xla_gpu_cuda_data_dir": str(cuda_directory())})


@functools.cache
def _sharding() -> NamedSharding:
    jax.devices()  # which registers the plugin
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DEVICE.read_text(), topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices), ("device",)), PartitionSpec())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
