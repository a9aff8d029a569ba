"""Decodes a recorded run with the live cache beside a modelled link and host; see simulate.py."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jmoe.planning.modelled_link import ModelledLink
from jmoe.planning.splitting import Splitter, Ways
from jmoe.planning.traces import RoutingTrace
from jmoe.residency.cache import ExpertKey, Load, SlotCache
from jmoe.residency.experts import MAX_IN_FLIGHT, Outlook


@dataclasses.dataclass
class Replay:
    """What happens, and when.

    Attributes:
      cache: of the experts on the device.
      link: to it.
      layer_s: that a layer takes with all experts there.
      splitter: says what the host computes; None loads everything.
      fetch_s: see ``cost.ExpertCosts``; and copying_s.
      top_k: experts of a token, of which there may be several in a step; None if there is one.
      now: seconds since the start.
      stall_s: of which the device waited for copies and for the host.
      host_s: seconds that the host computed.
      host_experts: that it computed.
      full_hits: layers of tokens whose experts were all here or on their way.
    """

    cache: SlotCache
    link: ModelledLink
    layer_s: float
    splitter: Splitter | None
    fetch_s: float = 0.0
    copying_s: float = 0.0
    top_k: int | None = None
    now: float = 0.0
    stall_s: float = 0.0
    host_s: float = 0.0
    host_experts: int = 0
    full_hits: int = 0

    def __post_init__(self):
        num_experts = self.cache.num_experts
        layers = range(self.cache.num_layers)
        self._keys = [[ExpertKey(i, e) for e in range(num_experts)] for i in layers]
        if self.splitter is not None:
            self.splitter.clock = lambda: self.now

    def run(self, trace: RoutingTrace, predictions: np.ndarray) -> None:
        """Decodes all tokens."""
        num_distances = predictions.shape[2]
        if self.link.copy_s == 0 and num_distances == 0 and self.splitter is None:
            self._run_untimed(trace)
            return
        for ids_LK, predicted_LNW in zip(
            trace.decode_expert_ids.tolist(), predictions, strict=True
        ):
            predicted = predicted_LNW.tolist() if num_distances else ()
            for layer, experts in enumerate(ids_LK):
                last = min(trace.num_layers, layer + 1 + num_distances)
                targets = range(layer + 1, last)
                ahead = [(target, predicted[target][target - layer - 1]) for target in targets]
                self.run_layer(layer, experts, [1] * len(experts), ahead)

    def _run_untimed(self, trace: RoutingTrace) -> None:
        """The same where copies take no time, without arrivals."""
        cache = self.cache
        for ids_LK in trace.decode_expert_ids.tolist():
            for layer, experts in enumerate(ids_LK):
                self.full_hits += not cache.use(layer, experts)
                cache.unpin()
        self.link.copies = cache.counters.misses
        self.now = trace.num_tokens * trace.num_layers * self.layer_s

    def run_layer(
        self,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int],
        predictions: Sequence[tuple[int, Sequence[int]]],
    ) -> None:
        """Computes a layer.

        Args:
          layer: the next one.
          experts: distinct, that its tokens chose.
          tokens: of each.
          predictions: later layers, and experts that are predicted for them; -1 for none.
        """
        link, splitter, start = self.link, self.splitter, self.now
        ways, on_host = Ways([], [], []), []
        tokens_of = dict(zip(experts, tokens, strict=True))
        link.advance(start)
        if splitter is not None:
            ways = splitter.split(self, layer, experts, tokens)
            self._call_off(layer, ways)
            on_host, experts = ways.host, [*ways.here, *ways.coming]
        *before, last = self._groups(layer, experts)
        num_loads, elsewhere = 0, on_host
        for group in before:  # computed when it is there; then its places are the next one's
            num_loads += self._use(layer, group, elsewhere)
            self.now, elsewhere = self._ready(layer, group), []
        num_loads += self._use(layer, last, elsewhere)
        self.full_hits += not num_loads and not on_host
        num_ahead = self._predict(layer, predictions)
        if splitter is not None and on_host and splitter.slots_pay:
            self._keep(layer, on_host, only_free=not splitter.copies_pay)
        ready = self._ready(layer, last)
        layer_s = self.layer_s
        if splitter is not None and on_host:
            costs = splitter.costs
            host_s = sum(costs.host(tokens_of[e]) for e in on_host) + costs.hand_over_s
            # What the device has it computes meanwhile, unless that is the same processor.
            spared_s = sum(costs.device(tokens_of[e]) for e in on_host)
            layer_s = max(0.0, layer_s - spared_s)
            here_s = sum(costs.device(tokens_of[e]) for e in ways.here)
            here_s = 0.0 if costs.shares_cores else here_s
            layer_s -= min(here_s, layer_s, max(ready - start, host_s))
            ready = max(ready, start + host_s)
            self.host_s += host_s
            self.host_experts += len(on_host)
        self.stall_s += ready - start
        fetching_s = self.fetch_s * (num_loads + num_ahead) + self.copying_s * num_ahead
        self.now = ready + layer_s + fetching_s

    def _groups(self, layer: int, experts: Sequence[int]) -> list[Sequence[int]]:
        """All at once, or as many as a token has if there are too few places, as the engine."""
        cache = self.cache
        slots = cache.slots if isinstance(cache.slots, int) else cache.slots[layer]
        most = slots + cache.num_staging - MAX_IN_FLIGHT
        if self.top_k is None or len(experts) <= max(most, self.top_k):
            return [experts]
        return [experts[i : i + self.top_k] for i in range(0, len(experts), self.top_k)]

    def _use(self, layer: int, experts: Sequence[int], elsewhere: Sequence[int]) -> int:
        """Asks for experts of a layer; returns how many were missing."""
        cache, link = self.cache, self.link
        cache.unpin()
        loads = cache.use(layer, experts, link.advance(self.now), elsewhere)
        for expert in experts:
            key = self._keys[layer][expert]
            if link.waits(key):  # predicted, and not begun
                link.demand(key, self.now)
        for load in loads:
            self._start(link.demand, load)
        return len(loads)

    def _ready(self, layer: int, experts: Sequence[int]) -> float:
        """When these are here."""
        return max([self.now, *(self.link.arrival(self._keys[layer][e]) for e in experts)])

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook:
        """See ``residency.experts.DeviceExperts.outlook``."""
        here, coming = [], {}
        for expert in experts:
            key = self._keys[layer][expert]
            if key not in self.cache or self.link.waits(key):
                continue
            if (arrives := self.link.comes_at(key)) <= self.now:
                here.append(expert)
            else:
                coming[expert] = arrives - self.now
        return Outlook(here, coming, max(0.0, self.link.free_at - self.now))

    def _call_off(self, layer: int, ways: Ways) -> None:
        for expert in ways.host:
            self._drop_waiting(self._keys[layer][expert])

    def _drop_waiting(self, key: ExpertKey) -> None:
        if self.link.waits(key):
            self.link.drop(key)
            self.cache.forget(key)

    def _predict(self, layer: int, predictions: Sequence[tuple[int, Sequence[int]]]) -> int:
        """Returns how many copies were asked for."""
        num_asked = 0
        cache, link, splitter, now = self.cache, self.link, self.splitter, self.now
        for key in cache.pass_layer(layer):
            self._drop_waiting(key)
        busy = link.advance(now)
        for target, experts in predictions:
            for expert in experts:
                if expert < 0:
                    continue
                key = self._keys[target][expert]
                is_late = splitter is not None and not splitter.in_time(target, link.num_waiting)
                if is_late and key not in cache:
                    continue
                if load := cache.speculate(key, busy):
                    self._start(link.prefetch, load)
                    num_asked += 1
        return num_asked

    def _keep(self, layer: int, experts: Sequence[int], only_free: bool) -> None:
        if only_free and not self.cache.num_free(layer):
            return
        if self.link.num_waiting or self.link.free_at > self.now:
            return
        for expert in experts:
            if load := self.cache.keep(self._keys[layer][expert]):
                self._start(self.link.prefetch, load)
                return

    def _start(self, ask: Callable[[ExpertKey, float], None], load: Load) -> None:
        for key in load.evicted:
            self.link.drop(key)
        ask(load.key, self.now)
