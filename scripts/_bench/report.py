"""Results on stdout, as a table or as JSON lines, and in a file."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jmoe.errors import RequestError


class Report(Protocol):
    """Shows results as they come: on stdout, where nothing else goes."""

    def ceiling(self, subject: str, ceiling: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def table(self, cells: dict[str, str]) -> None:
        """A row of a suite with columns of its own."""
        ...


class MarkdownReport:
    """A line per ceiling, then a table in Markdown, of columns wide enough to read it as it is."""

    def __init__(self):
        self._has_header = False

    def ceiling(self, subject: str, ceiling: dict[str, Any]) -> None:
        print(f"Ceiling of {subject}:\n")
        gb_per_s = ceiling["read_bytes_per_s"] / 1e9
        gflop_per_s = ceiling["matmul_flop_per_s"] / 1e9
        print(f"- memory read: {gb_per_s:.1f} GB/s ({ceiling['read_how']})")
        print(f"- product: {gflop_per_s:,.0f} GFLOP/s ({ceiling['matmul_how']})\n", flush=True)

    def row(self, row: dict[str, Any]) -> None:
        cells = {title: cell(row) for title, cell in _COLUMNS.items()}
        if row["peer"]:
            cells |= {title: cell(row) for title, cell in _PEER_COLUMNS.items()}
        self.table(cells)

    def table(self, cells: dict[str, str]) -> None:
        widths = [max(len(title), _MIN_WIDTH) for title in cells]
        if not self._has_header:
            self._has_header = True
            self._line(cells, widths)
            self._line(["-" * (width - 1) + ":" for width in widths], widths)
        self._line(cells.values(), widths)

    def _line(self, cells: Iterable[str], widths: list[int]) -> None:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"| {' | '.join(padded)} |", flush=True)


class JsonLinesReport:
    """One JSON object per line: the ceiling, then each row."""

    def ceiling(self, subject: str, ceiling: dict[str, Any]) -> None:
        print(json.dumps({"subject": subject, "ceiling": ceiling}), flush=True)

    def row(self, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)

    def table(self, cells: dict[str, str]) -> None:
        print(json.dumps(cells), flush=True)


REPORTS: dict[str, Callable[[], Report]] = {"md": MarkdownReport, "jsonl": JsonLinesReport}

_MIN_WIDTH = 8


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(summary: dict[str, Any]) -> str:
    return f"{_number(summary['min'])} - {_number(summary['max'])}"


def _experts(row: dict[str, Any]) -> str:
    if "experts_per_layer" not in row:
        return ""
    return f"{row['experts_per_layer']:.3g} {row['experts_counted']}"


def _megabytes(row: dict[str, Any]) -> str:
    """Of weights that a step must read, by its tokens."""
    return _number(row["work_per_token"] / 1e6) if row["bound_by"] == "read" else ""


def _gigabytes(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "test": lambda row: row["test"],
    "batch": lambda row: str(row["batch"]),
    "dtype": lambda row: row["dtype"],
    "tok/s": lambda row: _number(row["tok_per_s"]["median"]),
    "  min - max": lambda row: _range(row["tok_per_s"]),
    "MB/token": _megabytes,
    "GB/s": lambda row: _gigabytes(row.get("read_bytes_per_s")),
    "bound": lambda row: _number(row["bound_tok_per_s"]["median"]),
    "of bound": lambda row: f"{row['share_of_bound']['median']:.1%}",
    "bound by": lambda row: row["bound_by"],
    "  experts": _experts,
    "neighbours": lambda row: f"{row['neighbours_cpu_share']:.0%}",
}

_PEER_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "peer tok/s": lambda row: _number(row["peer"]["tok_per_s"]["median"]),
    " peer range": lambda row: _range(row["peer"]["tok_per_s"]),
    "ratio": lambda row: f"{row['peer']['pair_ratio']['median']:.2f}",
    "ratio range": lambda row: _range(row["peer"]["pair_ratio"]),
    "best ratio": lambda row: f"{row['peer']['ratio_of_best']:.2f}",
}


class ResultFile:
    """A file of JSON lines that results are appended to; nothing at all for None.

    It is opened before anything is measured, so that a wrong name costs no measurement. A line
    goes out in one write behind what is there: lines of other runs stay whole.
    """

    def __init__(self, path: str | None):
        self._path = path

    def __enter__(self) -> "ResultFile":
        try:
            self._file = None if self._path is None else open(self._path, "ab+", buffering=0)
        except OSError as error:
            raise RequestError(
                "--output_file cannot be written", where=self._path, got=error.strerror
            ) from None
        return self

    def __exit__(self, *exc_info) -> None:
        if self._file:
            self._file.close()

    def append(self, value: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(value).encode() + b"\n"
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # cut short by whoever wrote it
                line = b"\n" + line
        try:
            written = self._file.write(line)
            os.fsync(self._file.fileno())
        except OSError as error:
            written, problem = None, error.strerror
        else:
            problem = f"{written} of {len(line)} bytes written"
        if written != len(line):
            raise RequestError(
                "the result could not be appended to --output_file",
                where=self._path,
                got=problem,
                do="it is the last line of stdout",
            )
