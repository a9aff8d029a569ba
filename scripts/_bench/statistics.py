"""Repetitions in turn, and what is quoted of them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What is quoted of repeated measurements, and the measurements."""

    median: float
    min: float
    max: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Distance of the extremes as a share of the median; 0 of what is always nothing."""
        return (self.max - self.min) / self.median if self.median else 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"spread": self.spread}


def summarize(samples: Sequence[float]) -> Summary:
    return Summary(statistics.median(samples), min(samples), max(samples), tuple(samples))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """A peer's speed, and ours as a multiple of it, repetition by repetition.

    Neighbours in time share the machine's mood, so that the ratios of pairs vary less than
    either speed.
    """
    ratios = summarize([a / b for a, b in zip(ours, theirs, strict=True)])
    return {
        "tok_per_s": summarize(theirs).to_json(),
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
        # Neither is disturbed in its best repetition, on a machine that others use too.
        "ratio_of_best": max(ours) / max(theirs),
        "pair_ratio": ratios.to_json(),
    }


def take_turns(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int,
    limits: Mapping[str, int] | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, list[Any]]:
    """Runs each contestant once per repetition, in the order given: A B A B.

    Args:
      contestants: functions that run one repetition and return its result.
      repeats: results to keep of each.
      warmup: repetitions before those, whose results are dropped.
      limits: fewer repetitions of slow contestants, who take part in the first ones only.
      progress: called after every call of a contestant.

    Returns:
      The results of each contestant, in order.
    """
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for repetition in range(warmup + repeats):
        for name, run in contestants.items():
            if limits and len(results[name]) >= limits.get(name, repeats):
                continue
            result = run()
            if repetition >= warmup:
                results[name].append(result)
            progress()
    return results
