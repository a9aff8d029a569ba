"""The timeline's file: what viewers need, and nothing half written."""

import itertools
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from jmoe.errors import RequestError
from jmoe.residency.eviction import ExpertKey
from jmoe.residency.link import DeviceLink
from jmoe.residency.prefetch import Fetcher, Transfer
from jmoe.residency.timeline import Timeline, check_writable
from tests.residency.faulty_link import BLOB_BYTES, make_blob


def _save(timeline: Timeline, directory: Path) -> dict[str, Any]:
    timeline.save(directory / "timeline.json")
    return json.loads((directory / "timeline.json").read_text())


def _shown(trace: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """By event its line, its name, and its start and duration in microseconds."""
    events = trace["traceEvents"]
    lines = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [(lines[e["tid"]], e["name"], e["ts"], e.get("dur")) for e in events if e["ph"] != "M"]


def test_events_are_shown_on_their_tracks_in_order(tmp_path):
    timeline = Timeline()
    timeline.span("device", "layer", 100.002, 100.003, layer=5)
    timeline.instant("host", "token", 100.0025, id=17)
    timeline.span("host", "wait", 100.0, 100.0015, experts="3, 7")
    trace = _save(timeline, tmp_path)
    assert _shown(trace) == [
        ("host", "wait", 0.0, 1500.0),
        ("device", "layer", 2000.0, 1000.0),
        ("host", "token", 2500.0, None),
    ]
    assert trace["displayTimeUnit"] == "ms"
    *metadata, wait, layer, token = trace["traceEvents"]
    assert (wait["ph"], layer["ph"], token["ph"], token["s"]) == ("X", "X", "i", "t")
    assert wait["args"] == {"experts": "3, 7"} and layer["args"] == {"layer": 5}
    assert {event["ph"] for event in metadata} == {"M"}
    assert {event["pid"] for event in trace["traceEvents"]} == {1}
    names = [e["args"]["name"] for e in metadata if e["name"] == "thread_name"]
    assert names == ["link", "host", "device"]


def test_an_empty_timeline_is_a_valid_file(tmp_path):
    assert _shown(_save(Timeline(), tmp_path)) == []


def test_nested_spans_share_a_line_and_overlapping_ones_do_not(tmp_path):
    timeline = Timeline()
    spans = {
        "inner": (2, 3),
        "outer": (1, 5),
        "same end": (4, 5),
        "overlapping": (4, 6),
        "next": (5, 6),
        "in the overlapping": (5, 5.5),
        "third": (5.25, 7),
    }
    for name, (start_ms, end_ms) in spans.items():
        timeline.span("link", name, start_ms / 1e3, end_ms / 1e3)
    lines = {name: line for line, name, *_ in _shown(_save(timeline, tmp_path))}
    assert lines == {
        "outer": "link",
        "inner": "link",
        "same end": "link",
        "overlapping": "link 2",
        "next": "link",
        "in the overlapping": "link",
        "third": "link 3",
    }


def test_neighbours_touch_however_long_the_run(tmp_path):
    timeline = Timeline()
    times = [10_000 + i / 3000 for i in range(3000)]
    for start, end in itertools.pairwise(times):
        timeline.span("host", "step", start, end)
    shown = _shown(_save(timeline, tmp_path))
    assert {line for line, *_ in shown} == {"host"}
    for (_, _, start, duration), (_, _, next_start, _) in itertools.pairwise(shown):
        assert duration is not None
        assert start + duration == pytest.approx(next_start, abs=5e-4)


def test_transfers_of_a_fetcher_become_spans_of_the_link(tmp_path):
    timeline = Timeline()
    link = DeviceLink(jax.devices()[0])
    with Fetcher(link, make_blob, on_transfer=timeline.transfer) as fetcher:
        fetcher.demand([ExpertKey(1, 2)])
        fetcher.wait(ExpertKey(1, 2))
        fetcher.drain()
    timeline.transfer(Transfer(ExpertKey(0, 7), "prefetch", 1.0, 2.0, 3.0, 64, wanted=False))
    trace = _save(timeline, tmp_path)
    cancelled, demand = (event for event in trace["traceEvents"] if event["ph"] == "X")
    if cancelled["name"] == "demand":
        cancelled, demand = demand, cancelled
    assert (demand["name"], demand["cat"]) == ("demand", "link")
    assert demand["args"].pop("queued_us") >= 0
    assert demand["args"] == {"layer": 1, "expert": 2, "bytes": BLOB_BYTES}
    assert cancelled["name"] == "prefetch, cancelled"
    assert cancelled["dur"] == 1e6 and cancelled["args"]["queued_us"] == 1e6


def test_any_thread_may_record_while_another_saves(tmp_path):
    timeline = Timeline()

    def record(track) -> None:
        for i in range(2000):
            timeline.span(track, "step", i, i + 0.5)

    threads = [threading.Thread(target=record, args=(track,)) for track in ("link", "host")]
    for thread in threads:
        thread.start()
    _save(timeline, tmp_path)
    for thread in threads:
        thread.join()
    assert len(_shown(_save(timeline, tmp_path))) == 4000


def test_a_timeline_is_bounded_and_says_what_is_missing(tmp_path):
    timeline = Timeline(max_events=2)
    for i in range(5):
        timeline.instant("host", f"event {i}", i)
    trace = _save(timeline, tmp_path)
    assert [name for _, name, *_ in _shown(trace)] == ["event 0", "event 1"]
    assert trace["otherData"] == {"dropped_events": 3}


def test_values_that_json_does_not_know_are_written_as_text(tmp_path):
    timeline = Timeline()
    timeline.instant("host", "event", 0.0, key=ExpertKey(1, 2), path=tmp_path, text="\ud800ß")
    (event,) = (e for e in _save(timeline, tmp_path)["traceEvents"] if e["ph"] == "i")
    assert event["args"] == {"key": [1, 2], "path": str(tmp_path), "text": "\ud800ß"}


def test_saving_replaces_what_was_there_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "timeline.json"
    path.write_text("older")
    path.chmod(0o640)
    check_writable(path)
    assert path.read_text() == "older"
    _save(Timeline(), tmp_path)
    assert os.listdir(tmp_path) == ["timeline.json"]
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    check_writable(link)
    Timeline().save(link)
    assert link.is_symlink() and json.loads(target.read_text())


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "timeline.json"
    path.write_text("older")
    timeline = Timeline()
    timeline.instant("host", "event", 0.0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        timeline.save(path)
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == ["timeline.json"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    check_writable(path)
    Timeline().save(path)
    assert path.stat().st_size > 0
    with pytest.raises(RequestError, match="File name too long"):
        check_writable(tmp_path / ("x" * 256))


@pytest.mark.parametrize(
    "path, reason",
    [
        ("missing/timeline.json", "No such file or directory"),
        ("", "Is a directory"),
        ("file/timeline.json", "Not a directory"),
    ],
)
def test_where_nothing_can_be_written_it_is_said_before_and_after(tmp_path, path, reason):
    (tmp_path / "file").touch()
    for call in (check_writable, Timeline().save):
        with pytest.raises(RequestError, match=f"timeline cannot be written(?s:.*){reason}") as e:
            call(tmp_path / path)
        assert e.value.where == tmp_path / path
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_protected_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="Permission denied"):
        check_writable(tmp_path / "timeline.json")


def test_a_full_disk_is_an_error_for_the_user():
    if not os.path.exists("/dev/full"):
        pytest.skip("a device of Linux")
    with pytest.raises(RequestError, match="No space left on device"):
        Timeline().save("/dev/full")


def test_devices_are_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    Timeline().save(pipe)
    reader.join()
    assert json.loads(received[0])["otherData"] == {"dropped_events": 0}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
