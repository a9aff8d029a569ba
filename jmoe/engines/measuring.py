"""Repeats measurements in turn within a budget of time, and says how much they vary.

In turn, so that what disturbs the machine for a while disturbs all of them a little, and not one of
them in all its repetitions.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable

import numpy as np

MIN_SAMPLES = 3
MAX_SAMPLES = 40
# Of what takes as long as that together, fewer samples will do.
ENOUGH_S = 0.2
# What takes less is done several times in a row, where a row is what an engine does.
ROW_S = 2e-3
MAX_ROW = 8

# That a clock can tell.
_LEAST_S = 1e-9

Clock = Callable[[], float]


def num_needed(seconds: float) -> int:
    """How many samples there have to be of what takes so long."""
    return min(MIN_SAMPLES, math.ceil(ENOUGH_S / max(seconds, _LEAST_S)))


@dataclasses.dataclass(slots=True)
class _Probe:
    run: Callable[[int], object]
    prepare: Callable[[], object] | None
    num: int  # in a row
    per: int  # parts of each
    is_quick: bool = False
    cost_s: float = 0.0  # of the last repetition, with what is not counted
    samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Samples without which nothing can be said."""
        return max(0, num_needed(self.cost_s) - len(self.samples))


class Rounds:
    """What is measured, each several times."""

    def __init__(self, budget_s: float, clock: Clock, settle: Callable[[], object] = lambda: None):
        """Args:
        budget_s: for all, the preparations since now included. It decides what is measured
          besides the least, and how often; a few repetitions there always are.
        clock: what time it is, in seconds.
        settle: done before each repetition, and not counted.
        """
        self._clock = clock
        self._settle = settle
        self._start_s = clock()
        self._budget_s = budget_s
        self._most = MAX_SAMPLES
        self._probes: dict[Hashable, _Probe] = {}

    def add(
        self,
        name: Hashable,
        run: Callable[[int], object],
        *,
        prepare: Callable[[], object] | None = None,
        num: int = 1,
        per: int = 1,
        in_rows: bool = False,
    ) -> float:
        """Measures something for the first time, after doing it once to warm up.

        Args:
          name: to ask for it.
          run: does it so many times, and waits for the end.
          prepare: done before each repetition of this, and not counted.
          num: how many times in each repetition.
          per: equal parts of which it consists, one of which is what is wanted.
          in_rows: whether to do it several times in a repetition if it is quick.

        Returns:
          Seconds of one part.
        """
        probe = self._probes[name] = _Probe(run, prepare, num, per)
        self._sample(probe)
        row_s = probe.samples.pop() * num * per
        if in_rows and row_s < ROW_S:
            probe.is_quick = True
            probe.num = min(MAX_ROW, max(1, int(ROW_S / max(row_s, _LEAST_S))))
        self._sample(probe)
        return probe.samples[0]

    def now_s(self) -> float:
        """What time it is, by the clock of all this."""
        return self._clock()

    def affords(self, more_s: float) -> bool:
        """Whether the budget has room for so much, beside what is to be repeated."""
        repeating_s = sum(probe.cost_s * probe.num_missing for probe in self._probes.values())
        return self._clock() - self._start_s + repeating_s + more_s <= self._budget_s

    def extend(self, budget_s: float) -> None:
        """Gives a budget from now on, for as many repetitions again."""
        self._start_s, self._budget_s = self._clock(), budget_s
        self._most += MAX_SAMPLES

    def repeat(self) -> None:
        """Repeats everything in turn until the budget is spent."""
        # Of the time that is left none takes more than twice its share.
        share_s = 2 * (self._budget_s - self._clock() + self._start_s) / len(self._probes)
        spent_s = dict.fromkeys(self._probes, 0.0)
        going = True
        while going:
            going = False
            for name, probe in self._probes.items():
                has_time = spent_s[name] + probe.cost_s <= share_s and self.affords(probe.cost_s)
                if probe.num_missing or (has_time and len(probe.samples) < self._most):
                    self._sample(probe)
                    spent_s[name] += probe.cost_s
                    going = True

    def seconds(self, name: Hashable) -> float:
        """What a part takes: the median, and above 0."""
        return max(_LEAST_S, statistics.median(self._probes[name].samples))

    def best_s(self, name: Hashable) -> float:
        """What a part takes if nothing disturbs it."""
        return max(_LEAST_S, min(self._probes[name].samples))

    @property
    def names(self) -> tuple[Hashable, ...]:
        return tuple(self._probes)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median; the median over everything."""
        spreads = []
        for probe in self._probes.values():
            low, middle, high = np.percentile(probe.samples, [25, 50, 75])
            spreads.append((high - low) / middle if middle > 0 else 0.0)
        return float(statistics.median(spreads))

    def _sample(self, probe: _Probe) -> None:
        begin_s = self._clock()
        if probe.prepare is not None:
            probe.prepare()
        self._settle()
        if probe.is_quick:
            # In an engine's loop the code is in the caches, if the weights are not.
            probe.run(1)
        start_s = self._clock()
        probe.run(probe.num)
        end_s = self._clock()
        probe.samples.append((end_s - start_s) / (probe.num * probe.per))
        probe.cost_s = end_s - begin_s
