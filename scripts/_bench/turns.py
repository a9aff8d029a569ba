"""Repetitions in turn, with progress on a terminal, and what neighbours took meanwhile."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from _bench.machine import Neighbours
from _bench.settings import Settings
from _bench.statistics import take_turns


def watch_turns(
    part: str, contestants: Mapping[str, Callable[[], Any]], settings: Settings
) -> tuple[dict[str, list[Any]], float]:
    """The results of each contestant, and the share of all cores that other processes used.

    Args:
      part: what is measured, to be shown.
      contestants: functions that run one repetition and return its result.
      settings: how many repetitions.
    """
    total = (settings.warmup + settings.repeats) * len(contestants)
    quiet = not sys.stderr.isatty()
    with (
        Neighbours() as neighbours,
        tqdm(desc=part, total=total, leave=False, delay=2, disable=quiet) as bar,
    ):
        results = take_turns(
            contestants, repeats=settings.repeats, warmup=settings.warmup, progress=bar.update
        )
    return results, neighbours.share
