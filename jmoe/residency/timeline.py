"""What link, host and device did when, as a file for Chrome (chrome://tracing) and Perfetto.

Format: Trace Event Format, JSON object form,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

Who records holds a ``Timeline | None``, and asks for None first: without a timeline nothing
is computed for one.
"""

import contextlib
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jmoe.errors import RequestError
from jmoe.residency.transfers import Transfer

Track = Literal["link", "host", "device"]
TRACKS: tuple[Track, ...] = ("link", "host", "device")

_PID = 1


class _Event(NamedTuple):
    start_s: float
    end_s: float | None  # None: an instant
    track: Track
    name: str
    args: dict[str, Any]


class Timeline:
    """Events of a run. Recording is one append, from any thread.

    Attributes:
      num_dropped: events that came when there were ``max_events``; the file says so.
    """

    def __init__(self, max_events: int = 1_000_000):
        self.num_dropped = 0
        self._max_events = max_events  # about 400 bytes each
        self._events: list[_Event] = []

    def span(self, track: Track, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Something that took time.

        Args:
          track: where it is shown. Spans of a track may be nested; those that only overlap, as
            copies under way do, are shown side by side.
          name: short, and the same for things of the same kind.
          start_s: of ``time.perf_counter``.
          end_s: likewise.
          **args: shown when the span is selected: numbers and texts.
        """
        self._add(_Event(start_s, end_s, track, name, args))

    def instant(self, track: Track, name: str, at_s: float, **args: Any) -> None:
        """Something that happened at one moment."""
        self._add(_Event(at_s, None, track, name, args))

    def transfer(self, transfer: Transfer) -> None:
        """A copy, from its start on the link; for ``Fetcher(on_transfer=...)``."""
        key = transfer.key
        self.span(
            "link",
            transfer.kind if transfer.wanted else f"{transfer.kind}, cancelled",
            transfer.started_s,
            transfer.finished_s,
            layer=key.layer,
            expert=key.expert,
            bytes=transfer.num_bytes,
            queued_us=round(1e6 * (transfer.started_s - transfer.queued_s), 1),
        )

    def _add(self, event: _Event) -> None:
        if len(self._events) < self._max_events:
            self._events.append(event)
        else:
            self.num_dropped += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what was recorded so far; the file is complete or not there.

        Raises:
          RequestError: it cannot be written.
        """
        with _errors_of(path), _complete_file(Path(path)) as file:
            file.write(b'{"displayTimeUnit": "ms",\n')
            file.write(b'"otherData": {"dropped_events": %d},\n' % self.num_dropped)
            file.write(b'"traceEvents": [')
            separator = b"\n"
            for event in _trace_events(self._events[:]):
                file.write(separator + json.dumps(event, default=str).encode())
                separator = b",\n"
            file.write(b"\n]}\n")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises RequestError unless a timeline can be saved there. Before work starts, not after."""
    path = Path(path)
    with _errors_of(path):
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "Permission denied")
            return
        if path.exists():
            open(path, "ab").close()  # what may not be written to is not to be replaced either
        partial = _partial_path(path)
        open(partial, "xb").close()
        partial.unlink()


def _trace_events(events: Iterable[_Event]) -> Iterator[dict[str, Any]]:
    # Of those that start together the longest comes first: it is the outer one.
    ordered = sorted(events, key=lambda e: (e.start_s, -(e.end_s or e.start_s)))
    zero_s = ordered[0].start_s if ordered else 0.0
    lanes: dict[Track, _Lanes] = {track: _Lanes() for track in TRACKS}
    placed = [
        (event, 0 if event.end_s is None else lanes[event.track].place(event.start_s, event.end_s))
        for event in ordered
    ]

    def metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "pid": _PID, "tid": tid, "name": kind, "args": args}

    yield metadata("process_name", 0, name="jmoe")
    tids: dict[tuple[Track, int], int] = {}
    for track in TRACKS:
        for lane in range(max(1, lanes[track].num_lanes)):
            tid = tids[track, lane] = len(tids) + 1
            title = f"{track} {lane + 1}" if lane else track
            yield metadata("thread_name", tid, name=title)
            yield metadata("thread_sort_index", tid, sort_index=tid)
    for event, lane in placed:
        shown = {
            "name": event.name,
            "cat": event.track,
            "pid": _PID,
            "tid": tids[event.track, lane],
            "ts": _microseconds(event.start_s - zero_s),
        }
        if event.end_s is None:
            shown |= {"ph": "i", "s": "t"}
        else:
            # From its end as it is shown, so that neighbours neither overlap nor gape.
            shown |= {"ph": "X", "dur": round(_microseconds(event.end_s - zero_s) - shown["ts"], 3)}
        if event.args:
            shown["args"] = event.args
        yield shown


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


class _Lanes:
    """Lines of a track, as many as needed: on one line spans are apart or nested."""

    def __init__(self):
        self._open_ends: list[list[float]] = []  # by lane, of the spans that are open, outer first

    @property
    def num_lanes(self) -> int:
        return len(self._open_ends)

    def place(self, start_s: float, end_s: float) -> int:
        """Returns the lane of a span. They come by their start."""
        for lane, ends in enumerate(self._open_ends):
            while ends and ends[-1] <= start_s:
                ends.pop()
            if not ends or end_s <= ends[-1]:
                ends.append(end_s)
                return lane
        self._open_ends.append([end_s])
        return len(self._open_ends) - 1


def _is_special(path: Path) -> bool:
    """Whether it is there and no file, as /dev/stdout: renaming something over it destroys it."""
    return path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()


def _partial_path(path: Path) -> Path:
    # Beside the file itself, if the name is a link to it. Short: long names are legal.
    directory = Path(os.path.realpath(path)).parent
    return directory / f".jmoe-{os.getpid()}-{threading.get_ident():x}.partial"


@contextlib.contextmanager
def _complete_file(path: Path) -> Iterator[Any]:
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    partial = _partial_path(path)
    with open(partial, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, os.path.realpath(path))
        except BaseException:
            partial.unlink()
            raise


@contextlib.contextmanager
def _errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(
            "the timeline cannot be written",
            where=path,
            got=error.strerror,
            do="name a file in a directory that you may write to",
        ) from None
