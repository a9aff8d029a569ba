"""bench.py --suite=engines: that every engine is measured as its row says."""

import json
import math
import sys

import jax
import pytest

import jmoe
from jmoe import native
from tests.scripts.processes import ROOT, assert_one_error, run_script

sys.path.insert(0, str(ROOT / "scripts"))

from _bench import engines_compile
from _bench.report import JsonLinesReport
from _bench.settings import PARTS, Settings, check_parts

_NUM_LAYERS, _TOP_K, _EXPERTS = 2, 2, 8
_MODEL = ("--model=jmoe/data/tiny-mixtral", "--random_weights", f"--num_layers={_NUM_LAYERS}")
_QUICK = ("--new_tokens=10", "--repeats=1", "--parts=decode,fetch,misses,ahead")
_NUM_NEEDED = 10 * _NUM_LAYERS * _TOP_K


@pytest.fixture(scope="module")
def summary():
    result = run_script("bench.py", "--suite=engines", *_MODEL, *_QUICK)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_engines_need_the_same_experts_and_copy_none_that_is_there(summary: dict):
    rows = {(row["what"], row["slots_per_layer"]): row for row in summary["rows"]["decode"]}
    names = ["thread", "thread, 1 ahead", "compiled", "compiled, 8 a call"]
    assert list(rows) == [("resident", None)] + [(name, n) for n in (8, 4) for name in names]
    expert_bytes = summary["subject"]["expert_bytes"]
    for (name, slots), row in rows.items():
        assert row["beside"] == "resident"
        assert row["s_per_token"]["median"] > 0
        if name == "resident":
            assert row["traffic"] is None and row["ratio"]["median"] == 1
            continue
        traffic = row["traffic"]
        if row["same_text"]:
            assert traffic["hits"] + traffic["demand_loads"] == _NUM_NEEDED
        if slots == _EXPERTS:
            assert traffic["demand_loads"] == 0
        else:
            assert traffic["demand_loads"] > 0
            assert row["copied_bytes_per_token"] == traffic["copies"] * expert_bytes / 10
    by_call = [rows[name, 4] for name in names[2:]]
    if all(row["same_text"] for row in by_call):
        assert by_call[0]["traffic"]["copies"] == by_call[1]["traffic"]["copies"]


def test_ways_of_copying_move_the_same_bytes(summary: dict):
    rows = {row["what"]: row for row in summary["rows"]["fetch"]}
    assert list(rows) == ["program", "link", "numpy"]
    all_experts = _NUM_LAYERS * _EXPERTS * summary["subject"]["expert_bytes"]
    for row in rows.values():
        assert row["num_bytes"] % all_experts == 0
        assert row["bytes_per_s"]["median"] > 0
    program, numpy = (rows[name]["bytes_per_s"]["median"] for name in ("program", "numpy"))
    assert math.isclose(rows["program"]["ratio"]["numpy"]["median"], program / numpy)


def test_missing_experts_are_copied_or_computed_where_they_lie(summary: dict):
    # That all ways compute the same bits is checked as they are measured.
    rows = {row["what"]: row for row in summary["rows"]["misses"]}
    assert list(rows) == ["copied", "in place", "in place, device_host"]
    assert rows["copied"]["ratio"]["median"] == 1
    for row in rows.values():
        assert row["expert_bytes"] == summary["subject"]["expert_bytes"]
        assert row["s_per_expert"]["median"] > 0


def test_experts_are_fetched_ahead_if_the_row_says_so(summary: dict):
    nothing, one, two = (row["traffic"] for row in summary["rows"]["ahead"])
    assert nothing["prefetches"] == 0 < one["prefetches"] < two["prefetches"]
    assert two["demand_loads"] < nothing["demand_loads"]


def test_a_shape_is_compiled_without_weights_and_then_read_from_the_cache():
    settings = Settings(
        model="mixtral-8x7b",
        models=(),
        loading={"random_weights": True, "quant": "int4"},
        batch_sizes=(1,),
        prompt_lengths=(),
        new_tokens=1,
        repeats=1,
        warmup=0,
        peer="none",
        layers=(1,),
    )
    before = jax.config.values["jax_compilation_cache_dir"]
    rows = engines_compile.measure(settings, JsonLinesReport())
    assert jax.config.values["jax_compilation_cache_dir"] == before
    has_kernels = native.status().available
    assert [row["host_kernels"] for row in rows] == [True, False][not has_kernels :]
    for row in rows:
        assert not row["cold"]["from_cache"] and row["again"]["from_cache"]


def test_parts_are_those_of_the_suite():
    assert check_parts(None, "engines") == PARTS["engines"]
    assert check_parts(["compile", "decode"], "engines") == ("compile", "decode")
    assert check_parts(None, "kernels") == ()
    for parts in ([], ["overlap"]):
        with pytest.raises(jmoe.RequestError, match="decode,fetch,misses,ahead,compile"):
            check_parts(parts, "engines")
    with pytest.raises(jmoe.RequestError, match="decode has no parts"):
        check_parts(["overlap"], "decode")


def test_the_suite_chooses_the_engine_itself():
    result = run_script("bench.py", "--suite=engines", "--engine=thread")
    assert_one_error(result, "chooses --engine itself")
