"""simulate.py: what it prints where, and what it exits with."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmoe.planning.traces import TraceRecorder
from tests.planning.traces import random_trace
from tests.scripts.processes import assert_one_error, run_script

RULES = ["lru", "lfu", "likely", "random", "popular", "fixed", "belady", "pool"]
LINK = ["--link_bytes_per_s=1e6", "--expert_bytes=1000", "--layer_s=0.001"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    random_trace().save(path)
    return path


def simulate_json(*flags: str) -> dict[str, Any]:
    result = run_script("simulate.py", *flags, "--output=json")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    return json.loads(result.stdout)


def simulate_text(*flags: str) -> str:
    result = run_script("simulate.py", *flags)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def test_the_table_has_a_row_for_each_number_of_slots_and_a_column_for_each_rule(trace: Path):
    lines = simulate_text(f"--trace={trace}", "--lookahead=2").splitlines()
    assert lines[0] == "trace.npz: 40 tokens of 2 sequences, 3 layers of 6 experts (top 2)"
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["slots"])
    assert lines[start].split()[1:9] == RULES
    rows = {int(line.split()[0]): line.split()[1:] for line in lines[start + 1 : start + 6]}
    assert list(rows) == [1, 2, 3, 4, 5]
    rates = [float(rate) for rate in rows[4][:8]]
    assert max(rates) == rates[RULES.index("belady")] and all(0.4 < rate < 0.9 for rate in rates)
    assert sum(line.split()[:1] == ["markov"] for line in lines) == 2
    for rule in RULES:
        assert any(line.startswith(f"  {rule}: ") for line in lines)


def test_json_carries_the_same_and_is_repeatable(trace: Path):
    flags = f"--trace={trace}", "--slots=4,2,4", "--rules=random,lru", "--fetch=3"
    value = simulate_json(*flags)
    assert value == simulate_json(*flags)
    assert value["trace"]["num_tokens"] == 40 and value["settings"]["fetch"] == 3
    settings = [(replay["slots"], replay["rule"]) for replay in value["replays"]]
    assert settings == [(2, "random"), (2, "lru"), (4, "random"), (4, "lru")]
    for replay in value["replays"]:
        assert replay["hits"] + replay["misses"] == 40 * 3 * 2
        assert replay["tokens_per_s"] is None
    assert [len(row) for row in value["recall"]["popularity"]] == [3]


def test_on_a_link_there_are_times(trace: Path):
    flags = f"--trace={trace}", *LINK, "--slots=4", "--predictors=none,oracle"
    replays = simulate_json(*flags)["replays"]
    rules = [(replay["rule"], replay["predictor"]) for replay in replays]
    assert rules == [(r, p) for r in ("lru", "likely") for p in ("none", "oracle")]
    for replay in replays:
        assert replay["seconds"] == pytest.approx(replay["compute_s"] + replay["stall_s"])
        assert replay["link_bytes"] == 1000 * replay["copies"]
    assert replays[1]["seconds"] < replays[0]["seconds"]
    text = simulate_text(*flags)
    assert "tok/s" in text and "of bound" in text


def test_ways_of_serving_misses_are_compared_by_what_each_resource_did(trace: Path):
    flags = f"--trace={trace}", *LINK, "--slots=2", "--rules=lru", "--misses=load,split,host"
    times = "--host_s=0.001", "--device_s=0.0001"
    value = simulate_json(*flags, *times)
    load, split, host = value["replays"]
    assert [replay["way"] for replay in value["replays"]] == ["load", "split", "host"]
    assert value["settings"]["host_s"] == 0.001 and value["settings"]["device_s"] == 0.0001
    assert load["host_experts"] == host["copies"] == 0
    assert 0 < split["host_experts"] < host["host_experts"] and split["copies"] > 0
    assert host["host_s"] == pytest.approx(0.001 * host["host_experts"])
    assert split["seconds"] < min(load["seconds"], host["seconds"])
    for replay in value["replays"]:
        assert replay["hits"] + replay["misses"] + replay["host_experts"] == 40 * 3 * 2
        longest_s = max(replay["link_s"], replay["host_s"], replay["compute_s"])
        assert replay["bound_share"] == pytest.approx(longest_s / replay["seconds"])
    text = simulate_text(*flags, *times)
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] == ["lru"]]
    assert "host/token" in text and "device s" in text
    assert [row[3] for row in rows] == ["load", "split", "host"]


def test_noisy_predictions_name_as_many_as_asked_for(trace: Path):
    flags = f"--trace={trace}", *LINK, "--slots=2", "--rules=lru", "--predictors=noisy"
    value = simulate_json(*flags, "--lookahead=2", "--recall=1,0")
    (replay,) = value["replays"]
    assert [row[-1] for row in replay["recall"]] == [1.0, 0.0]


def test_recorded_predictions_are_shown_and_used(tmp_path: Path):
    recorder = TraceRecorder(num_layers=2, num_experts=4, top_k=1)
    recorder.begin()
    for expert in (0, 1, 2, 3):
        recorder.add_decode(np.array([[0], [expert]]), np.array([[[expert]], [[0]]]))
    recorder.trace().save(tmp_path / "trace.npz")
    flags = f"--trace={tmp_path / 'trace.npz'}", "--slots=1", "--predictors=recorded", "--rules=lru"
    result = run_script("simulate.py", *flags, "--fetch=1", "--output=json")
    value = json.loads(result.stdout)
    assert value["recall"] == {"recorded": [[1.0]]}
    assert value["replays"][0]["useful"] == 3 and value["replays"][0]["misses"] == 0
    assert b"nothing to learn from" in result.stderr


def test_another_trace_can_be_learnt_from(trace: Path, tmp_path: Path):
    random_trace(seed=1).select([0]).save(tmp_path / "train.npz")
    flags = f"--trace={trace}", "--slots=2", "--rules=popular"
    own, other = simulate_json(*flags), simulate_json(*flags, f"--train={tmp_path / 'train.npz'}")
    assert own["replays"][0]["num_tokens"] == 20 and other["replays"][0]["num_tokens"] == 40


def test_the_picture_has_a_point_for_each_figure(trace: Path, tmp_path: Path):
    plot = tmp_path / "plot.svg"
    plot.write_text("an older one")
    value = simulate_json(f"--trace={trace}", "--slots=2,4", f"--plot={plot}")
    svg = ElementTree.parse(plot)
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    expected = [
        f"{replay['rule']}, {replay['slots']} slots: {replay['hit_rate']:.4f}"
        for replay in value["replays"]
    ]
    assert sorted(map(str, titles)) == sorted(expected) and len(titles) == 16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots=2,x"], ["--slots", "0 to 6"]),
        (["--slots=7"], ["--slots", "0 to 6"]),
        (["--slots="], ["--slots"]),
        (["--rules=lru,mru"], ["'mru'", "belady"]),
        (["--predictors=gate"], ["'gate'", "markov"]),
        (["--predictors=recorded"], ["no predictions"]),
        (["--train=/absent.npz"], ["/absent.npz", "No such file"]),
        (["--link_bytes_per_s=1e9"], ["--expert_bytes=66e6"]),
        (["--link_bytes_per_s=0", "--expert_bytes=1"], ["speed above 0"]),
        (["--layer_s=1"], ["--link_bytes_per_s"]),
        (["--lookahead=0"], ["--lookahead"]),
        (["--misses=split"], ["--misses", "--link_bytes_per_s"]),
        (["--host_s=1"], ["--host_s", "--link_bytes_per_s"]),
        ([*LINK, "--misses=auto"], ["'auto'", "load, split, host"]),
        ([*LINK, "--misses=split"], ["--host_s=4e-3"]),
        ([*LINK, "--host_s=1"], ["--host_s", "--misses=load,split,host"]),
        ([*LINK, "--misses=host", "--host_s=1", "--device_s=1"], ["--layer_s=0.001"]),
        (["--predictors=noisy"], ["--recall"]),
        (["--recall=0.8"], ["--recall", "noisy"]),
        (["--predictors=noisy", "--recall=0.8,0.7"], ["every distance", "0.8, 0.7"]),
        (["--num_staging=0", "--slots=1"], ["too few places"]),
        (["--plot=/absent/plot.svg"], ["/absent/plot.svg", "no such directory"]),
        (["--plot=plot.svg", "--predictors=none,oracle"], ["one predictor"]),
        ([*LINK, "--plot=x.svg", "--misses=load,host", "--host_s=1"], ["one way of serving"]),
        (["--eviction=lru"], ["--help lists the flags"]),
    ],
)
def test_bad_input_is_one_error(trace: Path, flags: list[str], words: list[str]):
    assert_one_error(run_script("simulate.py", f"--trace={trace}", *flags), *words)


def test_a_bad_trace_is_one_error(tmp_path: Path):
    assert_one_error(run_script("simulate.py"), "--trace")
    missing = tmp_path / "absent.npz"
    assert_one_error(run_script("simulate.py", f"--trace={missing}"), str(missing), "--record_rout")
    (tmp_path / "text.npz").write_text("text")
    result = run_script("simulate.py", f"--trace={tmp_path / 'text.npz'}")
    assert_one_error(result, "no routing trace")
    random_trace(num_tokens=0).save(tmp_path / "empty.npz")
    result = run_script("simulate.py", f"--trace={tmp_path / 'empty.npz'}")
    assert_one_error(result, "no decode tokens")


def test_one_sequence_has_nothing_to_learn_from(tmp_path: Path):
    random_trace().select([0]).save(tmp_path / "one.npz")
    flags = f"--trace={tmp_path / 'one.npz'}", "--slots=2"
    assert "popular:" not in simulate_text(*flags)
    for learning in ("--rules=popular", "--predictors=markov"):
        result = run_script("simulate.py", *flags, learning)
        error = [line for line in result.stderr.decode().splitlines() if "needs something" in line]
        assert result.returncode == 2 and len(error) == 1
