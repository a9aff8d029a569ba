"""What a missing expert costs in one program: copied into a slot and read there, or where it lies.

On the CPU backend a program can do either. Where it lies, an expert is read once; and jax can be
told to compute it on the host, which a CPU is anyhow.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import compute_on
from jaxtyping import Array, Float

from _bench.offload_subject import OffloadSubject
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.models.experts import experts_in_slots
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import ExpertLayout
from jmoe.residency.array_cache import CacheState, CacheStatic, abstract_cache, hold, init_cache

Way = Literal["copied", "in place", "in place, device_host"]
WAYS: tuple[Way, ...] = ("copied", "in place", "in place, device_host")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Static:
    """What the program is specialised to; fields as of ``experts_in_slots``.

    Attributes:
      cache: of as many slots per layer as a token needs experts.
      way: of missing experts.
    """

    cache: CacheStatic
    way: Way
    layout: ExpertLayout
    activation: str
    platform: str
    host: HostKernels | None


def measure(subject: OffloadSubject, settings: Settings, report: Report) -> list[dict[str, Any]]:
    """Every way, beside copying. On an accelerator there is no other."""
    platform = subject.base.device.platform
    contestants = {way: _Contestant(subject, way) for way in WAYS if platform == "cpu"}
    contestants = contestants or {"copied": _Contestant(subject, "copied")}
    outputs = [contestant.output() for contestant in contestants.values()]
    assert all(np.array_equal(output, outputs[0]) for output in outputs), "not the same experts"
    turns: dict[str, Callable[[], float]] = {w: c.seconds for w, c in contestants.items()}
    results, neighbours = watch_turns("misses", turns, settings)
    rows = []
    for way, seconds in results.items():
        ratios = [a / b for a, b in zip(seconds, results["copied"], strict=True)]
        row = {
            "test": "misses",
            "what": way,
            "expert_bytes": subject.blob_bytes,
            "s_per_expert": summarize(seconds).to_json(),
            "ratio": summarize(ratios).to_json(),
            "neighbours_cpu_share": neighbours,
        }
        rows.append(row)
        per_expert = row["s_per_expert"]
        report.table(
            {
                "missing experts": way,
                "MiB each": f"{subject.blob_bytes / 2**20:.2f}",
                "ms each": f"{per_expert['median'] * 1e3:.3g}",
                "  min - max": f"{per_expert['min'] * 1e3:.3g} - {per_expert['max'] * 1e3:.3g}",
                "x copied": f"{row['ratio']['median']:.2f}",
                "neighbours": f"{neighbours:.0%}",
            }
        )
    return rows


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("state",))
def serve_all(
    state: CacheState, x_TD: Float[Array, "1 D"], host: tuple[jax.Array, ...], *, static: _Static
) -> tuple[CacheState, Float[Array, "K D"]]:
    """Takes a token through all experts of all layers, as many at once as a layer has slots.

    None of them is there. Donates: state.

    Returns:
      The cache, and the sum of all outputs.
    """
    cache = static.cache
    num_at_once = cache.slots[0]

    def compute(x_TD: jax.Array, ids_TK: jax.Array, blobs: jax.Array) -> jax.Array:
        return experts_in_slots(
            x_TD,
            ids_TK,
            blobs,
            static.layout,
            static.activation,
            static.platform,
            static.host,
        )

    def one_round(r: jax.Array, carry: tuple) -> tuple:
        state, y_KD = carry
        first_U = r * num_at_once + jnp.arange(num_at_once, dtype=jnp.int32)
        for layer in range(cache.num_layers):
            # As of a router: depends on the layer before. Else XLA could fetch before that layer
            # has read its slots, and would copy them all.
            needed_U = first_U + jnp.isnan(y_KD[0, 0]).astype(jnp.int32)
            if static.way == "copied":
                state, slot_U = hold(state, cache, layer, needed_U, host[layer])
                y_TKD = compute(x_TD, slot_U[None], state.slots_SI)
            else:
                chosen = compute if static.way == "in place" else _on_host(compute)
                y_TKD = chosen(x_TD, needed_U[None], host[layer])
            y_KD += y_TKD[0]
        return state, y_KD

    y_KD = jnp.zeros((num_at_once, x_TD.shape[1]), jnp.float32)
    return lax.fori_loop(0, cache.num_experts // num_at_once, one_round, (state, y_KD))


def _on_host(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    # Up to jax 0.11.0 compute_on is a context manager, and this is compute_on2.
    name = "compute_on2" if hasattr(compute_on, "compute_on2") else "compute_on"
    return getattr(compute_on, name)(
        function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device
    )


class _Contestant:
    """A way, compiled."""

    def __init__(self, subject: OffloadSubject, way: Way):
        base, router = subject.base, subject.base.config.router
        # With fewer than twice as many experts as slots some would still be there.
        at_once = max(1, min(router.top_k, router.num_experts // 2))
        cache = CacheStatic(
            num_experts=router.num_experts,
            slots=(at_once,) * subject.num_layers,
            num_shared=0,
            rule="lru",
        )
        static = _Static(
            cache=cache,
            way=way,
            layout=base.layout,
            activation=base.config.hidden_act,
            platform=base.device.platform,
            host=base.host,
        )
        num_items, dtype = base.layout.num_items, base.layout.dtype
        rng = np.random.default_rng(0)
        x_TD = rng.normal(size=(1, base.config.hidden_size)).astype(np.float32)
        self._x_TD = jax.device_put(jnp.asarray(x_TD, base.dtype), base.device)
        self._host = base.host_blobs
        self._program = base.programs.get(
            serve_all,
            abstract_cache(cache, num_items, dtype),
            self._x_TD,
            self._host,
            static=static,
        )
        self._state = init_cache(cache, num_items, dtype, base.device)
        self._num_experts = subject.num_layers * (router.num_experts // at_once) * at_once

    def output(self) -> np.ndarray:
        self._state, y_KD = self._program(self._state, self._x_TD, self._host)
        return np.asarray(y_KD)

    def seconds(self) -> float:
        """Per expert."""
        start_s = time.perf_counter()
        self.output()
        return (time.perf_counter() - start_s) / self._num_experts
