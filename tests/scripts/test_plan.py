"""plan.py: what it prints where, and what it exits with."""

import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.quant.spec import PRESETS
from jmoe.store import manifest
from tests.faults.checkpoints import TINY_MIXTRAL
from tests.planning.test_sizes import PAPER_GIB
from tests.scripts.processes import assert_one_error, run_script

GIB = 2**30


def plan_json(*flags: str, **environment: Any) -> dict[str, Any]:
    result = run_script("plan.py", *flags, "--output=json", **environment)
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


def plan_text(*flags: str) -> str:
    result = run_script("plan.py", *flags)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    return result.stdout.decode()


def write_store(directory: Path, quant: str) -> Path:
    """What plan.py reads of a converted store."""
    directory.mkdir()
    (directory / "config.json").write_bytes((TINY_MIXTRAL / "config.json").read_bytes())
    contents = manifest.Manifest(
        quant=PRESETS[quant], method="hqq", source={}, config_sha256="0" * 64, files={}
    )
    (directory / manifest.MANIFEST_NAME).write_bytes(contents.to_bytes())
    return directory


def test_all_presets_have_the_papers_sizes_and_no_device_is_needed():
    plans = plan_json(
        "--model=mixtral-8x7b", "--quant=all", "--device_memory_gib=16", JAX_PLATFORMS="nonsense"
    )["plans"]
    assert [plan["quant"] for plan in plans] == list(PRESETS)
    weight_gib = {plan["quant"]: plan["weight_bytes"] / GIB for plan in plans}
    for preset, gib in PAPER_GIB.items():
        assert weight_gib[preset] == pytest.approx(gib, rel=0.02)
    fitting = {plan["quant"]: plan["device_memory"]["experts_per_layer"] for plan in plans}
    assert fitting["bf16"] < fitting["attn4-experts4"] < fitting["attn4-experts2"]


def test_the_parts_add_up():
    plan = plan_json("--model=mixtral-8x7b", "--quant=attn4-experts4", "--device_memory_gib=16")
    parts = plan["components"].values()
    assert sum(part["bytes"] for part in parts) == plan["weight_bytes"]
    assert sum(part["num_weights"] for part in parts) == plan["num_weights"] == 46_702_792_704
    rest = plan["kv_cache_bytes"] + plan["workspace_bytes"]
    assert plan["weight_bytes"] + rest == plan["total_bytes"]
    shares = sum(part["share"] for part in parts) + rest / plan["total_bytes"]
    assert shares == pytest.approx(1)
    memory = plan["device_memory"]
    base = plan["total_bytes"] - plan["components"]["experts"]["bytes"]
    assert memory["spare_bytes"] == 16 * GIB - base
    assert memory["num_slots"] == memory["spare_bytes"] // plan["expert_bytes"]
    assert memory["experts_per_layer"] == memory["num_slots"] // 32
    assert memory["all_fits"] is False


def test_the_text_shows_the_arithmetic():
    text = plan_text("--model=mixtral-8x7b", "--quant=attn4-experts4", "--device_memory_gib=16")
    assert text.startswith("mixtral-8x7b: 32 layers of 8 experts (top 2)")
    labels = [line.split("  ")[0] for line in text.splitlines()]
    assert [label for label in labels if label and label[0].isalpha()][2:-1] == [
        *("attention", "experts", "embeddings", "head", "routers", "norms", "all weights"),
        *("KV cache", "workspace, estimated", "total"),
    ]
    assert "Does not fit into 16.00 GiB as a whole, but with 4 of 8 experts per layer" in text
    assert "per expert = 158 experts of 256" in text


@pytest.mark.parametrize(
    ("gib", "words"),
    [("100", "Fits into 100.00 GiB"), ("2", "not even with a single expert"), (None, "total")],
)
def test_other_memories(gib: str | None, words: str):
    flags = [] if gib is None else [f"--device_memory_gib={gib}"]
    text = plan_text("--model=mixtral-8x7b", *flags)
    assert words in text
    assert (" without experts = " in text or "to spare" in text) is (gib is not None)


def test_layers_context_and_batch_count():
    one = plan_json("--model=mixtral-8x7b", "--num_layers=1", "--context=1024")
    two = plan_json("--model=mixtral-8x7b", "--num_layers=2", "--context=2048", "--batch=3")
    assert two["components"]["experts"]["bytes"] == 2 * one["components"]["experts"]["bytes"]
    assert two["components"]["head"] == one["components"]["head"] | {
        "share": two["components"]["head"]["share"]
    }
    assert two["kv_cache_bytes"] == 2 * 2 * 3 * one["kv_cache_bytes"]
    assert plan_json("--dtype=float32")["weight_bytes"] == 2 * plan_json()["weight_bytes"]


def test_a_directory_needs_nothing_but_its_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_bytes((TINY_MIXTRAL / "config.json").read_bytes())
    plan = plan_json(f"--model={tmp_path}")
    assert plan["num_weights"] == 16_931_520
    assert plan["weight_bytes"] == 33_863_040
    assert plan | {"model": ""} == plan_json(f"--model={tmp_path / 'config.json'}") | {"model": ""}
    assert plan | {"model": ""} == plan_json() | {"model": ""}


def test_a_store_has_its_own_formats(tmp_path: Path):
    store = write_store(tmp_path / "store", "attn4-experts3")
    plan = plan_json(f"--model={store}")
    assert plan["quant"] == "attn4-experts3"
    assert plan["weight_bytes"] == plan_json("--quant=attn4-experts3")["weight_bytes"]
    result = run_script("plan.py", f"--model={store}", "--quant=int8")
    assert_one_error(result, "another quantization", "attn4-experts3")
    result = run_script("plan.py", f"--model={store}", "--num_layers=2")
    assert_one_error(result, "leave the number of layers out")


def test_presets_that_a_model_cannot_have_are_left_out(tmp_path: Path):
    config = json.loads((TINY_MIXTRAL / "config.json").read_bytes())
    config |= {"hidden_size": 208, "head_dim": 32}  # a multiple of 16, but not of 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run_script("plan.py", f"--model={tmp_path}", "--quant=all", "--output=json")
    assert result.returncode == 0
    names = [plan["quant"] for plan in json.loads(result.stdout)["plans"]]
    assert names == ["bf16", "f32", "attn16-experts2", "attn2-experts16", "attn2-experts2"]
    assert b"int4 is not possible: the quantization group does not divide" in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=mixtral-9x9b"], ["no model of this name is known", "mixtral-8x7b"]),
        (["--model=/absent"], ["there is no directory /absent"]),
        (["--quant=attn5"], ["unknown quantization", "attn4-experts4"]),
        (["--model=mixtral-8x7b", "--quant=experts=4g512"], ["power of two from 16 to 256"]),
        (["--context=1025"], ["1025 positions", "from 1 to 1024"]),
        (["--context=0"], ["from 1 to 1024"]),
        (["--batch=0"], ["--batch"]),
        (["--device_memory_gib=-1"], ["--device_memory_gib"]),
        (["--quants=all"], ["--help lists the flags"]),
    ],
)
def test_bad_input_is_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("plan.py", *flags), *words)
