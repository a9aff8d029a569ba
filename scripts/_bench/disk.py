"""The suite disk: a model whose experts do not fit into memory, and what it costs to read them."""

from collections.abc import Callable
from typing import Any

from _bench import disk_read
from _bench.disk_subject import DiskRun, DiskSubject, Way, opened_store
from _bench.memory_limit import limited_memory
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize
from _bench.turns import watch_turns
from jmoe.planning.memory import available_host_bytes

_WAYS = (
    Way("resident, system left alone", is_offload=False, has_tier=False),
    Way("resident, exact reads", is_offload=False),
    Way("offload, system left alone", is_offload=True, has_tier=False),
    Way("offload, exact reads", is_offload=True),
    Way("offload, read ahead", is_offload=True, read_ahead=True),
    Way("offload, locked", is_offload=True, locks=True),
    Way("offload, read ahead, locked", is_offload=True, read_ahead=True, locks=True),
)

_Row = dict[str, Any]


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports the parts that were asked for; returns all of it."""
    rows: dict[str, list[_Row]] = {}
    limit_bytes = settings.memory_bytes
    with opened_store(settings) as directory, limited_memory(limit_bytes):
        subject = DiskSubject(directory, settings)
        try:
            available_bytes = available_host_bytes()
            for part in settings.parts:
                own_report = type(report)()  # with its own header
                if part == "read":
                    rows[part] = disk_read.measure(subject, settings, own_report)
                else:
                    disk = disk_read.best_bytes_per_s(rows["read"]) if "read" in rows else None
                    rows[part] = _decode(subject, settings, own_report, disk)
        finally:
            subject.close()
    memory = {"limit_bytes": limit_bytes, "available_bytes": available_bytes}
    return {"subject": subject.to_json(), "memory": memory, "rows": rows}


def _decode(
    subject: DiskSubject, settings: Settings, report: Report, disk_bytes_per_s: float | None
) -> list[_Row]:
    """Tokens per second in each way, in turn, each from a cold start."""
    contestants: dict[str, Callable[[], DiskRun]] = {
        way.name: lambda way=way: subject.run(way) for way in _WAYS
    }
    results, neighbours_share = watch_turns("decode", contestants, settings)
    texts = {way: [run.token_ids for run in runs] for way, runs in results.items()}
    assert _same([text for way in _WAYS if way.is_offload for text in texts[way.name]])
    rows = []
    for name, runs in results.items():
        row = _row(name, runs, results[_WAYS[2].name], subject.new_tokens, disk_bytes_per_s)
        row["same_text"] = _same([*texts[_WAYS[0].name], *texts[name]])
        row["neighbours_cpu_share"] = neighbours_share
        rows.append(row)
        report.table({title: cell(row) for title, cell in _COLUMNS.items()})
    return rows


def _same(texts: list[list[int]]) -> bool:
    return all(text == texts[0] for text in texts)


def _row(
    name: str,
    runs: list[DiskRun],
    base: list[DiskRun],
    new_tokens: int,
    disk_bytes_per_s: float | None,
) -> _Row:
    speeds = [run.stats.decode_tok_per_s for run in runs]
    ratios = [a.stats.decode_s / b.stats.decode_s for a, b in zip(base, runs, strict=True)]
    row: _Row = {
        "test": "decode",
        "what": name,
        "tok_per_s": summarize(speeds).to_json(),
        "over_offload_left_alone": summarize(ratios).to_json(),
        "prefill_s": summarize([run.stats.prefill_s for run in runs]).to_json(),
        "read_bytes_per_token": None,
        "bytes_per_s": None,
        "share_of_disk": None,
    }
    read = [run.read_bytes for run in runs if run.read_bytes is not None]
    if read:
        rates = [b / run.stats.decode_s for b, run in zip(read, runs, strict=True)]
        row["read_bytes_per_token"] = summarize([b / new_tokens for b in read]).to_json()
        row["bytes_per_s"] = summarize(rates).to_json()
        if disk_bytes_per_s is not None:
            row["share_of_disk"] = row["bytes_per_s"]["median"] / disk_bytes_per_s
    stats = runs[-1].stats.disk
    row["disk"] = None if stats is None else runs[-1].stats.to_json()["disk"]
    row["waited_for_per_token"] = row["missing_bytes_per_token"] = None
    if stats is not None and stats.decode.needed:
        decode = [run.stats.disk.decode for run in runs if run.stats.disk is not None]
        waited = [d.waited_for / new_tokens for d in decode if d.waited_for is not None]
        missing = [(d.missing_bytes) / new_tokens for d in decode]
        row["waited_for_per_token"] = summarize(waited).to_json() if waited else None
        row["missing_bytes_per_token"] = summarize(missing).to_json()
    return row


def _median(name: str, scale: float = 1.0) -> Callable[[_Row], str]:
    return lambda row: "" if row[name] is None else f"{row[name]['median'] * scale:.3g}"


def _ahead(row: _Row) -> str:
    if row["disk"] is None or not (decode := row["disk"]["decode"])["read_ahead"]:
        return ""
    return f"{decode['useful']} + {decode['late']} of {decode['read_ahead']}"


_COLUMNS: dict[str, Callable[[_Row], str]] = {
    "engine                     ": lambda row: row["what"],
    "tok/s": _median("tok_per_s"),
    "  min - max": lambda row: f"{row['tok_per_s']['min']:.3g} - {row['tok_per_s']['max']:.3g}",
    "x left alone": _median("over_offload_left_alone"),
    "prefill s": _median("prefill_s"),
    "MiB/token": _median("read_bytes_per_token", 2**-20),
    "misses": _median("waited_for_per_token"),
    "MiB missing": _median("missing_bytes_per_token", 2**-20),
    "in time + late": _ahead,
    "locked": lambda row: str(row["disk"]["locked_experts"]) if row["disk"] else "",
    "GB/s": _median("bytes_per_s", 1e-9),
    "of disk": lambda row: "" if row["share_of_disk"] is None else f"{row['share_of_disk']:.0%}",
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}
