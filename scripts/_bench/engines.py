"""The suite engines: what takes decode steps, and what its expert cache costs in one program."""

from collections.abc import Callable
from typing import Any

from _bench import engines_compile, engines_decode, engines_fetch, engines_misses
from _bench.offload_subject import OffloadSubject, check_flags
from _bench.report import Report
from _bench.settings import Settings
from jmoe.errors import RequestError

_Row = dict[str, Any]


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports the parts that were asked for; returns all of it."""
    check_flags(settings)
    result: dict[str, Any] = {}
    rows: dict[str, list[_Row]] = {}
    subject = None
    try:
        for part in settings.parts:
            own_report = type(report)()  # with its own header
            if part == "compile":  # of any model, without weights
                rows[part] = engines_compile.measure(settings, own_report)
                continue
            if subject is None:
                subject = _load(settings)
                result |= subject.describe(report)
            rows[part] = _PARTS[part](subject, settings, own_report)
    finally:
        if subject is not None:
            subject.close()
    return result | {"rows": rows}


def _load(settings: Settings) -> OffloadSubject:
    subject = OffloadSubject(settings, "compiled")
    base = subject.base
    if not base.host_blobs:
        subject.close()
        raise RequestError("there is no compiled engine here", got="; ".join(base.notes))
    base.places.close()  # others are measured
    return subject


_PARTS: dict[str, Callable[[OffloadSubject, Settings, Report], list[_Row]]] = {
    "decode": engines_decode.measure,
    "fetch": engines_fetch.measure,
    "misses": engines_misses.measure,
    "ahead": engines_decode.measure_ahead,
}
