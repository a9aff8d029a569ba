"""What a loop over layers costs beside a decode step that is one program."""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from _bench.machine import Neighbours
from _bench.offload_subject import OffloadSubject
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize, take_turns
from jmoe.engines.offload import OffloadEngine
from jmoe.residency.timeline import Timeline, Track

_METHODS = ("need", "predict", "take", "pass_layer", "release")


def measure(subject: OffloadSubject, settings: Settings, report: Report) -> list[dict[str, Any]]:
    """All experts resident: the loop against the one-executable step, and where its time goes."""
    resident, loop, num_layers = subject.resident(), subject.base, subject.num_layers
    contestants: dict[str, Callable[[], Any]] = {
        "loop": lambda: subject.run(loop),
        "one program": lambda: subject.run(resident),
        "parts": lambda: _host_parts(subject, loop),
    }
    total = (settings.warmup + settings.repeats) * len(contestants)
    quiet = not sys.stderr.isatty()
    with (
        Neighbours() as neighbours,
        tqdm(desc="overhead", total=total, leave=False, delay=2, disable=quiet) as bar,
    ):
        results = take_turns(
            contestants, repeats=settings.repeats, warmup=settings.warmup, progress=bar.update
        )
    seconds = {
        name: [run.decode_s / subject.new_tokens for run in results[name]]
        for name in ("loop", "one program")
    }
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["one program"], strict=True)]
    more = [
        (a - b) / num_layers for a, b in zip(seconds["loop"], seconds["one program"], strict=True)
    ]
    best = min(seconds["loop"]), min(seconds["one program"])
    parts = {name: [part[name] for part in results["parts"]] for name in results["parts"][0]}
    # Of one run: sometimes a program is computed while it is dispatched, sometimes afterwards.
    least = min(results["parts"], key=lambda part: part["host"])
    row = {
        "test": "overhead",
        "loop_s_per_token": summarize(seconds["loop"]).to_json(),
        "one_program_s_per_token": summarize(seconds["one program"]).to_json(),
        "pair_ratio": summarize(ratios).to_json(),
        "ratio_of_best": best[0] / best[1],
        "more_s_per_layer": summarize(more).to_json(),
        "more_s_per_layer_of_best": (best[0] - best[1]) / num_layers,
        "host_s": {name: summarize(samples).to_json() for name, samples in parts.items()},
        "host_s_of_best": least,
        "same_text": all(run.token_ids == subject.token_ids for run in results["one program"]),
        "neighbours_cpu_share": neighbours.share,
    }
    report.table(
        {
            "loop ms": f"{1e3 * row['loop_s_per_token']['median']:.3g}",
            "one program": f"{1e3 * row['one_program_s_per_token']['median']:.3g}",
            "ratio": f"{row['pair_ratio']['median']:.2f}",
            "of best": f"{row['ratio_of_best']:.2f}",
            "us more per layer": f"{1e6 * row['more_s_per_layer_of_best']:.0f}",
            **{f"{name} us": f"{1e6 * seconds:.1f}" for name, seconds in least.items()},
            "neighbours": f"{row['neighbours_cpu_share']:.0%}",
        }
    )
    return [row]


def _host_parts(subject: OffloadSubject, engine: OffloadEngine) -> dict[str, float]:
    """Medians of seconds, while one sequence is generated.

    Returns:
      host: of each layer, from when its experts' ids are on the host until the next program is
        dispatched; and its parts. Dispatch is what the others leave over.
      between tokens: likewise, from the last layer to the first one, the last program included.
      device: from the dispatch of a program until its ids are on the host.
    """
    experts, timeline = engine.experts, _Spans()
    samples: dict[str, list[float]] = defaultdict(list)
    for name in _METHODS:
        setattr(experts, name, _timed(getattr(experts, name), samples[name]))
    experts.timeline = timeline
    try:
        subject.run(engine)
    finally:
        experts.timeline = None
        for name in _METHODS:
            delattr(experts, name)
    num_layers = engine.num_layers
    spans = timeline.device
    gaps = [later_start - end for (_, end), (later_start, _) in pairwise(spans)]
    between = gaps[num_layers - 1 :: num_layers]
    within = [gap for i, gap in enumerate(gaps, 1) if i % num_layers]
    parts = {name: statistics.median(samples[name]) for name in _METHODS}
    host = statistics.median(within)
    rest = {"dispatch": host - sum(parts.values())}
    device = statistics.median(end - start for start, end in spans)
    return {
        "host": host,
        **parts,
        **rest,
        "between tokens": statistics.median(between) if between else 0.0,
        "device": device,
    }


class _Spans(Timeline):
    """Keeps when the device was waited for, nothing else."""

    def __init__(self):
        super().__init__(max_events=0)
        self.device: list[tuple[float, float]] = []

    def span(self, track: Track, name: str, start_s: float, end_s: float, **args: Any) -> None:
        if track == "device":
            self.device.append((start_s, end_s))


def _timed(function: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        samples.append(time.perf_counter() - start)
        return result

    return timed
