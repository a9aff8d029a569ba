"""Compiles, for the H100, a decode step whose missing experts the host computes inside it.

    python -m tests.hlo.host_call [--unregistered]

The engine has no such program: this says what XLA would make of one (docs/measurements/
host-compute-in-program.md), with the host kernels in calls of the host, and prints how many kernels
stand before, between and behind the start and the end of each call.

The kernels are entered with the CUDA plugin first: it is a library with an XLA of its own, and what
``jax.ffi`` registers for the CPU goes into another table. With --unregistered they are not, which
ends the process.
"""

import argparse
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jaxlib import xla_client

from jmoe.engines import compiled_programs
from jmoe.engines.compiled_programs import StepStatic
from jmoe.models.experts import combine, experts_in_slots
from jmoe.models.router import Routing
from jmoe.native import library, ops
from jmoe.residency import array_cache
from jmoe.residency.array_cache import CacheState
from tests.hlo import h100, optimized
from tests.hlo.offload_decode import OffloadDecode

FFI_EXTENSION = 5  # PJRT_Extension_Type_FFI
HANDLER_ARGS_BYTES = 52  # up to the end of its last field


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--unregistered", action="store_true")
    unregistered = parser.parse_args().unregistered
    reason = h100.why_unavailable()
    if reason is not None:
        sys.exit(f"error: {reason}")
    library.require()
    jax.devices()  # which loads the plugin
    if not unregistered:
        register_with_plugin("jmoe_experts")
    program = OffloadDecode(quant="attn4-experts4", slots=5)
    with mock.patch.object(compiled_programs, "_experts", experts):
        lowered = program.lower()
    compiled = h100.compile_lowered(lowered)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    print(f"jax {jax.__version__}, {program.num_layers} layers")
    print(f"temporary memory: {memory.temp_size_in_bytes / 2**20:.1f} MiB")
    in_place = memory.alias_size_in_bytes >= program.slots_bytes
    print(f"slots updated in place: {'yes' if in_place else 'no'}")
    print(f"loops and branches that wait for the host: {optimized.num_host_loops(hlo)}")
    print(f"kernels around calls of the host: {schedule(hlo)}")


def experts(
    cache: CacheState,
    layer: int,
    x_TD: jax.Array,
    ids_TK: jax.Array,
    routing: Routing,
    predicted_TN: jax.Array | None,
    host: tuple[jax.Array, ...],
    static: StepStatic,
) -> tuple[CacheState, jax.Array]:
    """What replaces ``compiled_programs._experts``, for one token: slots stay as they are."""
    pool = array_cache._pool(static.cache, layer)
    found = array_cache._find(cache, pool, ids_TK[0])
    num_hits, num_misses = jnp.sum(found.is_here_U), jnp.sum(found.is_missing_U)
    cache = array_cache._count(cache, pool, (num_hits, num_misses, 0, 0, 0))
    top_k = ids_TK.shape[1]
    # Constants within a call would be in the device's memory, which the types there refuse.
    x_KD = jnp.repeat(x_TD.astype(jnp.float32), top_k, axis=0)
    ones_K1 = jnp.ones((top_k, 1), jnp.float32)
    y_host_KD = _on_host(functools.partial(ops.experts, layout=static.layout, activation_bits=8))(
        x_KD, ids_TK.reshape(-1, 1), ones_K1, found.is_missing_U, host[layer]
    )
    y_TKD = experts_in_slots(
        x_TD,
        jnp.where(found.is_here_U, found.slot_U, -1)[None],
        cache.slots_SI,
        static.layout,
        static.config.hidden_act,
        static.platform,
        None,
    )
    return cache, combine(y_TKD + y_host_KD[None], routing.weights_TK).astype(x_TD.dtype)


def _on_host(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    # Up to jax 0.11.0 compute_on is a context manager, and this is compute_on2.
    name = "compute_on2" if hasattr(compute_on, "compute_on2") else "compute_on"
    return getattr(compute_on, name)(
        function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device
    )


def register_with_plugin(target: str) -> None:
    """Enters a host kernel with the CUDA plugin, by the C interface of PJRT.

    Python registers there for the platform CUDA only.
    """

    class Args(ctypes.Structure):
        _fields_ = (
            ("struct_size", ctypes.c_size_t),
            ("target_name", ctypes.c_char_p),
            ("target_name_size", ctypes.c_size_t),
            ("handler", ctypes.c_void_p),
            ("platform_name", ctypes.c_char_p),
            ("platform_name_size", ctypes.c_size_t),
            ("traits", ctypes.c_int),
        )

    class Extension(ctypes.Structure):
        pass

    Extension._fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.POINTER(Extension)),
        # Only the extension that is looked for has these.
        ("type_register", ctypes.c_void_p),
        ("user_data_add", ctypes.c_void_p),
        ("register_handler", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Args))),
    )

    class Api(ctypes.Structure):
        _fields_ = (
            ("struct_size", ctypes.c_size_t),
            ("extension", ctypes.POINTER(Extension)),
        )

    handlers: Any = xla_client._custom_callback_handler
    plugin = handlers["CUDA"].args[0]  # a functools.partial of it
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = (
        ctypes.c_void_p,
        [ctypes.py_object, ctypes.c_char_p],
    )
    api = ctypes.cast(pointer_of(plugin, name_of(plugin)), ctypes.POINTER(Api))
    extension = api.contents.extension
    while extension and extension.contents.type != FFI_EXTENSION:
        extension = extension.contents.next
    assert extension, "the plugin takes no handlers"
    handler = ctypes.cast(getattr(library.library(), target), ctypes.c_void_p)
    name, platform = target.encode(), b"Host"
    args = Args(HANDLER_ARGS_BYTES, name, len(name), handler, platform, len(platform), 0)
    error = extension.contents.register_handler(ctypes.byref(args))
    assert not error, "the plugin refused the handler"


def schedule(hlo: str) -> str:
    """Numbers of kernels of the entry computation, and where calls of the host start and end."""
    parts: list[str] = []
    count = 0
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        name, _, operation = line.partition(" = ")
        if "custom-call-start(" in operation or "custom-call-done(" in operation:
            parts += [str(count), "start" if "-start(" in operation else "end"]
            count = 0
        elif " fusion(" in operation or " custom-call(" in operation or " while(" in operation:
            count += bool(name)
    return " ".join([*parts, str(count)])


if __name__ == "__main__":
    main()
