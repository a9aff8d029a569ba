"""Which of a layer's missing experts the host computes, decided while a model runs.

Engines and the simulator ask the same object; only their clocks differ.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from jmoe.planning.cost import Absent, ExpertCosts, split
from jmoe.planning.policy import Misses
from jmoe.residency.experts import Outlook

# Of the mean time of a layer, per layer.
_SMOOTHING = 0.05
# How much slower the host must be than the device for copies to pay.
_ADVANTAGE = 1.1


class Ways(NamedTuple):
    """How the experts of a layer are served.

    Attributes:
      here: are on the device.
      coming: will be copied, or are under way.
      host: are computed there.
    """

    here: list[int]
    coming: list[int]
    host: list[int]


class Held(Protocol):
    """What the device holds of a layer: ``DeviceExperts``."""

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook: ...


class Splitting(Protocol):
    """Says which experts the host computes: ``Splitter``, or one for a purpose of its own."""

    @property
    def slots_pay(self) -> bool: ...
    @property
    def copies_pay(self) -> bool: ...
    def split(
        self,
        held: Held,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int],
        *,
        is_prompt: bool = False,
    ) -> Ways: ...
    def in_time(self, layer: int, num_queued: int) -> bool: ...


class Splitter:
    """Decides by a cost model, and keeps a record from which a run can be repeated exactly.

    Attributes:
      costs: of an expert.
      misses: what becomes of missing experts; may be changed between steps.
      record: by layer of every step the experts that the host computed.
    """

    def __init__(
        self,
        costs: ExpertCosts,
        misses: Misses = "split",
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Args:
        costs: of an expert.
        misses: what becomes of missing experts; see ``Policy``.
        clock: what time it is, in seconds.
        """
        self.costs = costs
        self.record: list[tuple[int, ...]] = []
        self.misses: Misses = misses
        self._replay: Iterator[Sequence[int]] | None = None
        self.clock = clock
        self._backlog_s = 0.0
        self._layer_s = 0.0
        self._last_s: float | None = None
        self._layer = 0

    def replay(self, record: Iterable[Sequence[int]]) -> None:
        """Follows an earlier record from now on, whatever is on the device."""
        self._replay = iter(record)

    @property
    def slots_pay(self) -> bool:
        """Whether an expert is better on the device than on the host."""
        return self.costs.host(1) > _ADVANTAGE * self.costs.device(1)

    @property
    def copies_pay(self) -> bool:
        """Whether to copy experts while tokens are made; into free slots it always pays."""
        return self.slots_pay and self.misses != "host"

    def split(
        self,
        held: Held,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int],
        *,
        is_prompt: bool = False,
    ) -> Ways:
        """Serves the experts of a layer.

        Args:
          held: what is on the device.
          layer: whose turn it is.
          experts: distinct, that its tokens chose.
          tokens: of each.
          is_prompt: whose layers take longer, which says nothing about decode steps.
        """
        if not is_prompt:
            self._take_time(layer)
        ways = self._ways(held, layer, experts, tokens)
        self.record.append(tuple(ways.host))
        return ways

    def in_time(self, layer: int, num_queued: int) -> bool:
        """Whether one more copy would come in time for a layer, behind so many others.

        In time is before the host would have computed the expert. What comes later would have been
        computed by then, and the link has better things to do. What is predicted for further layers
        than the next is right less often, and comes only if nothing else waits.
        """
        if self.misses == "load":
            return layer == self._layer + 1
        if not self.copies_pay:
            return False
        if layer > self._layer + 1 and num_queued:
            return False
        arrives_s = self._backlog_s + (num_queued + 1) * self.costs.copy_s
        return arrives_s <= (layer - self._layer) * self._layer_s + self.costs.host(1)

    def _ways(self, held: Held, layer: int, experts: Sequence[int], tokens: Sequence[int]) -> Ways:
        costs = self.costs
        outlook = held.outlook(layer, experts, costs.copy_s)
        self._backlog_s = outlook.backlog_s
        tokens_of = dict(zip(experts, tokens, strict=True))
        if self._replay is not None:
            host = list(next(self._replay))
            others = [e for e in experts if e not in host]
            here = [e for e in others if e in outlook.here]
            return Ways(here, [e for e in others if e not in here], host)
        here = list(outlook.here)
        if len(here) == len(experts):
            return Ways(here, [], [])
        absent = [
            Absent(expert, tokens_of[expert], outlook.coming.get(expert))
            for expert in experts
            if expert not in here
        ]
        if self.misses == "load":
            return Ways(here, [a.expert for a in absent], [])
        if self.misses == "host":
            return Ways(here, [], [a.expert for a in absent])
        result = split(
            absent,
            costs,
            backlog_s=outlook.backlog_s,
            present_s=sum(costs.device(tokens_of[e]) for e in here),
        )
        return Ways(here, list(result.device), list(result.host))

    def _take_time(self, layer: int) -> None:
        now_s = self.clock()
        if self._last_s is not None and layer == self._layer + 1:
            seconds = now_s - self._last_s
            self._layer_s += (_SMOOTHING if self._layer_s else 1.0) * (seconds - self._layer_s)
        self._last_s, self._layer = now_s, layer
