"""bench.py --suite=hybrid: that every way runs at every point, and is beside what was predicted."""

import json
import xml.etree.ElementTree as ET

import pytest

from tests.scripts.processes import assert_one_error, run_script

_QUICK = (
    "--suite=hybrid",
    "--new_tokens=3",
    "--repeats=1",
    "--warmup=0",
    "--slots=2",
    "--links=1",
    "--host_gb_per_s=1",
    "--prompt_lengths=20",
    "--batch=2",
    "--quant=int4",
)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory):
    plot = tmp_path_factory.mktemp("plot") / "ways.svg"
    result = run_script("bench.py", *_QUICK, f"--plot={plot}")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"plot": plot.read_text()}


def test_every_way_decodes_and_does_what_its_name_says(summary: dict):
    rows = {row["way"]: row for row in summary["rows"]["decode"]}
    assert list(rows) == ["load", "host", "split", "auto"]
    assert rows["load"]["traffic"]["host_experts"] == 0 < rows["load"]["traffic"]["copies"]
    assert rows["host"]["traffic"]["demand_loads"] == 0 < rows["host"]["traffic"]["host_experts"]
    assert rows["auto"]["chosen"] in ("thread", "host", "split")
    for way in ("load", "host", "split"):
        assert rows[way]["predicted_tok_per_s"] > 0 and rows[way]["bound_tok_per_s"] > 0
    decode = summary["decode"]
    assert len(decode["auto_regrets"]) == 1 and 0 <= decode["auto_regrets"][0] < 1
    assert decode["prediction_errors"]["median"] >= 0


def test_prompts_and_beams(summary: dict):
    prompts = {row["way"]: row for row in summary["rows"]["prompts"]}
    assert set(prompts) == {"load", "host", "split"}
    assert prompts["load"]["traffic"]["host_experts"] == 0
    assert prompts["host"]["traffic"]["host_experts"] > 0
    (beams,) = summary["rows"]["beams"]
    assert beams["num_beams"] == 2 and beams["over_serial"]["median"] > 0


def test_the_plot_is_xml_that_names_all_ways(summary: dict):
    text = "".join(ET.fromstring(summary["plot"]).itertext())
    for label in ("offload", "on the host", "hybrid", "bound", "2 slots per layer"):
        assert label in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots=none"], ["--slots is not usable"]),
        (["--misses=host"], ["chooses --misses itself"]),
        (["--parts=beams", "--plot=ways.svg"], ["--plot draws", "decode of the suite hybrid"]),
    ],
)
def test_bad_input_is_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("bench.py", "--suite=hybrid", *flags), *words)
