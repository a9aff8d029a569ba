"""How long a decode step that is one program takes to compile, by the model's depth."""

import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from _bench.machine import Neighbours
from _bench.report import Report
from _bench.settings import Settings
from jmoe import native
from jmoe.config import ModelConfig
from jmoe.engines.compiled_decoder import MIN_STOP_IDS
from jmoe.engines.compiled_programs import Limits, StepStatic, decode_tokens
from jmoe.engines.programs import CPU_COMPILER_OPTIONS, DecodeState
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.loading import LoadOptions, find_model
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.kv_cache import init_cache
from jmoe.native.choice import HostKernels
from jmoe.planning.policy import Policy
from jmoe.quant.spec import QuantSpec
from jmoe.residency.array_cache import CacheStatic, abstract_cache
from jmoe.store.known_models import with_num_layers

CAPACITY = 1024  # positions of the KV cache
_HIT = "/jax/compilation_cache/cache_hits"
_GREEDY = SamplingKind(greedy=True, truncated=False, penalized=False)


def measure(settings: Settings, report: Report) -> list[dict[str, Any]]:
    """Compiles for the CPU, from shapes only: without the persistent cache, and out of it."""
    options = LoadOptions(
        **{**settings.loading, "policy": Policy(mode="offload")}, check_memory=False
    )
    found = find_model(settings.model, options)
    quant = found.setup.quant
    assert quant is not None
    hosts: list[HostKernels | None] = [None]
    if options.host_kernels and native.status().available:
        hosts.insert(0, options.kernel_options)
    rows = []
    quiet = not sys.stderr.isatty()
    total = 2 * len(settings.layers) * len(hosts)
    with tqdm(desc="compile", total=total, leave=False, delay=2, disable=quiet) as bar:
        for num_layers in settings.layers:
            config_json = with_num_layers(found.config_json, num_layers)
            config = families.config_from_json(config_json, found.name)
            for host in hosts:
                row: dict[str, Any] = {
                    "test": "compile",
                    "model": found.name,
                    "quant": str(quant),
                    "num_layers": num_layers,
                    "host_kernels": host is not None,
                }
                with Neighbours() as neighbours, _empty_cache():
                    for name in ("cold", "again"):
                        row[name] = _compile(config, found.setup.dtype, quant, host)
                        bar.update()
                assert not row["cold"]["from_cache"]
                row["neighbours_cpu_share"] = neighbours.share
                rows.append(row)
                report.table(_cells(row))
    return rows


def _compile(
    config: ModelConfig, dtype: str, quant: QuantSpec, host: HostKernels | None
) -> dict[str, Any]:
    """Seconds, as in a new process."""
    jax.clear_caches()
    start_s = time.perf_counter()
    lowered = _lower(config, dtype, quant, host)
    lowered_s = time.perf_counter()
    hits: list[str] = []

    def note(event: str, **_: Any) -> None:
        if event == _HIT:
            hits.append(event)

    monitoring.register_event_listener(note)
    try:
        lowered.compile(compiler_options={**CPU_COMPILER_OPTIONS})
    finally:
        monitoring.unregister_event_listener(note)
    end_s = time.perf_counter()
    return {
        "trace_s": lowered_s - start_s,
        "compile_s": end_s - lowered_s,
        "seconds": end_s - start_s,
        "from_cache": bool(hits),
    }


def _lower(
    config: ModelConfig, dtype: str, quant: QuantSpec, host: HostKernels | None
) -> jax.stages.Lowered:
    """The greedy step of one sequence, with slots for half of the experts."""
    num_layers, router = config.num_hidden_layers, config.router
    cache = CacheStatic(
        num_experts=router.num_experts,
        slots=(max(router.top_k, router.num_experts // 2),) * num_layers,
        num_shared=0,
        rule="lru",
    )
    static = StepStatic(
        config=config,
        dtype=dtype,
        quant=quant,
        host=host,
        platform="cpu",
        cache=cache,
        kind=_GREEDY,
    )
    ends, blobs, layers = [], [], [[] for _ in range(num_layers)]
    for name, parameter in abstract_parameters(config, dtype, quant).items():
        if name.endswith(".blobs"):
            blobs.append(parameter)
        elif name.startswith("layers."):
            layers[int(name.split(".")[1])].append(parameter)
        else:
            ends.append(parameter)
    shape = jax.ShapeDtypeStruct
    int32, int32_B, float32 = shape((), jnp.int32), shape((1,), jnp.int32), shape((), jnp.float32)
    kv_cache = jax.eval_shape(functools.partial(init_cache, config, 1, CAPACITY, dtype))
    args = (
        tuple(ends),
        tuple(map(tuple, layers)),
        tuple(blobs),
        DecodeState(kv_cache, int32_B, int32_B, None),  # type: ignore[arg-type]
        abstract_cache(cache, static.layout.num_items, static.layout.dtype),
        shape((1,), jnp.bool_),
        Limits(shape((MIN_STOP_IDS,), jnp.int32), int32_B),  # type: ignore[arg-type]
        None,
        shape((2,), jnp.uint32),
        SamplingValues(float32, int32, float32, float32, float32),  # type: ignore[arg-type]
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return decode_tokens.lower(
        *jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=sharding), args),
        static=static,
    )


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Lets JAX keep programs in a directory that is empty at first."""
    with tempfile.TemporaryDirectory() as directory:
        values = {
            "jax_enable_compilation_cache": True,
            "jax_compilation_cache_dir": directory,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in values}
        _configure(values)
        try:
            yield
        finally:
            _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _cells(row: dict[str, Any]) -> dict[str, str]:
    cold, again = row["cold"], row["again"]
    return {
        "layers": str(row["num_layers"]),
        "kernels": "host" if row["host_kernels"] else "XLA",
        "tracing s": f"{cold['trace_s']:.2f}",
        "compiling s": f"{cold['compile_s']:.1f}",
        "s in all": f"{cold['seconds']:.1f}",
        "cached": "yes" if again["from_cache"] else "no",
        "reading s": f"{again['compile_s']:.2f}",
        "s in all, cached": f"{again['seconds']:.2f}",
        "neighbours": f"{row['neighbours_cpu_share']:.0%}",
    }
