"""plan.py: what it prints where, and what it exits with."""

import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.quant.spec import PRESETS
from jmoe.store import manifest
from tests.faults.checkpoints import TINY_MIXTRAL
from tests.planning.test_sizes import PAPER_GIB
from tests.planning.traces import random_trace
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
    fitting = {plan["quant"]: sum(plan["plan"]["policy"]["slots"]) for plan in plans}
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
    spending = plan["plan"]
    assert sum(item["num_bytes"] for item in spending["items"]) == spending["device_bytes"]
    assert spending["device_bytes"] + spending["spare_bytes"] == 16 * GIB
    assert spending["spare_bytes"] < plan["expert_bytes"]
    assert plan["does_not_fit"] is None


def test_the_text_shows_where_every_byte_goes():
    text = plan_text("--model=mixtral-8x7b", "--quant=attn4-experts4", "--device_memory_gib=16")
    assert text.startswith("mixtral-8x7b: 32 layers of 8 experts (top 2)")
    labels = [line.split("  ")[0] for line in text.splitlines()]
    labels = [label for label in labels if label and label[0].isalpha()]
    shared = ["attention", "embeddings", "head", "routers", "norms"]
    assert labels[2:] == [
        *("attention", "experts", *shared[1:], "all weights"),
        *("KV cache", "workspace, estimated", "total"),
        *("policy offload", *shared, "KV cache", "workspace", "slots", "staging"),
        *("together", "spare", "budget", "host memory"),
    ]
    assert "- resident would take 24.53 GiB: offload\n" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "total"),
        (["--device_memory_gib=100"], "all 256 experts fit: resident"),
        (["--device_memory_gib=2"], "cannot be: the model does not fit into this device memory"),
        (["--policy=resident", "--device_memory_gib=20"], "cannot be: the model does not fit"),
        (["--policy=offload"], "no budget: a slot for every expert"),
        (["--policy=host"], "everything is computed by the CPU"),
    ],
    ids=str,
)
def test_other_memories_and_policies(flags: list[str], words: str):
    text = plan_text("--model=mixtral-8x7b", *flags)
    assert words in text
    assert ("host memory " in text) is (bool(flags) and "cannot be" not in text)


def test_what_cannot_be_is_an_answer_too():
    plan = plan_json("--device_memory_gib=0.001")
    assert plan["plan"] is None
    assert "GiB or more" in plan["does_not_fit"]
    text = plan_text("--model=mixtral-8x7b", "--quant=all", "--device_memory_gib=3")
    cells = {line.split()[0]: line for line in text.splitlines()[2:]}
    assert cells["bf16"].endswith("cannot be")
    assert cells["attn2-experts2"].endswith("of 8")


def test_a_saved_policy_comes_to_the_same_plan(tmp_path: Path):
    path = tmp_path / "policy.json"
    budget = "--device_memory_gib=0.02"
    saved = plan_json(budget, "--policy=offload", f"--save_policy={path}")["plan"]
    assert json.loads(path.read_text()) == saved["policy"]
    assert len(saved["policy"]["slots"]) == 12
    again = plan_json(budget, f"--policy={path}")["plan"]
    assert again["policy"] == saved["policy"]
    assert again["items"] == saved["items"]
    plan_json(f"--save_policy={path}")
    assert json.loads(path.read_text()) == {"version": 1, "mode": "resident"}


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
        (["--policy=ofload"], ["there is no such policy", "auto, resident, offload, host"]),
        (["--policy=README.md"], ["README.md is not JSON", "--save_policy"]),
        (["--policy=host", "--device_memory_gib=1"], ["leave the budget out"]),
        (["--device_memory_gib=0.001", "--save_policy=/absent/policy.json"], ["GiB or more"]),
        (["--save_policy=/absent/policy.json"], ["the policy cannot be written"]),
        (["--quant=all", "--save_policy=policy.json"], ["one quantization"]),
    ],
)
def test_bad_input_is_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("plan.py", *flags), *words)


_MACHINE = ("--model=mixtral-8x7b", "--quant=int4", "--num_layers=4", "--hardware=rtx4090-ddr5")


def test_speeds_are_predicted_for_a_machine(tmp_path: Path):
    random_trace(60, 4, 8).save(tmp_path / "trace.npz")
    flags = (*_MACHINE, "--device_memory_gib=2.5", f"--trace={tmp_path / 'trace.npz'}")
    plan = plan_json(*flags)
    decode = plan["decode"]
    assert decode["hardware"].startswith("RTX 4090")
    assert decode["routing"].startswith("recorded routing, 60 tokens")
    ways = decode["ways"]
    assert list(ways) == ["load", "split", "host"]
    assert ways["load"]["host_experts"] == ways["host"]["copies"] == 0
    assert ways["host"]["tokens_per_s"] > ways["load"]["tokens_per_s"] > 0
    assert plan["plan"] == plan_json(*flags[:3], flags[4])["plan"]
    text = plan_text(*_MACHINE, "--device_memory_gib=2.5")
    assert "by uniformly random routing, 1000 tokens" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "%" in line}
    assert all(len(rows[way]) == 8 for way in ways)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trace=trace.npz"], ["--hardware"]),
        (["--hardware=rtx4090-ddr5"], ["--device_memory_gib or --policy"]),
        (["--hardware=rtx5090", "--policy=offload"], ["'rtx5090'", "rtx4090-ddr5"]),
        (["--hardware=rtx4090-ddr5", "--policy=offload", "--batch=2"], ["one sequence"]),
        (["--hardware=rtx4090-ddr5", "--policy=offload", "--quant=all"], ["--quant=all"]),
        ([*_MACHINE, "--policy=resident"], ["policy resident", "--policy=offload"]),
        (["--hardware=rtx4090-ddr5", "--policy=offload"], ["no times of these experts", "192 x"]),
        ([*_MACHINE, "--policy=offload", "--trace=/absent.npz"], ["/absent.npz"]),
    ],
    ids=str,
)
def test_speeds_that_cannot_be_predicted_are_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("plan.py", *flags), *words)
