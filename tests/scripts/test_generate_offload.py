"""generate.py with experts in host memory: the same text, a budget kept, and an account of it."""

import json
import os
import re
import subprocess
from typing import Any

import numpy as np
import pytest

from jmoe.planning.traces import RoutingTrace
from tests.scripts.processes import ROOT, assert_one_error, command, environment, run_script

NEW_TOKENS = 24
PROMPTS = (
    "--prompt=import os",
    "--prompt=class A:\n    def f(self",
    f"--max_new_tokens={NEW_TOKENS}",
)
OFFLOAD = ("--policy=offload", "--device_memory_gib=0.02")


def generate_json(*flags: str) -> tuple[dict[str, Any], str]:
    """What stdout and stderr say."""
    result = run_script("generate.py", *PROMPTS, *flags, "--output=json")
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout), result.stderr.decode()


@pytest.fixture(scope="module")
def resident() -> dict[str, Any]:
    answer, _ = generate_json("--policy=resident")
    assert answer["model"]["plan"]["policy"]["mode"] == "resident"
    return answer


def same_texts(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    return answer["results"] == expected["results"]


def test_it_streams_the_text_of_the_resident_model():
    """What the offload engine is done when it does."""
    flags = ("--max_new_tokens=60",)
    expected = run_script("generate.py", *flags, "--policy=resident")
    result = run_script("generate.py", *flags, *OFFLOAD)
    assert result.returncode == expected.returncode == 0, result.stderr.decode()
    assert result.stdout == expected.stdout and len(result.stdout) > 100


@pytest.mark.parametrize("flags", [("--engine=compiled",), ("--engine=auto",)])
def test_every_engine_streams_the_same_text(flags):
    """What the compiled engine is done when it does."""
    length = ("--max_new_tokens=60",)
    expected = run_script("generate.py", *length, "--policy=resident")
    result = run_script("generate.py", *length, *OFFLOAD, *flags)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == expected.stdout
    stderr = result.stderr.decode()
    assert "the program fetched experts itself" in stderr or "engine thread: " in stderr
    assert flags == ("--engine=compiled",) or re.search(
        r"^engine (compiled|thread): [\d.]+ ms a token, (compiled|thread) [\d.]+ ms$", stderr, re.M
    )


def test_the_compiled_engine_tells_what_its_program_did(resident):
    answer, stderr = generate_json(
        "--policy=offload", "--device_memory_gib=0.03", "--engine=compiled", "--tokens_per_call=4"
    )
    assert same_texts(answer, resident)
    plan, residency = answer["model"]["plan"], answer["stats"]["residency"]
    assert plan["policy"]["engine"] == residency["engine"] == "compiled"
    assert plan["policy"]["tokens_per_call"] == 4
    assert residency["peak_device_bytes"] <= plan["budget_bytes"]
    decode, layers = residency["decode"], residency["decode_by_layer"]
    assert len(layers) == 12
    for name in ("hits", "demand_loads", "copied_bytes"):
        assert sum(layer[name] for layer in layers) == decode[name] > 0
    assert decode["copied_bytes"] == decode["demand_loads"] * residency["expert_bytes"]
    assert decode["link_busy_s"] is None and decode["stalled_s"] is None
    assert "GB/s on average" in stderr


def test_auto_makes_the_same_text_in_some_way(resident):
    answer, stderr = generate_json("--device_memory_gib=0.03")  # it does not fit whole
    assert same_texts(answer, resident)
    policy = answer["model"]["plan"]["policy"]
    assert (policy["mode"], policy["engine"], policy["misses"]) == ("offload", "auto", "auto")
    residency = answer["stats"]["residency"]
    assert residency["way"] in ("thread", "split", "host", "compiled")
    stats = answer["stats"]
    by_step = stats["decode_tokens"] / stats["decode_steps"]
    predicted = stats["predicted_tok_per_s"]
    assert predicted == pytest.approx(by_step / residency["predicted_step_s"])
    assert (
        0
        < stats["decode_busy"]["device"]
        == pytest.approx(residency["resident_step_s"] * stats["decode_steps"] / stats["decode_s"])
    )
    account = f"predicted {predicted:,.1f} tok/s, measured {stats['decode_tok_per_s']:,.1f} ("
    assert account in stderr and "; busy of the time of decode steps: " in stderr


def test_a_batch_within_a_budget_tells_exactly_what_happened(resident):
    answer, stderr = generate_json("--policy=offload", "--device_memory_gib=0.03")
    assert same_texts(answer, resident)
    stats, plan = answer["stats"], answer["model"]["plan"]
    assert plan["policy"]["mode"] == "offload"
    assert plan["device_bytes"] <= plan["budget_bytes"] == int(0.03 * 2**30)
    residency = stats["residency"]
    assert residency["peak_device_bytes"] <= plan["budget_bytes"]
    assert 0 < residency["peak_places"] <= residency["num_slots"] + residency["num_staging"]
    for phase in ("prefill", "decode"):
        traffic = residency[phase]
        assert traffic["copied_bytes"] == traffic["copies"] * residency["expert_bytes"] > 0
        assert traffic["demand_loads"] <= traffic["copies"]
        needed = traffic["hits"] + traffic["demand_loads"]
        assert traffic["hit_rate"] == traffic["hits"] / needed
        assert traffic["stalled_s"] <= stats[f"{phase}_s"]
        assert f"{phase}: {needed} experts needed" in stderr
    # One line of recall per distance; two experts per token are predicted.
    ((first, second),) = residency["recall"]
    assert 0 < first < second < 1
    assert f"experts predicted: {second:.0%} 1 layer ahead" in stderr
    assert re.search(r"; bound by .*\n", stderr)
    assert resident["stats"]["residency"] is None


def test_a_slow_link_changes_the_time_and_not_the_text(resident):
    answer, _ = generate_json(*OFFLOAD, "--link_gb_per_s=2", "--link_latency_us=200")
    assert same_texts(answer, resident)
    decode = answer["stats"]["residency"]["decode"]
    seconds = decode["copies"] * 2e-4 + decode["copied_bytes"] / 2e9
    assert decode["link_busy_s"] == pytest.approx(seconds)
    assert answer["stats"]["decode_s"] >= 0.99 * seconds


def test_a_dry_run_prints_where_every_byte_goes():
    result = run_script("generate.py", *OFFLOAD, "--dry_run")
    assert result.returncode == 0 and result.stderr == b""
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("tiny-mixtral (embedded): 12 layers of 8 experts (top 2)")
    assert lines[2].split() == ["policy", "offload", "device", "memory"]
    for name in ("attention", "KV cache", "workspace", "slots", "staging", "together", "budget"):
        assert any(line.startswith(name) for line in lines)

    as_json = run_script("generate.py", *OFFLOAD, "--dry_run", "--output=json")
    plan = json.loads(as_json.stdout)["plan"]
    assert plan["device_bytes"] == sum(item["num_bytes"] for item in plan["items"])
    assert plan["device_bytes"] + plan["spare_bytes"] == plan["budget_bytes"]


# Runs a script, and says afterwards how much memory that took: the kernel keeps the peak.
_TELL_PEAK = """
import atexit, re, runpy, sys
status = "/proc/self/status"
atexit.register(lambda: print(re.findall(r"VmHWM.*", open(status).read())[0], file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
def test_a_dry_run_makes_no_weights():
    shape = ("--model=mixtral-8x7b", "--random_weights", "--num_layers=4", "--quant=int4")
    python, *run = command("generate.py", *shape, "--device_memory_gib=2", "--dry_run")
    result = subprocess.run(
        [python, "-c", _TELL_PEAK, *run, "--output=json"],
        capture_output=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr.decode()
    plan = json.loads(result.stdout)["plan"]
    assert plan["policy"]["mode"] == "offload"
    assert 1.9 * 2**30 < plan["device_bytes"] <= 2 * 2**30
    peak_kib = re.search(rb"^VmHWM:\s+(\d+) kB$", result.stderr, re.MULTILINE)
    assert peak_kib is not None
    assert int(peak_kib[1]) * 2**10 < 2**30 < plan["host_bytes"]


def test_a_policy_file_is_followed(resident, tmp_path):
    path = tmp_path / "policy.json"
    policy = {
        "version": 1,
        "mode": "offload",
        "slots": [0, 2, 8] * 4,
        "num_staging": 6,
        "eviction": "lfu",
        "misses": "load",
        "lookahead": 2,
        "fetch": 3,
        "prefill_chunk": 16,
        "engine": "thread",
        "tokens_per_call": 1,
        "fetch_ahead": 0,
    }
    path.write_text(json.dumps(policy))
    answer, _ = generate_json(f"--policy={path}")
    assert same_texts(answer, resident)
    assert answer["model"]["plan"]["policy"] == policy
    residency = answer["stats"]["residency"]
    assert (residency["num_slots"], residency["num_staging"]) == (40, 6)
    assert [len(rates) for rates in residency["recall"]] == [3, 3]


def test_routing_and_timeline_are_written(resident, tmp_path):
    routing, timeline = tmp_path / "routing.npz", tmp_path / "timeline.json"
    answer, stderr = generate_json(
        *OFFLOAD, f"--record_routing={routing}", f"--trace_timeline={timeline}"
    )
    assert same_texts(answer, resident)
    trace = RoutingTrace.load(routing)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (12, 8, 2)
    lengths = [len(result["prompt_token_ids"]) for result in answer["results"]]
    assert np.diff(trace.prompt_offsets).tolist() == lengths
    assert trace.num_tokens == answer["stats"]["decode_tokens"] == 2 * (NEW_TOKENS - 1)
    assert f"routing of {trace.num_tokens} decode tokens: {routing}" in stderr
    check_timeline(json.loads(timeline.read_text()), answer["stats"]["residency"])
    assert f"timeline: {timeline}" in stderr
    assert sorted(tmp_path.iterdir()) == [routing, timeline]


def check_timeline(timeline: dict[str, Any], residency: dict[str, Any]) -> None:
    """Three tracks with spans in each; on the link those of all copies."""
    events = timeline["traceEvents"]
    titles = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"link", "host", "device"} <= titles
    spans = {name: [e for e in events if e.get("cat") == name] for name in titles}
    for name in ("link", "host", "device"):
        assert spans[name]
        assert all(e["ph"] == "X" and e["ts"] >= 0 and e["dur"] >= 0 for e in spans[name])
    copies = residency["prefill"]["copies"] + residency["decode"]["copies"]
    assert len(spans["link"]) == copies
    assert sum(e["args"]["bytes"] for e in spans["link"]) == copies * residency["expert_bytes"]
    assert {e["name"] for e in spans["device"]} == {f"layer {layer}" for layer in range(12)}
    assert len(spans["device"]) == 12 * (NEW_TOKENS - 1)


def test_a_budget_below_the_floor_tells_the_smallest_one_which_works(resident):
    result = run_script("generate.py", *PROMPTS, "--policy=offload", "--device_memory_gib=0.005")
    stderr = result.stderr.decode()
    assert_one_error(result, "5.12 MiB", "attention", "KV cache", "workspace", "staging")
    allowed = re.search(r"allow ([\d.]+) GiB or more", stderr)
    assert allowed is not None
    smallest = float(allowed[1])
    items = re.findall(r"^ +([\d.]+) (KiB|MiB)  ", stderr, re.MULTILINE)
    total = sum(float(number) * {"KiB": 2**10, "MiB": 2**20}[unit] for number, unit in items)
    assert total == pytest.approx(smallest * 2**30, rel=0.01)

    flags = (*PROMPTS[:1], PROMPTS[2], "--policy=offload")
    less = run_script("generate.py", *flags, f"--device_memory_gib={smallest - 0.0002:.4f}")
    assert_one_error(less, f"allow {allowed[1]} GiB or more")
    enough = run_script("generate.py", *flags, f"--device_memory_gib={smallest}", "--output=json")
    assert enough.returncode == 0, enough.stderr.decode()
    assert json.loads(enough.stdout)["results"] == resident["results"][:1]


def test_what_cannot_work_is_refused_before_it_starts(tmp_path):
    missing = tmp_path / "missing" / "file"
    for flags, *words in (
        ((f"--trace_timeline={missing}", *OFFLOAD), "cannot be written"),
        ((f"--record_routing={missing}", *OFFLOAD), "cannot be written"),
        (("--trace_timeline=/dev/null", "--policy=resident"), "--policy=offload"),
        (("--policy=resident", "--device_memory_gib=0.02"), "allow 0.0945 GiB or more"),
    ):
        assert_one_error(run_script("generate.py", *flags, "--prompt=x"), *words)
    assert not list(tmp_path.iterdir())
