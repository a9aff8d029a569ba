"""Replays a recorded run through the cache that engines use, beside a modelled link.

So one learns without a device, and in seconds, what a policy would give: hit rates, stalls, tokens
per second. The cache is the live one (residency.cache), called as an engine calls it. Modelled are
a link that makes one copy after another, in the order of the Fetcher, and a device that takes the
same time for every layer. Not modelled: prompts, batches, the host's own time.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jmoe.errors import RequestError
from jmoe.planning import predictors
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.modelled_link import ModelledLink
from jmoe.planning.policy import MISSES, Misses
from jmoe.planning.replay import Replay
from jmoe.planning.splitting import Splitter
from jmoe.planning.traces import RoutingTrace
from jmoe.residency.cache import ExpertKey, NoRoom, SlotCache
from jmoe.residency.eviction import EVICTIONS, Belady, Eviction, StaticPopularity, make_eviction

SIMULATED_EVICTIONS = (*EVICTIONS, "popularity", "belady")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What would have happened. Counts of experts are sums over tokens and layers."""

    num_tokens: int
    num_layers: int
    hits: int  # needed, and here or on their way
    misses: int  # needed, and copied then
    host_experts: int  # needed, and computed on the host
    full_hits: int  # layers of tokens whose experts were all here or on their way
    speculated: int  # loads of predicted experts, before cancellations
    useful: int  # predicted and used
    useless: int  # predicted and dropped unused
    copies: int  # that the link made
    seconds: float
    compute_s: float  # the device computed
    stall_s: float  # waited for copies, and for the host
    link_s: float  # the link was busy
    host_s: float  # the host computed experts
    link_bytes: int
    recall: tuple[tuple[float, ...], ...]  # of predictions, by distance and number fetched

    @property
    def hit_rate(self) -> float:
        return _share(self.hits, self.hits + self.misses + self.host_experts)

    @property
    def full_hit_rate(self) -> float:
        return _share(self.full_hits, self.num_tokens * self.num_layers)

    @property
    def loads_per_token(self) -> float:
        """Copies, wanted or not."""
        return _share(self.copies, self.num_tokens)

    @property
    def tokens_per_s(self) -> float:
        """Infinite if nothing takes time."""
        return self.num_tokens / self.seconds if self.seconds else math.inf

    @property
    def bound_s(self) -> float:
        """What the same copies and computations take at least: the longest of them."""
        return max(self.link_s, self.host_s, self.compute_s)

    @property
    def bound_share(self) -> float:
        """How much of the time the bound explains; 1 is perfect overlap."""
        return _share(self.bound_s, self.seconds)

    def to_json(self) -> dict:
        names = ("hit_rate", "full_hit_rate", "loads_per_token", "bound_s", "bound_share")
        value = dataclasses.asdict(self) | {name: getattr(self, name) for name in names}
        return value | {"tokens_per_s": self.tokens_per_s if self.seconds else None}


def simulate(
    trace: RoutingTrace,
    *,
    slots: Sequence[int] | int,
    num_staging: int | None = None,
    eviction: str | Eviction = "lru",
    predictor: str = "none",
    lookahead: int = 1,
    fetch: int | None = None,
    recall: Sequence[float] = (),
    train: RoutingTrace | None = None,
    initial: Iterable[ExpertKey] | None = None,
    blob_bytes: int = 0,
    bytes_per_s: float = math.inf,
    latency_s: float = 0.0,
    layer_s: float = 0.0,
    misses: Misses = "load",
    host_s: float = 0.0,
    device_s: float = 0.0,
    costs: ExpertCosts | None = None,
    seed: int = 0,
) -> SimulationResult:
    """Decodes a trace, one token after another and without clearing the cache between sequences.

    In each layer its experts become known; copies of missing ones start, before those of predicted
    ones; the layer is computed when its experts are there.

    Args:
      trace: what was used.
      slots: of each layer, or an int: of one pool for all.
      num_staging: places besides; None is enough for a layer's experts and all predictions.
      eviction: a name in SIMULATED_EVICTIONS, or a rule.
      predictor: a name in predictors.PREDICTORS.
      lookahead: for how many layers ahead experts are predicted.
      fetch: experts for each of them; None is top_k.
      recall: of the predictor noisy, by distance.
      train: what popularity and markov learn from; None is the trace itself.
      initial: the experts that hold slots at first, oldest first; None is the first ones of each
        layer: by number, or for the rule popularity the most popular ones.
      blob_bytes: of an expert.
      bytes_per_s: of the link.
      latency_s: of each copy.
      layer_s: of computing a layer, its experts on the device.
      misses: what becomes of experts that are needed and not there; see ``policy.Policy``.
      host_s: of computing one expert on the host, unless misses are loaded.
      device_s: of computing one expert on the device: a part of layer_s.
      costs: of an expert, in place of bytes_per_s, latency_s, host_s and device_s.
      seed: for random eviction, and for the errors of noisy predictions.

    Raises:
      RequestError: an argument is out of range, or places are too few.
    """
    fetch = trace.top_k if fetch is None else fetch
    ahead = lookahead if predictor != "none" else 0
    if num_staging is None:
        num_staging = 2 * trace.top_k + ahead * fetch
    sizes = _sizes(slots, trace.num_layers)
    most = trace.num_experts
    _require(len(sizes) == trace.num_layers, "slots", slots, f"for {trace.num_layers} layers")
    _require(all(0 <= size <= most for size in sizes), "slots", slots, f"0 to {most} for a layer")
    _require(num_staging >= 0, "num_staging", num_staging, "at least 0")
    _require(ahead >= 0, "lookahead", lookahead, "at least 0")
    _require(fetch >= 0, "fetch", fetch, "at least 0")
    _require(0 <= blob_bytes < math.inf, "blob_bytes", blob_bytes, "at least 0")
    _require(bytes_per_s > 0, "bytes_per_s", bytes_per_s, "above 0")
    _require(0 <= latency_s < math.inf, "latency_s", latency_s, "at least 0")
    _require(0 <= layer_s < math.inf, "layer_s", layer_s, "at least 0")
    _require(0 <= host_s < math.inf, "host_s", host_s, "at least 0")
    _require(0 <= device_s < math.inf, "device_s", device_s, "at least 0")
    _require(misses in MISSES, "misses", misses, f"one of {', '.join(MISSES)}")
    cache = SlotCache(
        slots,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        num_staging=num_staging,
        eviction=_make_rule(eviction, trace, train, seed),
        min_free=max(0, trace.top_k - min(sizes)),
    )
    if initial is None:
        ranked = np.arange(trace.num_experts)[None].repeat(trace.num_layers, 0)
        if eviction == "popularity":
            ranked = np.argsort(-(train or trace).popularity(), axis=-1, kind="stable")
        initial = (
            ExpertKey(layer, int(expert))
            for layer, size in enumerate(sizes)
            for expert in ranked[layer, :size][:: -1 if eviction == "popularity" else 1]
        )
    cache.fill(initial)
    predictions = predictors.predict(
        trace, predictor, ahead, fetch, train, recall=recall, seed=seed
    )
    if costs is None:
        costs = ExpertCosts(
            copy_s=latency_s + blob_bytes / bytes_per_s,
            host=lambda tokens: host_s,
            device=lambda tokens: device_s,
        )
    link = ModelledLink(costs.copy_s)
    splitter = None if misses == "load" else Splitter(costs, misses=misses)
    replay = Replay(
        cache, link, layer_s, splitter, fetch_s=costs.fetch_s, copying_s=costs.copying_s
    )
    try:
        replay.run(trace, predictions)
    except NoRoom as error:
        raise RequestError(
            "there are too few places for the experts of one token",
            got=f"slots {slots}, {num_staging} for staging; none left for {error}",
            do="give it more slots or staging",
        ) from None
    counters = cache.counters
    return SimulationResult(
        num_tokens=trace.num_tokens,
        num_layers=trace.num_layers,
        hits=counters.hits,
        misses=counters.misses,
        full_hits=replay.full_hits,
        speculated=counters.speculated,
        useful=counters.useful,
        useless=counters.useless,
        copies=link.copies,
        host_experts=replay.host_experts,
        seconds=replay.now,
        compute_s=max(
            0.0,
            trace.num_tokens * trace.num_layers * layer_s - replay.host_experts * costs.device(1),
        ),
        stall_s=replay.stall_s,
        host_s=replay.host_s,
        link_s=link.copies * link.copy_s,
        link_bytes=link.copies * blob_bytes,
        recall=tuple(tuple(r) for r in predictors.recall(trace, predictions).tolist()),
    )


def _sizes(slots: Sequence[int] | int, num_layers: int) -> list[int]:
    """Slots by layer; of a global pool an even share."""
    if not isinstance(slots, int):
        return list(slots)
    return [slots * (i + 1) // num_layers - slots * i // num_layers for i in range(num_layers)]


def _make_rule(
    eviction: str | Eviction, trace: RoutingTrace, train: RoutingTrace | None, seed: int
) -> Eviction:
    if not isinstance(eviction, str):
        return eviction
    if eviction == "popularity":
        return StaticPopularity((trace if train is None else train).popularity().tolist())
    if eviction == "belady":
        return Belady(
            [ExpertKey(layer, expert) for expert in experts]
            for ids_LK in trace.decode_expert_ids.tolist()
            for layer, experts in enumerate(ids_LK)
        )
    if eviction not in EVICTIONS:
        raise RequestError(
            "unknown eviction rule",
            got=eviction,
            expected=" or ".join(SIMULATED_EVICTIONS),
            do="choose one of these",
        )
    return make_eviction(eviction, seed=seed)


def _require(fits: bool, name: str, got: object, expected: str) -> None:
    if not fits:
        raise RequestError(f"{name} is out of range", got=got, expected=expected)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
