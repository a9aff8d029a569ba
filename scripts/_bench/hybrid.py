"""The suite hybrid: missing experts copied, computed on the host, or both, on several links."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from _bench import hybrid_plot
from _bench.hybrid_subject import WAYS, HybridRun, HybridSubject
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.engines import contest
from jmoe.errors import RequestError

_Row = dict[str, Any]


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports the parts that were asked for; returns all of it."""
    subject = HybridSubject(settings)
    result = subject.offload.describe(report) | {"hardware": subject.hardware.to_json()}
    rows: dict[str, list[_Row]] = {}
    try:
        for part in settings.parts:
            rows[part] = _PARTS[part](subject, settings, type(report)())  # each with its own header
    finally:
        subject.close()
    if settings.plot is not None:
        _draw(settings.plot, subject, rows["decode"])
    if "decode" in rows:
        result["decode"] = _conclude(rows["decode"])
    return result | {"rows": rows}


class _Point(NamedTuple):
    link_bytes_per_s: float
    slots: int


def _points(settings: Settings) -> Iterator[_Point]:
    for slots in settings.slots:
        for bytes_per_s in settings.links:
            yield _Point(bytes_per_s, slots)


def _decode(subject: HybridSubject, settings: Settings, report: Report) -> list[_Row]:
    """Decode speed of every way at every point, beside what was predicted and a bound."""
    rows = []
    for point in _points(settings):
        engines = {way: subject.engine(way, *point) for way in WAYS}
        turns = {way: lambda engine=engine: subject.run(engine) for way, engine in engines.items()}
        try:
            results, neighbours = watch_turns(f"decode, {point.slots} slots", turns, settings)
        finally:
            for engine in engines.values():
                subject.close_engine(engine)
        link = point.link_bytes_per_s
        bound = summarize([subject.bound_tok_per_s(run, link) for run in results["host"]])
        of_point: list[_Row] = [
            {**_decode_row(point, way, runs, results), "neighbours_cpu_share": neighbours}
            for way, runs in results.items()
        ]
        speeds = {row["way"]: row["tok_per_s"]["median"] for row in of_point}
        best = max(speed for way, speed in speeds.items() if way != "auto")
        for row in of_point:
            row["bound_tok_per_s"] = bound.median
            row["share_of_best"] = speeds[row["way"]] / best
            report.table({title: cell(row) for title, cell in _DECODE_COLUMNS.items()})
        rows += of_point
    return rows


def _decode_row(
    point: _Point, way: str, runs: list[HybridRun], results: Mapping[str, list[HybridRun]]
) -> _Row:
    measured = summarize([run.tok_per_s for run in runs])
    predicted = [run.predicted_tok_per_s for run in runs if run.predicted_tok_per_s]
    others = zip(runs, results["load"], results["host"], strict=True)
    over = [run.tok_per_s / max(load.tok_per_s, host.tok_per_s) for run, load, host in others]
    last = runs[-1]
    return {
        "link_bytes_per_s": point.link_bytes_per_s,
        "slots_per_layer": point.slots,
        "way": way,
        "chosen": last.way,
        "reason": last.reason,
        "tok_per_s": measured.to_json(),
        "predicted_tok_per_s": summarize(predicted).median if predicted else None,
        "over_better_of_load_and_host": summarize(over).to_json(),
        "traffic": last.traffic.to_json(),
        "tokens": last.tokens,
        "link_share": (last.traffic.link_busy_s or 0.0) / last.decode_s,
        "host_share": last.traffic.host_busy_s / last.decode_s,
    }


def _conclude(rows: list[_Row]) -> dict[str, Any]:
    """What the points say together."""
    errors = [
        abs(row["predicted_tok_per_s"] / row["tok_per_s"]["median"] - 1)
        for row in rows
        if row["way"] != "auto" and row["predicted_tok_per_s"]
    ]
    split = [row["over_better_of_load_and_host"]["median"] for row in rows if row["way"] == "split"]
    regrets = []
    for auto in (row for row in rows if row["way"] == "auto"):
        same = [r for r in rows if _point_of(r) == _point_of(auto) and r["way"] != "auto"]
        speeds = {contest.WAYS[r["way"]]: r["tok_per_s"]["median"] for r in same}
        regrets.append(1 - speeds[auto["chosen"]] / max(speeds.values()))
    return {
        "prediction_errors": summarize(errors).to_json() if errors else None,
        "split_over_better": {"min": min(split), "max": max(split)} if split else None,
        "auto_regrets": regrets,
    }


def _point_of(row: _Row) -> tuple[float, int]:
    return row["link_bytes_per_s"], row["slots_per_layer"]


def _prompts(subject: HybridSubject, settings: Settings, report: Report) -> list[_Row]:
    """Time to the first token of prompts of these lengths, for each way."""
    rows = []
    for length in settings.prompt_lengths:
        for point in _points(settings):
            engines = {way: subject.engine(way, *point) for way in WAYS if way != "auto"}
            turns = {
                way: lambda engine=engine, length=length: subject.run(engine, 1, length)
                for way, engine in engines.items()
            }
            try:
                results, _ = watch_turns(f"prompts of {length}", turns, settings)
            finally:
                for engine in engines.values():
                    subject.close_engine(engine)
            for way, runs in results.items():
                row = {
                    "prompt_tokens": length,
                    "link_bytes_per_s": point.link_bytes_per_s,
                    "slots_per_layer": point.slots,
                    "way": way,
                    "prefill_s": summarize([run.prefill_s for run in runs]).to_json(),
                    "traffic": runs[-1].prefill_traffic.to_json(),
                }
                rows.append(row)
                report.table({title: cell(row) for title, cell in _PROMPT_COLUMNS.items()})
    return rows


def _beams(subject: HybridSubject, settings: Settings, report: Report) -> list[_Row]:
    """Beams together, beside as many sequences one after the other."""
    rows = []
    for point in _points(settings):
        for width in settings.batch_sizes:
            together, serial = (subject.engine("split", *point) for _ in range(2))
            turns = {
                "beams": lambda engine=together, width=width: subject.run_beams(engine, width),
                "serial": lambda engine=serial, width=width: subject.run_serially(engine, width),
            }
            try:
                results, _ = watch_turns(f"{width} beams", turns, settings)
            finally:
                for engine in (together, serial):
                    subject.close_engine(engine)
            pairs = list(zip(results["beams"], results["serial"], strict=True))
            row = {
                "num_beams": width,
                "link_bytes_per_s": point.link_bytes_per_s,
                "slots_per_layer": point.slots,
                "tok_per_s": summarize(results["beams"]).to_json(),
                "serial_tok_per_s": summarize(results["serial"]).to_json(),
                "over_serial": summarize([a / b for a, b in pairs]).to_json(),
            }
            rows.append(row)
            report.table({title: cell(row) for title, cell in _BEAM_COLUMNS.items()})
    return rows


def _draw(path: str, subject: HybridSubject, rows: list[_Row]) -> None:
    try:
        with open(path, "w") as file:
            file.write(hybrid_plot.draw(subject.title, rows))
    except OSError as error:
        raise RequestError("--plot cannot be written", where=path, got=error.strerror) from None


def _predicted(row: _Row) -> str:
    predicted = row["predicted_tok_per_s"]
    return "" if predicted is None else f"{predicted:.3g}"


_POINT: dict[str, Callable[[_Row], str]] = {
    "GB/s": lambda row: f"{row['link_bytes_per_s'] / 1e9:g}",
    "slots": lambda row: str(row["slots_per_layer"]),
}
_DECODE_COLUMNS: dict[str, Callable[[_Row], str]] = {
    **_POINT,
    "way  ": lambda row: row["way"],
    "tok/s": lambda row: f"{row['tok_per_s']['median']:.3g}",
    "  min - max": lambda row: f"{row['tok_per_s']['min']:.3g} - {row['tok_per_s']['max']:.3g}",
    "predicted": _predicted,
    "bound": lambda row: f"{row['bound_tok_per_s']:.3g}",
    "x better": lambda row: f"{row['over_better_of_load_and_host']['median']:.2f}",
    "hits": lambda row: f"{row['traffic']['hit_rate']:.0%}",
    "copies/token": lambda row: f"{row['traffic']['copies'] / row['tokens']:.2f}",
    "host/token": lambda row: f"{row['traffic']['host_experts'] / row['tokens']:.2f}",
    "link": lambda row: f"{row['link_share']:.0%}",
    "host": lambda row: f"{row['host_share']:.0%}",
    "chosen": lambda row: row["chosen"],
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}
_PROMPT_COLUMNS: dict[str, Callable[[_Row], str]] = {
    "tokens": lambda row: str(row["prompt_tokens"]),
    **_POINT,
    "way  ": lambda row: row["way"],
    "first token, s": lambda row: f"{row['prefill_s']['median']:.3g}",
    "  min - max": lambda row: f"{row['prefill_s']['min']:.3g} - {row['prefill_s']['max']:.3g}",
    "copies": lambda row: str(row["traffic"]["copies"]),
    "host": lambda row: str(row["traffic"]["host_experts"]),
}
_BEAM_COLUMNS: dict[str, Callable[[_Row], str]] = {
    "beams": lambda row: str(row["num_beams"]),
    **_POINT,
    "tok/s": lambda row: f"{row['tok_per_s']['median']:.3g}",
    "serial": lambda row: f"{row['serial_tok_per_s']['median']:.3g}",
    "ratio": lambda row: f"{row['over_serial']['median']:.2f}",
}
_PARTS: dict[str, Callable[[HybridSubject, Settings, Report], list[_Row]]] = {
    "decode": _decode,
    "prompts": _prompts,
    "beams": _beams,
}
