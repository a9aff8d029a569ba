"""eval.py: what it prints where, what it compares with, and what it exits with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jmoe.quant.spec import parse_spec
from jmoe.store.convert import Conversion
from jmoe.store.open_source import open_source
from tests.equivalence.checkpoints import RANDOM_MIXTRALS, write_random_mixtral
from tests.faults.checkpoints import TINY_MIXTRAL
from tests.scripts.processes import assert_one_error, run_script

FEW = ("--window=64", "--max_windows=3")


def eval_json(*flags: str) -> dict[str, Any]:
    result = run_script("eval.py", *flags, *FEW, "--output=json")
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """The embedded model in four bits, rounded to nearest."""
    directory = tmp_path_factory.mktemp("stores") / "int4"
    quant = parse_spec("attn4-experts4")
    Conversion(open_source(str(TINY_MIXTRAL)), directory, quant, method="rtn", resume=False).run()
    return directory


def test_the_embedded_model_alone():
    result = run_script("eval.py", *FEW)
    assert result.returncode == 0, result.stderr.decode()
    labels = [line[:18].strip() for line in result.stdout.decode().splitlines()]
    assert labels == ["perplexity", "weights"]
    assert "192 predictions in 3 windows" in result.stdout.decode()
    assert "16.00 bits per weight" in result.stdout.decode()
    assert "tiny-mixtral (embedded)" in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


def test_quantized_it_is_compared_with_itself():
    result = run_script("eval.py", "--quant=attn4-experts2", "--method=rtn", *FEW)
    assert result.returncode == 0, result.stderr.decode()
    labels = [line[:18].strip() for line in result.stdout.decode().splitlines()]
    assert labels == [
        "perplexity",
        "of the reference",
        "KL divergence",
        "top-1 agreement",
        "weights",
    ]
    assert "the same model, unquantized" in result.stderr.decode()


def test_a_store_gives_what_quantizing_on_the_way_gives(store: Path):
    text = f"--text={TINY_MIXTRAL / 'eval.txt'}"
    alone = eval_json(f"--model={store}", text)
    assert alone["reference"] is None
    assert "kl_mean" not in alone
    compared = eval_json(f"--model={store}", text, f"--reference={TINY_MIXTRAL}")
    loaded = eval_json("--quant=attn4-experts4", "--method=rtn")
    assert compared["perplexity"] == pytest.approx(loaded["perplexity"], rel=1e-5)
    assert compared["kl_mean"] == pytest.approx(loaded["kl_mean"], rel=1e-3)
    assert alone["perplexity"] == compared["perplexity"]
    assert compared["top1_agreement"] == loaded["top1_agreement"] > 0.8
    assert compared["perplexity_ratio"] == pytest.approx(
        compared["perplexity"] / compared["reference_perplexity"]
    )
    for key in ("perplexity_error", "perplexity_ratio_error", "kl_median", "kl_p99"):
        assert math.isfinite(compared[key])
    assert compared["quant"] == "attn4-experts4"
    assert compared["stored_bytes"] < compared["weight_bytes"]
    assert 5 < compared["bits_per_weight"] < 6


def test_no_reference_if_none_is_wanted():
    assert eval_json("--quant=int8", "--method=rtn", "--reference=none")["reference"] is None


def test_another_model_as_reference_is_refused(tmp_path: Path):
    pytest.importorskip("torch")
    write_random_mixtral(RANDOM_MIXTRALS[0], tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((TINY_MIXTRAL / "tokenizer.json").read_bytes())
    result = run_script("eval.py", f"--reference={tmp_path}", *FEW)
    assert_one_error(result, "reference" if b"reference" in result.stderr else "tokenizer.json")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([f"--model={TINY_MIXTRAL}"], ["no text to score", "--text"]),
        (["--text=/absent"], ["the text cannot be read", "/absent"]),
        (["--quant=attn5"], ["unknown quantization"]),
        (["--window=0"], ["--window"]),
        (["--max_windows=0"], ["--max_windows"]),
        (["--window=1025"], ["longer than the model's context", "at most 1024"]),
        (["--model=/absent", "--text=README.md"], ["there is no directory /absent"]),
        (["--reference=/absent"], ["there is no directory /absent"]),
        (["--method=hqqq"], ["--method"]),
    ],
)
def test_bad_input_is_one_error(flags: list[str], words: list[str]):
    assert_one_error(run_script("eval.py", *flags), *words)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", ["the text is empty"]),
        (b"Hello", ["shorter than one window", "at least 256"]),
        (b"\xff\xfe", ["the text is not UTF-8", "0xff at offset 0"]),
    ],
)
def test_unusable_text(contents: bytes, words: list[str], tmp_path: Path):
    (tmp_path / "text").write_bytes(contents)
    assert_one_error(run_script("eval.py", f"--text={tmp_path / 'text'}"), *words)
