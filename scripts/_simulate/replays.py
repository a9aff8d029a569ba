"""Replays of a trace: which rules there are, and what each learns from."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jmoe.errors import RequestError
from jmoe.planning import predictors
from jmoe.planning.policy import MISSES
from jmoe.planning.simulate import SimulationResult, simulate
from jmoe.planning.traces import RoutingTrace
from jmoe.residency.eviction import StaticPopularity

RULES = {
    "lru": "least recently used goes",
    "lfu": "least frequently used goes, uses decaying by 0.95",
    "likely": "least likely to be used soon goes",
    "random": "any goes",
    "popular": "the most popular experts stay; learnt from other sequences",
    "fixed": "experts chosen at random stay",
    "belady": "what is needed last goes: the optimum of loading what is missing",
    "pool": "lru in one pool for all layers",
}
_LEARNING = ("popular",)
_LEARNING_PREDICTORS = ("popularity", "markov")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One policy, and what came of it."""

    slots: int  # of each layer
    rule: str
    predictor: str
    way: str  # in which misses are served
    result: SimulationResult

    def to_json(self) -> dict:
        names = ("slots", "rule", "predictor", "way")
        return {name: getattr(self, name) for name in names} | self.result.to_json()


class Traces:
    """A trace, and its parts to learn from and to test on, if something has to be learnt.

    Every other sequence is learnt from, unless a trace is given for that.
    """

    def __init__(self, file: str, train_file: str | None):
        self.whole = RoutingTrace.load(file)
        self.name = Path(file).name
        sequences = range(self.whole.num_sequences)
        self.train, self.test = None, self.whole
        if train_file is not None:
            self.train = RoutingTrace.load(train_file, num_experts=self.whole.num_experts)
        elif len(sequences) > 1:
            self.train = self.whole.select(sequences[::2])
            self.test = self.whole.select(sequences[1::2])
        if self.whole.num_tokens == 0:
            raise RequestError(
                "the trace has no decode tokens", where=file, do="record a longer generation"
            )

    def choose(self, rule: str, predictor: str) -> tuple[RoutingTrace, RoutingTrace | None]:
        """What to replay, and what to learn from."""
        if rule not in _LEARNING and predictor not in _LEARNING_PREDICTORS:
            return self.whole, None
        if self.train is None:
            raise RequestError(
                f"{rule if rule in _LEARNING else predictor} needs something to learn from",
                got="a trace of one sequence",
                do="add --train=FILE with another trace, or leave it out",
            )
        return self.test, self.train

    def to_json(self) -> dict:
        trace = self.whole
        names = ("num_tokens", "num_sequences", "num_layers", "num_experts", "top_k")
        return {"name": self.name} | {name: getattr(trace, name) for name in names}

    def describe(self) -> str:
        trace = self.whole
        return (
            f"{self.name}: {trace.num_tokens:,} tokens of {trace.num_sequences} sequences, "
            f"{trace.num_layers} layers of {trace.num_experts} experts (top {trace.top_k})"
        )


def choose_names(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """Names out of a comma-separated flag (RequestError)."""
    names = list(default) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RequestError(
                f"there is no {name!r}",
                expected=", ".join(known),
                do="choose from these, separated by commas",
            )
    return list(dict.fromkeys(names))


def choose_slots(text: str | None, num_experts: int) -> list[int]:
    """Numbers of slots out of a comma-separated flag, ascending (RequestError)."""
    if text is None:
        steps = min(num_experts, 8)
        return sorted({max(1, num_experts * i // steps) for i in range(1, steps)} or {1})
    try:
        slots = sorted({int(number) for number in text.split(",")})
    except ValueError:
        slots = [-1]
    if slots[0] < 0 or slots[-1] > num_experts:
        raise RequestError(
            "--slots is no list of slots for each layer",
            got=text,
            expected=f"numbers from 0 to {num_experts}, separated by commas",
        )
    return slots


def choose_ways(
    text: str | None, *, host_s: float | None, device_s: float, layer_s: float, has_link: bool
) -> tuple[list[str], dict[str, float]]:
    """How misses are served, and what ``simulate`` needs to know for it (RequestError)."""
    ways = choose_names(text, MISSES, ["load"])
    with_host = ways != ["load"]
    asked = {"--misses": with_host, "--host_s": host_s is not None, "--device_s": device_s > 0}
    flag = next((flag for flag, is_asked in asked.items() if is_asked), None)
    if flag is not None and not has_link:
        raise RequestError(
            f"{flag} says what takes which time, and needs the speed of a link",
            do="add --link_bytes_per_s, as in 11e9",
        )
    if flag is not None and not with_host:
        raise RequestError(
            f"{flag} is for experts that the host may compute",
            got="--misses=load",
            do="add --misses=load,split,host, or leave it out",
        )
    if with_host and (host_s is None or not 0 < host_s < math.inf):
        raise RequestError(
            "--misses needs the time in which the host computes an expert",
            got=None if host_s is None else f"--host_s={host_s:g}",
            do="give it, as in --host_s=4e-3",
        )
    if device_s > layer_s:
        raise RequestError(
            "an expert takes a part of the time of its layer",
            got=f"--device_s={device_s:g}",
            expected=f"at most --layer_s={layer_s:g}",
        )
    return ways, {"host_s": host_s or 0.0, "device_s": device_s} if with_host else {}


def choose_recall(text: str | None, predicted: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """What ``simulate`` needs to know of noisy predictions (RequestError)."""
    if (text is not None) != ("noisy" in predicted):
        raise RequestError(
            "noisy predictions and --recall go together",
            got="--predictors=" + ",".join(predicted) + ("" if text is None else f", {text!r}"),
            do="give both, as in --predictors=noisy --recall=0.8, or neither",
        )
    if text is None:
        return {}
    try:
        return {"recall": tuple(float(share) for share in text.split(","))}
    except ValueError:
        raise RequestError(
            "--recall is no list of shares", got=text, expected="one for each layer ahead"
        ) from None


def choose_link(
    bytes_per_s: float | None, expert_bytes: float | None, *, latency_s: float, layer_s: float
) -> dict[str, float]:
    """What ``simulate`` needs to know of times; empty without a link (RequestError)."""
    if bytes_per_s is None:
        if expert_bytes is not None or latency_s or layer_s:
            raise RequestError(
                "times need the speed of a link", do="add --link_bytes_per_s, as in 11e9"
            )
        return {}
    if expert_bytes is None or not 0 < bytes_per_s < math.inf or not expert_bytes < math.inf:
        raise RequestError(
            "a link needs a speed above 0, and experts a size",
            got=f"--link_bytes_per_s={bytes_per_s:g}"
            + ("" if expert_bytes is None else f", --expert_bytes={expert_bytes:g}"),
            do="give both, as in --link_bytes_per_s=11e9 --expert_bytes=66e6",
        )
    return {
        "bytes_per_s": bytes_per_s,
        "blob_bytes": int(expert_bytes),
        "latency_s": latency_s,
        "layer_s": layer_s,
    }


def replay(
    traces: Traces, num_slots: int, rule: str, predictor: str, way: str, seed: int, **arguments
) -> Replay:
    """Replays one policy; arguments are those of ``simulate``."""
    trace, train = traces.choose(rule, predictor)
    num_layers = trace.num_layers
    slots: list[int] | int = [num_slots] * num_layers
    eviction = rule
    if rule == "popular":
        eviction = "popularity"
    elif rule == "fixed":
        shape = (num_layers, trace.num_experts)
        eviction = StaticPopularity(np.random.default_rng(seed).random(shape).tolist())
    elif rule == "pool":
        slots, eviction = num_slots * num_layers, "lru"
    result = simulate(
        trace,
        slots=slots,
        eviction=eviction,
        predictor=predictor,
        train=train,
        misses=way,  # type: ignore[arg-type]
        seed=seed,
        **arguments,
    )
    return Replay(slots=num_slots, rule=rule, predictor=predictor, way=way, result=result)


def prediction_floor(
    traces: Traces, lookahead: int, fetch: int
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Recall by distance and number fetched: from the ids alone, and as recorded."""
    rates: dict[str, tuple[tuple[float, ...], ...]] = {}

    def add(name: str, measure: Callable[[], np.ndarray]) -> None:
        rates[name] = tuple(tuple(row) for row in measure().tolist())

    if traces.train is not None:
        test, train = traces.test, traces.train
        for name in _LEARNING_PREDICTORS:
            predicted = predictors.predict(test, name, lookahead, fetch, train)
            add(name, lambda predicted=predicted: predictors.recall(test, predicted))
    recorded = traces.whole.predictions
    if recorded is not None:
        add("recorded", lambda: predictors.recall(traces.whole, recorded))
    return rates
