"""bench.py: what it prints where, what it exits with, and the arithmetic behind its figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jmoe
from jmoe import native
from jmoe.engines.resident import ResidentEngine
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.random_weights import random_parameters

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "scripts"))

from _bench import bounds, report, statistics  # noqa: E402
from _bench.machine import Neighbours  # noqa: E402
from _bench.peer import TransformersPeer  # noqa: E402
from _bench.settings import Settings, Subject, read_integers  # noqa: E402

_SMALL = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
_QUICK = ("--repeats=1", "--warmup=0", "--new_tokens=4", "--prompt_lengths=8")


def _bench(
    *flags: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    here = {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "scripts/bench.py", *flags],
        capture_output=True,
        text=True,
        env=os.environ | here | (environment or {}),
        cwd=_ROOT,
    )


def _small_engine(dtype: str = "float32") -> ResidentEngine:
    config = families.config_from_json(_SMALL, "here")
    return ResidentEngine(config, random_parameters(config, dtype), dtype, jax.devices("cpu")[0])


def _settings(**changes: Any) -> Settings:
    fields = {
        "model": None,
        "models": (),
        "loading": {},
        "batch_sizes": (1,),
        "prompt_lengths": (8,),
        "new_tokens": 4,
        "repeats": 1,
        "warmup": 0,
        "peer": "none",
    }
    return Settings(**(fields | changes))


def test_markdown_ends_with_one_json_object_that_holds_everything(tmp_path: Path):
    output_file = tmp_path / "results.jsonl"
    output_file.write_text('{"older": 1}')  # without the newline at its end
    result = _bench(*_QUICK, "--batch=1,2", f"--output_file={output_file}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Ceiling of tiny-mixtral")
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")] == [
        "test",
        "-------:",
        *("pp8", "tg4") * 2,
    ]

    summary = json.loads(lines[-1])
    assert {"suite", "commit", "dirty", "version", "date", "machine", "settings"} < summary.keys()
    assert {"subject", "ceiling", "rows"} < summary.keys()
    assert summary["suite"] == "decode"
    assert {"cpu", "num_cores", "host_memory_bytes", "device", "versions"} < summary[
        "machine"
    ].keys()
    assert {"python", "jax", "jaxlib"} < summary["machine"]["versions"].keys()
    assert {"read_bytes_per_s", "read_how", "matmul_flop_per_s", "matmul_how"} < summary[
        "ceiling"
    ].keys()
    assert [(row["test"], row["batch"]) for row in summary["rows"]] == [
        ("pp8", 1),
        ("tg4", 1),
        ("pp8", 2),
        ("tg4", 2),
    ]
    for row in summary["rows"]:
        assert row["dtype"] == "float32"
        assert row["peer"] is None
        assert len(row["tok_per_s"]["samples"]) == row["repeats"] == 1
        assert row["tok_per_s"]["min"] <= row["tok_per_s"]["median"] <= row["tok_per_s"]["max"]
        assert row["share_of_bound"]["median"] > 0
    one, several = summary["rows"][1], summary["rows"][3]
    assert (one["experts_per_layer"], one["experts_counted"]) == (2, "exact")
    assert 2 <= several["experts_per_layer"] <= 4
    assert several["experts_counted"] == "measured"
    assert output_file.read_text().splitlines() == ['{"older": 1}', lines[-1]]


def test_jsonl_of_random_weights_is_json_in_every_line(tmp_path: Path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(_SMALL | {"vocab_size": 4096}))  # as many as the tokenizer has
    result = _bench(
        *_QUICK,
        f"--model={config}",
        "--random_weights",
        "--num_layers=3",
        "--dtype=bfloat16",
        "--quant=attention=8g16sf,experts=4g16",
        "--format=jsonl",
    )
    assert result.returncode == 0, result.stderr
    first, *rows, summary = map(json.loads, result.stdout.splitlines())
    assert first["ceiling"] == summary["ceiling"]
    assert rows == summary["rows"]
    assert summary["subject"]["num_hidden_layers"] == 3
    assert summary["subject"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=nothing"], "--suite=nothing"),
        (["--batch=1,two"], "--batch is not usable"),
        (["--prompt_lengths=0"], "--prompt_lengths is not usable"),
        (["--new_tokens=0", "--prompt_lengths="], "nothing to measure"),
        (["--num_layers=2"], "goes with random weights only"),
        (["--model=nowhere", "--random_weights"], "no model of this name is known"),
        (["--model=mixtral-8x7b", "--random_weights"], "does not fit into the memory"),
        (["--prompt_lengths=1024"], "longer than the model's context"),
        (["--output_file=nowhere/results.jsonl"], "--output_file cannot be written"),
        (["--threads=0"], "--threads"),
        (["--peer=torch"], "--suite=decode has no such peer"),
        (["--suite=load", "--peer=xla"], "--suite=load has no such peer"),
        (["--peer=xla", "--nohost_kernels"], "there are none in use"),
        (["--suite=kernels", "--tokens=none"], "--tokens is not usable"),
    ],
)
def test_bad_input_is_one_error_and_no_measurement(flags: list[str], message: str):
    result = _bench(*flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


_NATIVE = pytest.mark.skipif(not native.status().available, reason=native.status().reason)


@_NATIVE
def test_kernels_are_measured_beside_memory_and_xla(tmp_path: Path):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(_SMALL))
    result = _bench(
        "--suite=kernels",
        f"--model={config}",
        "--formats=4g16,bf16",
        "--tokens=1,5",
        "--quant=attention=4g16,head=8g16sf",
        "--repeats=1",
        "--warmup=0",
        "--threads=1",
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    rows = summary["rows"]
    expected = [
        *(("experts", "4g16", tokens, bits) for tokens in (1, 5) for bits in ("8", "16", "24")),
        *(("experts", "bf16", tokens, "float") for tokens in (1, 5)),
        *(("projection 32x32", "4g16", n, bits) for n in (1, 5) for bits in ("8", "16", "24")),
        *(("head 256x32", "8g16sf", 1, bits) for bits in ("8", "16", "24")),
        *(("attend 64 positions", name, 1, "float") for name in ("bf16", "f32")),
    ]
    names = ("what", "form", "tokens", "activation_bits")
    assert [tuple(row[name] for name in names) for row in rows] == expected
    largest_nmse = {"8": 1e-2, "16": 1e-6, "24": 1e-9, "float": 1e-3}
    for row in rows:
        assert 0 <= row["nmse"] < largest_nmse[row["activation_bits"]]
        assert row["bytes_per_s"]["median"] > 0
        assert row["xla"]["ratio_of_medians"] > 0
    one, five = rows[0], rows[3]
    assert five["flop"] == 5 * one["flop"] == 5 * 2 * 3 * 2 * 32 * 48
    assert five["weight_bytes"] == 2 * one["weight_bytes"]  # all four experts, not two
    assert len(one["seconds"]["samples"]) == 4 * len(five["seconds"]["samples"])
    assert summary["ceiling"]["num_threads"] == 1


@_NATIVE
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats=3g16"], "no host kernel for this format"),
        (["--formats=5g64"], "quantization is to 8, 4, 3 or 2 bits"),
        (["--model=nowhere"], "no model of this name is known"),
    ],
)
def test_kernels_refuse_what_they_cannot_measure(flags: list[str], message: str):
    result = _bench("--suite=kernels", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


@_NATIVE
def test_the_host_kernels_are_compared_with_xla():
    result = _bench(*_QUICK, "--quant=int8", "--method=rtn", "--peer=xla", "--threads=1")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["subject"]["host_kernels"]["num_threads"] == 1
    for row in summary["rows"]:
        assert row["peer"]["name"] == "jmoe without host kernels"
        assert row["peer"]["pair_ratio"]["median"] > 0


def test_kernels_need_kernels():
    environment = {"JMOE_NATIVE": "0"}
    result = _bench("--suite=kernels", environment=environment)
    assert result.returncode == 2
    assert "switched off by JMOE_NATIVE=0" in result.stderr


def test_help_explains_the_suites():
    result = _bench("--help")
    assert result.returncode == 0
    assert "Suites:" in result.stdout
    assert "--prompt_lengths" in result.stdout


def test_median_and_spread():
    summary = statistics.summarize([3.0, 1.0, 2.0, 10.0])
    assert (summary.median, summary.min, summary.max) == (2.5, 1.0, 10.0)
    assert summary.spread == 9.0 / 2.5
    assert statistics.summarize([2.0]).spread == 0


def test_repetitions_take_turns_and_warm_up_is_dropped():
    calls, ticks = [], []

    def contestant(name: str):
        return lambda: calls.append(name) or len(calls)

    results = statistics.take_turns(
        {"a": contestant("a"), "b": contestant("b")},
        repeats=2,
        warmup=1,
        progress=lambda: ticks.append(1),
    )
    assert calls == ["a", "b"] * 3
    assert results == {"a": [3, 5], "b": [4, 6]}
    assert len(ticks) == 6


def test_a_slow_contestant_takes_part_in_the_first_repetitions_only():
    calls = []
    results = statistics.take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"},
        repeats=3,
        warmup=1,
        limits={"b": 1},
    )
    assert "".join(calls) == "ababaa"
    assert {name: len(runs) for name, runs in results.items()} == {"a": 3, "b": 1}


def test_pairs_are_compared_before_the_median_is_taken():
    # The machine slows down by ten; we are twice as fast all the time, and once four times.
    comparison = statistics.compare([20.0, 2.0, 4.0], [10.0, 1.0, 1.0])
    assert comparison["pair_ratio"]["median"] == 2
    assert comparison["pair_ratio"]["max"] == 4
    assert comparison["ratio_of_medians"] == 4
    assert comparison["ratio_of_best"] == 2


def test_numbers_of_flags():
    assert read_integers("batch", ["1", " 4"]) == (1, 4)
    with pytest.raises(jmoe.RequestError, match=r"--batch is not usable"):
        read_integers("batch", ["-1"])
    with pytest.raises(jmoe.RequestError, match="nothing to measure"):
        _settings(prompt_lengths=(), new_tokens=0)


def test_bytes_of_a_step_are_all_weights_but_the_embedding_if_all_experts_are_used():
    config = families.config_from_json(_SMALL, "here")
    sizes = {path: math.prod(p.shape) for path, p in abstract_parameters(config).items()}
    everything = sum(sizes.values()) - sizes["embed_tokens"]
    experts = sum(size for path, size in sizes.items() if ".experts." in path)
    assert bounds.weight_bytes_per_step(config, "float32", 4) == 4 * everything
    assert bounds.weight_bytes_per_step(config, "bfloat16", 1) == 2 * (
        everything - experts + experts / 4
    )


def test_flop_of_a_prompt_of_one_token_is_two_per_weight_in_use():
    config = families.config_from_json(_SMALL, "here")
    weights_in_use = bounds.weight_bytes_per_step(config, "float32", config.router.top_k) / 4
    scores_and_mixture = 2 * 2 * config.hidden_size * config.num_hidden_layers
    norm_scales = (2 * config.num_hidden_layers + 1) * config.hidden_size
    flop = bounds.prefill_flop(config, 1)
    assert flop == 2 * (weights_in_use - norm_scales) + scores_and_mixture
    assert bounds.prefill_flop(config, 8) > 7 * (flop - 2 * config.vocab_size * config.hidden_size)


def test_the_bound_is_taken_from_the_ceiling_beside_each_repetition():
    work = {"bound_by": "read", "work_per_token": 10.0}
    result = bounds.compare_with_bound(work, [5.0, 1.0], [100.0, 20.0])
    assert result["bound_tok_per_s"]["samples"] == (10.0, 2.0)
    assert result["share_of_bound"]["median"] == 0.5
    assert result["read_bytes_per_s"] == 30.0


def test_experts_of_equal_sequences_are_top_k():
    engine = _small_engine()
    tokens_BL = np.tile(np.arange(12), (3, 1))
    assert bounds.experts_per_layer(engine, tokens_BL, 1) == 2
    assert 2 < bounds.experts_per_layer(engine, np.arange(36).reshape(3, 12), 1) <= 4


def test_neighbours_use_a_share_of_the_machine():
    with Neighbours() as neighbours:
        pass
    assert 0 <= neighbours.share <= 1


def test_a_full_disk_is_an_error_that_says_where_the_result_is():
    with (
        report.ResultFile("/dev/full") as file,
        pytest.raises(jmoe.RequestError, match="last line of stdout"),
    ):
        file.append({"suite": "decode"})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_peer_computes_the_same_model(dtype: str, tolerance: float):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    engine = _small_engine(dtype)
    peer = TransformersPeer(Subject("small", engine, _SMALL))
    assert peer.name.startswith("transformers ")
    token_ids = list(range(1, 20))
    expected = engine.logits(token_ids)[-1]
    np.testing.assert_allclose(
        peer.logits(np.array([token_ids]))[0], expected, atol=tolerance * np.abs(expected).max()
    )
    prefill_s, decode_s = peer.run(np.array([token_ids]), 2)
    assert prefill_s > 0
    assert decode_s > 0


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(jmoe.RequestError, match="pip install"):
        TransformersPeer(Subject("small", _small_engine(), _SMALL))
