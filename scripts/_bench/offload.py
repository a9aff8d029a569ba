"""The suite offload: how well moving experts hides behind computing, on links of several speeds."""

from collections.abc import Callable
from typing import Any

from _bench import offload_overhead, offload_plot
from _bench.offload_subject import OffloadSubject, Run
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.prediction import OraclePredictor
from jmoe.errors import RequestError

# Part overlap: places for two experts per layer, and staging for what is predicted.
OVERLAP_SLOTS, OVERLAP_STAGING = 2, 10
ORACLE_LAYERS = 4  # ahead
# Slots per layer in the paper: on GPUs with 12 and 16 GB.
PAPER_SLOTS = (2, 4)

_Row = dict[str, Any]


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports the parts that were asked for; returns all of it."""
    subject = OffloadSubject(settings)
    base = subject.base
    if not settings.copies and base.device.platform != "cpu":
        raise RequestError("--nocopies is for the CPU, which can compute from the host's memory")
    result = subject.describe(report)
    rows: dict[str, list[_Row]] = {}
    try:
        for part in settings.parts:
            rows[part] = _PARTS[part](subject, settings, type(report)())  # each with its own header
    finally:
        subject.close()
    if settings.plot is not None:
        _draw(settings.plot, subject, rows["paper"])
    return result | {"rows": rows}


def _overlap(subject: OffloadSubject, settings: Settings, report: Report) -> list[_Row]:
    """Decode time beside the larger of the link's and the computing time, by predictor."""
    rows = []
    for bytes_per_s in settings.links:
        engines = {}
        for name, lookahead in (("oracle", 0), ("gate 1", 1), ("gate 2", 2), ("none", 0)):
            engine = subject.engine(OVERLAP_SLOTS, OVERLAP_STAGING, lookahead, bytes_per_s)
            if name == "oracle":
                engine.predictor = OraclePredictor(subject.chosen_SLK, ORACLE_LAYERS)
            engines[name] = engine
        rows += _measure("overlap", subject, settings, report, engines, bytes_per_s)
    return rows


def _paper(subject: OffloadSubject, settings: Settings, report: Report) -> list[_Row]:
    """The rows of table 2 in the paper, and ours, on the link of middle speed."""
    bytes_per_s = sorted(settings.links)[len(settings.links) // 2]
    top_k = subject.base.config.router.top_k
    rows = []
    for slots in PAPER_SLOTS:
        engines = {
            "naive": subject.engine(0, top_k + 2, 0, bytes_per_s),
            "without LRU and pre-loading": subject.engine(0, top_k + 2, 0, bytes_per_s),
            "without pre-loading": subject.engine(slots, top_k + 2, 0, bytes_per_s),
            "full": subject.engine(slots, top_k + 2, 1, bytes_per_s),
        }
        _move_whole_layers(engines["naive"])
        rows += _measure("paper", subject, settings, report, engines, bytes_per_s, slots)
    return rows


def _move_whole_layers(engine: OffloadEngine) -> None:
    """Lets an engine copy all experts of every layer before it computes, keeping none."""
    experts, top_k = engine.experts, engine.config.router.top_k
    need = experts.need

    def need_all(layer: int, chosen: list[int]) -> None:
        others = [e for e in range(engine.config.router.num_experts) if e not in chosen]
        for first in range(0, len(others), top_k):
            group = others[first : first + top_k]
            need(layer, group)
            experts.take(layer, group)
            experts.release()
        need(layer, chosen)

    experts.need = need_all  # type: ignore[method-assign]


def _measure(
    part: str,
    subject: OffloadSubject,
    settings: Settings,
    report: Report,
    engines: dict[str, OffloadEngine],
    bytes_per_s: float,
    slots: int = OVERLAP_SLOTS,
) -> list[_Row]:
    """Runs engines in turn, and the one that only computes beside them."""
    contestants: dict[str, Callable[[], Run]] = {
        name: lambda engine=engine: subject.run_cold(engine) for name, engine in engines.items()
    }
    contestants["computing"] = lambda: subject.run(subject.base)
    results, neighbours_share = watch_turns(part, contestants, settings)
    for engine in engines.values():
        engine.experts.close()  # not the engine, which would close the store of all
    computing = results.pop("computing")
    assert all(run.traffic is not None and not run.traffic.copies for run in computing)
    rows = []
    for name, runs in results.items():
        row = _row(subject, runs, computing, bytes_per_s)
        row = {
            "test": part,
            "what": name,
            "link_bytes_per_s": bytes_per_s,
            "slots_per_layer": 0 if engines[name].plan.policy.num_slots == 0 else slots,
            "beside_slots_per_layer": slots,
            "num_staging": engines[name].plan.policy.num_staging,
            **row,
            "neighbours_cpu_share": neighbours_share,
        }
        naive = rows[0] if rows and part == "paper" else row
        row["speed_over_naive"] = row["tok_per_s"]["median"] / naive["tok_per_s"]["median"]
        row["speed_over_naive_of_best"] = row["tok_per_s"]["max"] / naive["tok_per_s"]["max"]
        rows.append(row)
        report.table({title: cell(row) for title, cell in _COLUMNS[part].items()})
    return rows


def _row(
    subject: OffloadSubject, runs: list[Run], computing: list[Run], bytes_per_s: float
) -> _Row:
    tokens = subject.new_tokens
    link_s = [subject.link_s(_traffic(run).copies, bytes_per_s) for run in runs]
    over_bound = [
        run.decode_s / max(link, alone.decode_s)
        for run, link, alone in zip(runs, link_s, computing, strict=True)
    ]
    # Undisturbed: the best repetition beside the best of computing.
    best = min(range(len(runs)), key=lambda i: runs[i].decode_s)
    best_compute_s = min(run.decode_s for run in computing)
    traffic = _traffic(runs[best])
    return {
        "tok_per_s": summarize([tokens / run.decode_s for run in runs]).to_json(),
        "link_s_per_token": link_s[best] / tokens,
        "compute_s_per_token": summarize([r.decode_s / tokens for r in computing]).to_json(),
        "over_bound": summarize(over_bound).to_json(),
        "over_bound_of_best": runs[best].decode_s / max(link_s[best], best_compute_s),
        "bound_by": "link" if link_s[best] > best_compute_s else "computing",
        "copies_per_token": traffic.copies / tokens,
        "traffic": traffic.to_json(),
    }


def _traffic(run: Run) -> Any:
    assert run.traffic is not None
    return run.traffic


def _overhead(subject: OffloadSubject, settings: Settings, report: Report) -> list[_Row]:
    return offload_overhead.measure(subject, settings, report)


def _draw(path: str, subject: OffloadSubject, rows: list[_Row]) -> None:
    gb_per_s = rows[0]["link_bytes_per_s"] / 1e9
    ours = {
        f"{slots} slots per layer": {
            row["what"]: row["tok_per_s"]["median"]
            for row in rows
            if row["beside_slots_per_layer"] == slots
        }
        for slots in PAPER_SLOTS
    }
    title = f"{subject.name}, a link of {gb_per_s:g} GB/s; naive moves all experts of each layer"
    try:
        with open(path, "w") as file:
            file.write(offload_plot.draw(title, ours))
    except OSError as error:
        raise RequestError("--plot cannot be written", where=path, got=error.strerror) from None


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


_COMMON: dict[str, Callable[[_Row], str]] = {
    "GB/s": lambda row: f"{row['link_bytes_per_s'] / 1e9:g}",
    "slots": lambda row: str(row["slots_per_layer"]),
    "tok/s": lambda row: f"{row['tok_per_s']['median']:.3g}",
    "  min - max": lambda row: f"{row['tok_per_s']['min']:.3g} - {row['tok_per_s']['max']:.3g}",
    "copies/token": lambda row: f"{row['copies_per_token']:.2f}",
    "link ms": lambda row: _ms(row["link_s_per_token"]),
    "computing ms": lambda row: _ms(row["compute_s_per_token"]["median"]),
}
_BOUND: dict[str, Callable[[_Row], str]] = {
    "time/bound": lambda row: f"{row['over_bound']['median']:.2f}",
    "of best": lambda row: f"{row['over_bound_of_best']:.2f}",
}
_OTHERS: dict[str, Callable[[_Row], str]] = {
    "hits": lambda row: f"{row['traffic']['hit_rate']:.1%}",
    "useless": lambda row: str(row["traffic"]["useless_prefetches"]),
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}
_COLUMNS: dict[str, dict[str, Callable[[_Row], str]]] = {
    "overlap": {"predictor": lambda row: row["what"], **_COMMON, **_BOUND, **_OTHERS},
    "paper": {
        f"{'row':27}": lambda row: row["what"],
        **_COMMON,
        "x naive": lambda row: f"{row['speed_over_naive']:.2f}",
        "of best": lambda row: f"{row['speed_over_naive_of_best']:.2f}",
        **_OTHERS,
    },
}
_PARTS: dict[str, Callable[[OffloadSubject, Settings, Report], list[_Row]]] = {
    "overlap": _overlap,
    "paper": _paper,
    "overhead": _overhead,
}
