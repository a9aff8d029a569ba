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

LFU_DECAY = 0.95


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
        self._last_use: defaultdict[ExpertKey, int] = defaultdict(int)

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        clock = self._clock
        for key in keys:
            clock += 1
            self._last_use[key] = clock
        self._clock = clock

    def forget(self, key: ExpertKey) -> None:
        self._last_use.pop(key, None)

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return min(candidates, key=self._last_use.__getitem__)


class LFU(Eviction):
    """Gives up the least frequently used, where older uses count less.

    A use counts decay ** n after n more steps of its layer. Uses are counted whether the expert
    is in the cache or not. What is kept is the logarithm of the count at step 0: so that nothing
    has to be updated when time passes, and nothing overflows.
    """

    def __init__(self, decay: float = LFU_DECAY):
        if not 0 < decay <= 1:
            raise RequestError(
                "the decay of an eviction rule is out of range",
                got=decay,
                expected="0 < decay <= 1",
            )
        self._rate = -math.log(decay)
        self._steps: dict[int, int] = defaultdict(int)
        self._log_count: defaultdict[ExpertKey, float] = defaultdict(lambda: -math.inf)

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        if not keys:
            return
        layer = keys[0].layer
        self._steps[layer] += 1
        one = self._rate * self._steps[layer]
        for key in keys:
            before = self._log_count[key]
            high, low = (one, before) if one >= before else (before, one)
            self._log_count[key] = high + math.log1p(math.exp(low - high))

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return min(candidates, key=self._log_count.__getitem__)


class Likely(Eviction):
    """Gives up what is least likely to be used soon, and keeps nothing that is less likely yet.

    Likely is what followed the experts of the layer's last step before (the mean over them of how
    often it came next), and what was used often lately: half of the share of steps that used it,
    where a step counts decay ** n after n more. On recorded routing of Mixtral-8x7B it beats LRU
    for any number of slots: docs/measurements/cache-policies.md.
    """

    _FREQUENCY_WEIGHT = 0.5

    def __init__(self, decay: float = 0.97):
        self._decay = decay
        self._layers: dict[int, _LayerHistory] = defaultdict(_LayerHistory)

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self._layers[keys[0].layer].enter([key.expert for key in keys], self._decay)

    def victim(self, candidates: Iterable[ExpertKey]) -> ExpertKey:
        return min(candidates, key=self._likelihood)

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        return self._likelihood(key) > self._likelihood(victim)

    def _likelihood(self, key: ExpertKey) -> float:
        history = self._layers[key.layer]
        if history.likelihoods is None:
            history.likelihoods = history.estimate(self._decay, self._FREQUENCY_WEIGHT)
        return history.likelihoods.get(key.expert, 0.0)


class _LayerHistory:
    """What a layer used: its last step, the steps before, and what came after what."""

    def __init__(self):
        self.step = 0
        self.last: list[int] = []
        self.shares: dict[int, tuple[float, int]] = {}  # by expert, and as of which step
        # How often anything came after an expert, and how often which.
        self.num_followed: dict[int, int] = defaultdict(int)
        self.followers: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.likelihoods: dict[int, float] | None = None  # after this step, once they are needed

    def enter(self, experts: list[int], decay: float) -> None:
        self.step += 1
        for expert in experts:  # first: Ctrl-C must leave no follower that has no share
            share, step = self.shares.get(expert, (0.0, 0))
            self.shares[expert] = (share * decay ** (self.step - step) + 1 - decay, self.step)
        for used in self.last:
            self.num_followed[used] += 1
            followers = self.followers[used]
            for expert in experts:
                followers[expert] += 1
        self.last = experts
        self.likelihoods = None

    def estimate(self, decay: float, frequency_weight: float) -> dict[int, float]:
        """By expert; of those that were used."""
        likelihoods = {
            expert: frequency_weight * share * decay ** (self.step - step)
            for expert, (share, step) in self.shares.items()
        }
        for used in self.last:
            each = 1 / ((self.num_followed[used] + 1) * len(self.last))
            for expert, count in self.followers[used].items():
                likelihoods[expert] += count * each
        return likelihoods


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
EVICTIONS = ("lru", "lfu", "likely", "random")


def make_eviction(name: str, *, seed: int = 0) -> Eviction:
    """The rule of a name in EVICTIONS; the seed is for random (RequestError: unknown)."""
    match name:
        case "lru":
            return LRU()
        case "lfu":
            return LFU()
        case "likely":
            return Likely()
        case "random":
            return Random(seed)
    raise RequestError(
        "unknown eviction rule", got=name, expected=" or ".join(EVICTIONS), do="choose one of these"
    )
