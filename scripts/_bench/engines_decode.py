"""Decode steps of all engines in turn, and of the compiled one by what it fetches ahead.

Engines are warm: they go on with the experts of the generation before, which made the same text.
Where a program adds in another order that text may be another one; then so are the experts that
it needs, and a row says so. Slots are equal, staging is what each engine needs at least: the thread
keeps experts there, too, which gives it more hits the fewer layers there are.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _bench.offload_subject import OffloadSubject, Run
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.planning.policy import NUM_PROMPT_PLACES, least_staging

TOKENS_PER_CALL = (1, 8)  # of the compiled engine
LOOKAHEADS = (0, 1)  # of the thread engine, in layers

_Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Contestant:
    """An engine, and how it decodes.

    Attributes:
      name: of its row.
      engine: that other contestants may use, too.
      slots: per layer; None of the engine that has no cache.
      fields: of the policy.
    """

    name: str
    engine: ResidentEngine | OffloadEngine
    slots: int | None = None
    fields: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def run(self, subject: OffloadSubject) -> Run:
        engine = self.engine
        if isinstance(engine, OffloadEngine):
            policy = dataclasses.replace(engine.plan.policy, **self.fields)
            engine.plan = dataclasses.replace(engine.plan, policy=policy)
            assert policy.lookahead is not None
            engine.lookahead = policy.lookahead
        return subject.run(engine)

    @property
    def num_staging(self) -> int | None:
        if isinstance(self.engine, OffloadEngine):
            return self.engine.plan.policy.num_staging
        return None

    def close(self) -> None:
        if isinstance(self.engine, OffloadEngine):
            self.engine.places.close()  # not the engine, which would close the store of all


def measure(subject: OffloadSubject, settings: Settings, report: Report) -> list[_Row]:
    """All engines, with slots for all experts and for half of them, beside the resident one."""
    config = subject.base.config
    contestants = [_Contestant(name="resident", engine=subject.resident())]
    for slots in dict.fromkeys((config.router.num_experts, _half(subject))):
        thread = subject.engine(slots, least_staging(config), 0, None, engine="thread")
        compiled = _compiled(subject, slots)
        for n in LOOKAHEADS:
            name = f"thread, {n} ahead" if n else "thread"
            contestants.append(
                _Contestant(name=name, engine=thread, slots=slots, fields={"lookahead": n})
            )
        for n in TOKENS_PER_CALL:
            name = f"compiled, {n} a call" if n > 1 else "compiled"
            contestants.append(
                _Contestant(name=name, engine=compiled, slots=slots, fields={"tokens_per_call": n})
            )
    return _measure("decode", subject, settings, report, contestants)


def measure_ahead(subject: OffloadSubject, settings: Settings, report: Report) -> list[_Row]:
    """The compiled engine with slots for half of the experts, beside not fetching ahead."""
    slots = _half(subject)
    contestants = [
        _Contestant(
            name=f"{n} ahead",
            engine=_compiled(subject, slots),
            slots=slots,
            fields={"fetch_ahead": n},
        )
        for n in dict.fromkeys((0, 1, subject.base.config.router.top_k))
    ]
    return _measure("ahead", subject, settings, report, contestants)


def _half(subject: OffloadSubject) -> int:
    router = subject.base.config.router
    return max(router.top_k, router.num_experts // 2)


def _compiled(subject: OffloadSubject, slots: int) -> OffloadEngine:
    return subject.engine(slots, NUM_PROMPT_PLACES, 0, None, engine="compiled")


def _measure(
    part: str,
    subject: OffloadSubject,
    settings: Settings,
    report: Report,
    contestants: Sequence[_Contestant],
) -> list[_Row]:
    """Runs engines in turn, and reports them beside the first one."""
    turns = {
        f"{contestant.name}, {contestant.slots} slots": lambda contestant=contestant: (
            contestant.run(subject)
        )
        for contestant in contestants
    }
    try:
        results, neighbours = watch_turns(part, turns, settings)
    finally:
        for contestant in contestants:
            contestant.close()
    beside, *_ = results.values()
    rows: list[_Row] = []
    for contestant, runs in zip(contestants, results.values(), strict=True):
        row = {
            "test": part,
            "what": contestant.name,
            "slots_per_layer": contestant.slots,
            "num_staging": contestant.num_staging,
            "beside": contestants[0].name,
            **_row(subject, runs, beside),
            "neighbours_cpu_share": neighbours,
        }
        with_all = [other for other in rows if other["what"] == contestant.name]
        row["fetch_bytes_per_s"] = _fetch_speed(row, with_all[0]) if with_all else None
        rows.append(row)
        report.table({title: cell(row) for title, cell in _COLUMNS.items()})
    return rows


def _row(subject: OffloadSubject, runs: list[Run], beside: list[Run]) -> _Row:
    tokens, num_layers = subject.new_tokens, subject.num_layers
    seconds, other = ([run.decode_s / tokens for run in some] for some in (runs, beside))
    pairs = list(zip(seconds, other, strict=True))
    traffic = runs[-1].traffic
    row = {
        "s_per_token": _summary(seconds),
        "ratio": _summary([a / b for a, b in pairs]),
        "ratio_of_best": min(seconds) / min(other),
        "more_s_per_layer": _summary([(a - b) / num_layers for a, b in pairs]),
        "more_s_per_layer_of_best": (min(seconds) - min(other)) / num_layers,
        "same_text": all(run.token_ids == subject.token_ids for run in runs),
        "traffic": traffic and traffic.to_json(),
    }
    if traffic is not None:
        row["copied_bytes_per_token"] = traffic.copied_bytes / tokens
        row["copied_bytes_per_s"] = traffic.copied_bytes / runs[-1].decode_s
        # A program does not tell when it copies.
        busy_s = traffic.link_busy_s
        row["link_bytes_per_s"] = traffic.copied_bytes / busy_s if busy_s else None
    return row


def _fetch_speed(row: _Row, with_all: _Row) -> float | None:
    """Bytes that were copied by the time that it took more than with all experts there."""
    more_s = row["s_per_token"]["median"] - with_all["s_per_token"]["median"]
    return row["copied_bytes_per_token"] / more_s if more_s > 0 else None


def _summary(samples: list[float]) -> _Row:
    # Without the spread, a share of the median: that may be 0 here.
    return dataclasses.asdict(summarize(samples))


def _range(summary: _Row) -> str:
    return f"{1e3 * summary['min']:.3g} - {1e3 * summary['max']:.3g}"


def _gigabytes(bytes_per_s: float | None) -> str:
    return "" if not bytes_per_s else f"{bytes_per_s / 1e9:.3g}"


def _of_traffic(cell: Callable[[_Row], str]) -> Callable[[_Row], str]:
    return lambda row: "" if row["traffic"] is None else cell(row)


_COLUMNS: dict[str, Callable[[_Row], str]] = {
    f"{'engine':18}": lambda row: row["what"],
    "slots": lambda row: str(row["slots_per_layer"] or ""),
    "ms/token": lambda row: f"{1e3 * row['s_per_token']['median']:.3g}",
    "  min - max": lambda row: _range(row["s_per_token"]),
    "ratio": lambda row: f"{row['ratio']['median']:.2f}",
    "of best": lambda row: f"{row['ratio_of_best']:.2f}",
    "us more per layer": lambda row: f"{1e6 * row['more_s_per_layer']['median']:.0f}",
    "of best us": lambda row: f"{1e6 * row['more_s_per_layer_of_best']:.0f}",
    "hits": _of_traffic(lambda row: f"{row['traffic']['hit_rate']:.1%}"),
    "useless": _of_traffic(lambda row: str(row["traffic"]["useless_prefetches"])),
    "MB/token": _of_traffic(lambda row: f"{row['copied_bytes_per_token'] / 1e6:.3g}"),
    "GB/s": lambda row: _gigabytes(row.get("copied_bytes_per_s")),
    "by link": lambda row: _gigabytes(row.get("link_bytes_per_s")),
    "by more ms": lambda row: _gigabytes(row["fetch_bytes_per_s"]),
    "text": lambda row: "same" if row["same_text"] else "another",
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}
