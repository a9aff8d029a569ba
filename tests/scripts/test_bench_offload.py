"""bench.py --suite=offload: that its parts measure what they say, on a link that is held back."""

import json
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import jmoe
from jmoe.engines.prediction import OraclePredictor
from tests.scripts.processes import ROOT, assert_one_error, run_script

sys.path.insert(0, str(ROOT / "scripts"))

from _bench import offload_plot
from _bench.settings import check_parts, read_speeds

_QUICK = ("--suite=offload", "--new_tokens=4", "--repeats=1", "--warmup=0", "--links=20,10")
_NUM_LAYERS, _TOP_K, _EXPERTS = 12, 2, 8  # of the embedded model


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory):
    plot = tmp_path_factory.mktemp("plot") / "rows.svg"
    result = run_script("bench.py", *_QUICK, f"--plot={plot}")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"plot": plot.read_text()}


def test_every_predictor_runs_on_every_link(summary: dict):
    rows = summary["rows"]["overlap"]
    names = [(row["what"], row["link_bytes_per_s"]) for row in rows]
    assert names == [
        (name, speed) for speed in (20e9, 10e9) for name in ("oracle", "gate 1", "gate 2", "none")
    ]
    expert_bytes = summary["subject"]["expert_bytes"]
    for row in rows:
        copies = row["traffic"]["copies"]
        assert row["copies_per_token"] == copies / 4
        assert row["link_s_per_token"] == pytest.approx(
            copies * expert_bytes / row["link_bytes_per_s"] / 4
        )
        assert row["over_bound"]["median"] > 0


def test_an_oracle_is_right_and_without_one_everything_is_waited_for(summary: dict):
    by_name = {row["what"]: row["traffic"] for row in summary["rows"]["overlap"]}
    assert by_name["oracle"]["useless_prefetches"] == 0
    # But for the first layer of the first token, for which nobody could predict.
    assert by_name["oracle"]["demand_loads"] <= _TOP_K
    assert by_name["none"]["prefetches"] == 0
    assert by_name["none"]["copies"] == by_name["none"]["demand_loads"]
    assert by_name["gate 1"]["useful_prefetches"] > 0


def test_the_papers_rows_move_what_their_names_say(summary: dict):
    rows = summary["rows"]["paper"]
    assert [row["what"] for row in rows] == list(offload_plot.ROWS) * 2
    assert {row["link_bytes_per_s"] for row in rows} == {20e9}  # the faster of two
    assert [row["slots_per_layer"] for row in rows] == [0, 0, 2, 2, 0, 0, 4, 4]
    naive, without_both, without_one, full = (row["traffic"] for row in rows[:4])
    assert naive["hits"] == without_both["hits"] == 0
    assert naive["copies"] == 4 * _NUM_LAYERS * _EXPERTS
    assert without_both["copies"] == 4 * _NUM_LAYERS * _TOP_K
    assert 0 < without_one["copies"] < without_both["copies"]
    assert without_one["prefetches"] == 0 < full["prefetches"]
    assert rows[0]["speed_over_naive"] == 1


def test_the_loop_is_compared_with_one_program_and_taken_apart(summary: dict):
    (row,) = summary["rows"]["overhead"]
    assert row["same_text"]
    parts = {name: part["median"] for name, part in row["host_s"].items()}
    within = ("need", "predict", "take", "pass_layer", "release", "dispatch")
    assert parts["host"] == pytest.approx(sum(parts[name] for name in within))
    assert all(parts[name] > 0 for name in within)


def test_the_plot_is_xml_that_names_all_rows(summary: dict):
    picture = ET.fromstring(summary["plot"])
    text = "".join(picture.itertext())
    assert all(row in text for row in offload_plot.ROWS)
    bars = picture.findall(".//{*}rect/{*}title")
    assert len(bars) == 4 * (len(offload_plot.PAPER) + 2)


def test_the_papers_rows_rise():
    for speeds in offload_plot.PAPER.values():
        assert list(speeds) == sorted(speeds)


def test_a_link_may_take_its_time_without_copying():
    result = run_script("bench.py", *_QUICK, "--parts=overlap", "--nocopies", "--links=20")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["settings"]["copies"] is False
    assert all(row["traffic"]["copies"] for row in summary["rows"]["overlap"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--links=fast"], ["--links is not usable", "GB/s above 0"]),
        (["--links=0"], ["--links is not usable"]),
        (["--parts=overlap,all"], ["--parts is not usable", "overlap,paper,overhead"]),
        (["--parts=overlap", "--plot=rows.svg"], ["--plot draws the part paper"]),
        (["--policy=resident"], ["chooses --policy itself"]),
        (["--link_gb_per_s=1"], ["chooses --link_gb_per_s itself", "--links"]),
        (["--new_tokens=0"], ["measures decoding"]),
        (["--peer=xla"], ["--suite=offload has no such peer"]),
    ],
)
def test_bad_input_is_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("bench.py", "--suite=offload", *flags), *words)


def test_speeds_and_parts_of_flags():
    assert read_speeds("links", ["0.5", " 2"]) == (0.5e9, 2e9)
    assert check_parts(["overhead", "paper", "overhead"]) == ("overhead", "paper")
    with pytest.raises(jmoe.RequestError, match="--links"):
        read_speeds("links", ["inf"])


def test_an_oracle_says_what_comes_next_across_tokens():
    chosen_SLK = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    oracle = OraclePredictor(chosen_SLK, 2)
    nothing = np.zeros((0, 1, 2), np.int32)
    for _ in range(2):
        oracle.restart()
        oracle.predict(0, nothing)  # that nobody looks at
        said = [list(oracle.predict(i % 3, nothing)) for i in range(6)]
        assert said[0] == [(1, [2, 3]), (2, [4, 5])]
        assert said[2] == [(0, [6, 7]), (1, [8, 9])]
        assert said[4:] == [[(2, [10, 11])], []]
