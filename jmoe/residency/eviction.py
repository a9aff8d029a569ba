"""Which expert a full pool gives up: rules of eviction, pure and without arrays.

A rule sees what is used and is asked for a victim among keys that may go. It knows nothing of
places, pins or copies; the cache does.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from jmoe.errors import RequestError
from jmoe.residency.entries import ExpertKey


class Eviction(Protocol):
    """A rule. All but ``victim`` has a default, for rules that derive from this class."""

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        """These experts of one layer are used together, in this order: one step of the layer."""

    def forget(self, key: ExpertKey) -> None:
        """This expert has left the cache."""

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        """The one of these (at least one) to give up; the first of those that are equal."""
        ...

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """Whether a used expert may take the victim's slot; if not, it is not kept, if possible."""
        return True


class LRU(Eviction):
    """Gives up the least recently used."""

    def __init__(self):
        self._clock = 0
        self._last_use: dict[ExpertKey, int] = {}

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        clock = self._clock
        for key in keys:
            clock += 1
            self._last_use[key] = clock
        self._clock = clock

    def forget(self, key: ExpertKey) -> None:
        self._last_use.pop(key, None)

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        last_use = self._last_use
        return min(candidates, key=lambda key: last_use.get(key, 0))


class LFU(Eviction):
    """Gives up the least frequently used, where older uses count less.

    A use counts decay ** n after n more steps of its layer. Uses are counted whether the expert
    is in the cache or not. What is kept is the logarithm of the count at step 0: so that nothing
    has to be updated when time passes, and nothing overflows.
    """

    def __init__(self, decay: float = 0.95):
        if not 0 < decay <= 1:
            raise RequestError(
                "the decay of an eviction rule is out of range",
                got=decay,
                expected="0 < decay <= 1",
            )
        self._rate = -math.log(decay)
        self._steps: dict[int, int] = defaultdict(int)
        self._log_count: dict[ExpertKey, float] = {}

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        if not keys:
            return
        layer = keys[0].layer
        self._steps[layer] += 1
        one = self._rate * self._steps[layer]
        for key in keys:
            before = self._log_count.get(key, -math.inf)
            high, low = (one, before) if one >= before else (before, one)
            self._log_count[key] = high + math.log1p(math.exp(low - high))

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        log_count = self._log_count
        return min(candidates, key=lambda key: log_count.get(key, -math.inf))


class StaticPopularity(Eviction):
    """Keeps the experts that are popular on the whole: an unpopular one is used, but not kept."""

    def __init__(self, counts: Sequence[Sequence[float]]):
        """Takes how often each expert was used: [num_layers][num_experts]."""
        self._counts = [[float(count) for count in layer] for layer in counts]

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return min(candidates, key=self._count)

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        return self._count(key) > self._count(victim)

    def _count(self, key: ExpertKey) -> float:
        return self._counts[key.layer][key.expert]


class Random(Eviction):
    """Gives up any, the same ones for the same seed."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return self._random.choice(list(candidates))


class Belady(Eviction):
    """Gives up what is needed again last: the optimum of what demand loading can reach.

    For simulation: it knows the future, and ``touch`` has to be called exactly as announced.
    """

    def __init__(self, uses: Iterable[Sequence[ExpertKey]]):
        """Takes the groups of all calls of ``touch``."""
        times: dict[ExpertKey, list[int]] = defaultdict(list)
        for time, keys in enumerate(uses):
            for key in keys:
                times[key].append(time)
        self._coming = {key: list[float](reversed(t)) for key, t in times.items()}

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            self._coming[key].pop()

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return max(candidates, key=self._next_use)

    def _next_use(self, key: ExpertKey) -> float:
        coming = self._coming.get(key)
        return coming[-1] if coming else math.inf


# What a name alone can make.
EVICTIONS = ("lru", "lfu", "random")


def make_eviction(name: str, *, seed: int = 0) -> Eviction:
    """The rule of a name in EVICTIONS; the seed is for random (RequestError: unknown)."""
    match name:
        case "lru":
            return LRU()
        case "lfu":
            return LFU()
        case "random":
            return Random(seed)
    raise RequestError(
        "unknown eviction rule", got=name, expected=" or ".join(EVICTIONS), do="choose one of these"
    )
