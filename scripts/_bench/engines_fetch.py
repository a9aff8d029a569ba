"""How fast a program copies missing experts into slots, beside plain copies of the same bytes."""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from _bench.offload_subject import OffloadSubject
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.quant.layout import aligned_empty
from jmoe.residency.array_cache import CacheState, CacheStatic, abstract_cache, hold, init_cache
from jmoe.residency.experts import MAX_IN_FLIGHT
from jmoe.residency.link import DeviceLink

# Copied for one measurement at least: all experts, as often as it takes.
MIN_BYTES = 2**28


def measure(subject: OffloadSubject, settings: Settings, report: Report) -> list[dict[str, Any]]:
    """The ways of copying experts, each beside those that are no program."""
    copies = Copies(subject)
    results, neighbours = watch_turns("fetch", copies.ways, settings)
    rows = []
    for name, speeds in results.items():
        row = {
            "test": "fetch",
            "what": name,
            "expert_bytes": subject.blob_bytes,
            "num_bytes": copies.num_passes * copies.num_bytes,
            "bytes_per_s": summarize(speeds).to_json(),
            "ratio": {
                other: summarize([a / b for a, b in zip(speeds, theirs, strict=True)]).to_json()
                for other, theirs in results.items()
                if other != "program"
            },
            "neighbours_cpu_share": neighbours,
        }
        rows.append(row)
        speed = row["bytes_per_s"]
        report.table(
            {
                "copied by": name,
                "MiB each": f"{subject.blob_bytes / 2**20:.2f}",
                "GB/s": f"{speed['median'] / 1e9:.3g}",
                "  min - max": f"{speed['min'] / 1e9:.3g} - {speed['max'] / 1e9:.3g}",
                **{f"x {other}": f"{r['median']:.2f}" for other, r in row["ratio"].items()},
                "neighbours": f"{neighbours:.0%}",
            }
        )
    return rows


@functools.partial(jax.jit, static_argnames=("static", "num_at_once"), donate_argnames=("state",))
def hold_all(
    state: CacheState, host: tuple[jax.Array, ...], *, static: CacheStatic, num_at_once: int
) -> CacheState:
    """Needs all experts of all layers once, so many at once: as a decode step does, without it.

    None is there, if the layers have no more slots than that. Donates: state.
    """

    def one_round(r: jax.Array, state: CacheState) -> CacheState:
        needed_U = r * num_at_once + jnp.arange(num_at_once, dtype=jnp.int32)
        for layer in range(static.num_layers):
            state, _ = hold(state, static, layer, needed_U, host[layer])
        return state

    return lax.fori_loop(0, static.num_experts // num_at_once, one_round, state)


class Copies:
    """The experts of a model, to be copied in several ways: each call returns bytes per second.

    Every copy goes where another expert was, in as many places as the slots of the program.

    Attributes:
      ways: by name.
    """

    def __init__(self, subject: OffloadSubject):
        base, num_layers = subject.base, subject.num_layers
        router = base.config.router
        # With fewer than twice as many experts as slots some would still be there.
        at_once = self._at_once = max(1, min(router.top_k, router.num_experts // 2))
        self._store, self._host = base.store, base.host_blobs
        self._blob_bytes, self._dtype = subject.blob_bytes, base.layout.dtype
        self._device = base.device
        self._order = [
            (layer, first + u)
            for first in range(0, router.num_experts - at_once + 1, at_once)
            for layer in range(num_layers)
            for u in range(at_once)
        ]
        self._num_slots = num_layers * at_once
        static = CacheStatic(
            num_experts=router.num_experts,
            slots=(at_once,) * num_layers,
            num_shared=0,
            rule="lru",
        )
        num_items, dtype = base.layout.num_items, base.layout.dtype
        self._program = base.programs.get(
            hold_all,
            abstract_cache(static, num_items, dtype),
            self._host,
            static=static,
            num_at_once=at_once,
        )
        self._state = init_cache(static, num_items, dtype, base.device)
        self._state = self._program(self._state, self._host)
        self.ways: dict[str, Callable[[], float]] = {
            "program": lambda: self._speed(self._by_program),
            "link": lambda: self._speed(self._by_link),
        }
        if base.device.platform == "cpu":
            self._warm = aligned_empty((self._num_slots, self._blob_bytes), np.uint8)
            self._warm[:] = 0
            self.ways["numpy"] = lambda: self._speed(self._by_numpy)

    @property
    def num_bytes(self) -> int:
        """Of one pass over all experts."""
        return len(self._order) * self._blob_bytes

    @property
    def num_passes(self) -> int:
        return -(-MIN_BYTES // self.num_bytes)

    def _speed(self, run: Callable[[], None]) -> float:
        start_s = time.perf_counter()
        for _ in range(self.num_passes):
            run()
        return self.num_passes * self.num_bytes / (time.perf_counter() - start_s)

    def _by_program(self) -> None:
        before = int(self._state.counts_LC[:, 1].sum())
        self._state = self._program(self._state, self._host)
        misses = int(self._state.counts_LC[:, 1].sum()) - before  # which waits for it
        assert misses == len(self._order), "some were there"

    def _by_link(self) -> None:
        """As the thread does; places are freed when others take them."""
        link = DeviceLink(self._device, self._dtype)
        places = collections.deque(maxlen=self._num_slots)
        under_way = collections.deque()
        for layer, expert in self._order:
            array = link.start(self._store.layer(layer)[expert])
            places.append(array)
            under_way.append(array)
            if len(under_way) == MAX_IN_FLIGHT:
                link.finish(under_way.popleft())
        for array in under_way:
            link.finish(array)

    def _by_numpy(self) -> None:
        for i, (layer, expert) in enumerate(self._order):
            self._warm[i % self._num_slots] = self._store.layer(layer)[expert]
