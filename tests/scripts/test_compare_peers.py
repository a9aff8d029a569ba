"""compare_peers.py: peers in processes, their turns, sizes, and what is refused or left out."""

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import jmoe
from jmoe.planning import memory, sizes
from jmoe.planning.model_shape import read_model_shape
from jmoe.store.known_models import read_shape
from tests.scripts.processes import ROOT, assert_one_error, run_script

sys.path.insert(0, str(ROOT / "scripts"))

from _peers import measure, peers, q4_0
from _peers.process import PeerProcess

_SMALL = {
    "model_type": "mixtral",
    "vocab_size": 4096,  # as many as the tokenizer has
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}

# Runs take 2 s for a prompt and 1 s for its steps; every run adds the name to a file.
_FAKE = """
import sys
from _peers.worker import Run, serve

class Fake:
    def __init__(self, settings):
        if settings["fails"] == "load":
            raise ValueError("no such weights")
        self.settings = settings
        self.facts = {"name": settings["name"], "weights": "none", "bytes_per_token": 5e9}
        print("libraries print to stdout")

    def run(self, prompt, new_tokens):
        print("so do they now")
        if self.settings["fails"] == "run":
            print("the last words", file=sys.stderr)
            sys.stderr.flush()
            import os; os._exit(7)
        with open(self.settings["log"], "a") as file:
            print(self.settings["name"], len(prompt), new_tokens, file=file)
        return Run(2.0, 1.0)

    def extra(self):
        return {"read_bytes_per_s": 100e9}

serve(Fake)
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.json").write_text(json.dumps(_SMALL))
    return str(tmp_path / "small.json")


def fake(directory: Path, name: str, fails: str = "never") -> peers.Candidate:
    script = directory / "fake_worker.py"
    script.write_text(_FAKE)
    settings = {"name": name, "fails": fails, "log": str(directory / "log")}
    return peers.Candidate(name, [sys.executable, str(script)], settings, 0)


def comparison(model: str, **changes: Any) -> peers.Comparison:
    fields = {
        "model": model,
        "loading": {
            "random_weights": True,
            "num_layers": 1,
            "dtype": "auto",
            "quant": "int4",
        },
        "prompt_tokens": 8,
        "new_tokens": 4,
        "threads": 1,
        "peers": (),
        "llama_cpp_python": None,
        "cache_dir": "",
    }
    return peers.Comparison(**(fields | changes))


def test_a_peer_answers_from_its_own_process(tmp_path: Path):
    process = fake(tmp_path, "one").start()
    try:
        assert process.facts["name"] == "one"
        for _ in range(2):
            result = process.run([1, 2, 3], 4)
            assert result == {"prefill_s": 2.0, "decode_s": 1.0, "read_bytes_per_s": 100e9}
    finally:
        process.close()
    assert (tmp_path / "log").read_text() == "one 3 4\n" * 2


def test_a_peer_that_cannot_load_is_an_error_that_says_why(tmp_path: Path):
    with pytest.raises(jmoe.RequestError, match=r"one failed\n  got: ValueError: no such weights"):
        fake(tmp_path, "one", fails="load").start()


def test_a_peer_that_ends_is_an_error_with_its_last_words(tmp_path: Path):
    process = fake(tmp_path, "one", fails="run").start()
    try:
        with pytest.raises(jmoe.RequestError, match=r"(?s)ended with status 7.*the last words"):
            process.run([1], 1)
    finally:
        process.close()


def test_a_peer_that_cannot_be_started_is_an_error(tmp_path: Path):
    with pytest.raises(jmoe.RequestError, match="could not be started"):
        PeerProcess("one", [str(tmp_path / "nothing")], {})


@pytest.mark.parametrize(("together", "order"), [(True, "abab"), (False, "aabb")])
def test_peers_take_turns_if_there_is_room_for_all(
    tmp_path: Path, small: str, together: bool, order: str
):
    results, facts = measure.measure(
        [fake(tmp_path, name) for name in "ab"],
        comparison(small),
        repetitions=1,
        warmup=1,
        together=together,
        skipped={},
    )
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"{name} 8 4" for name in order]
    assert [len(runs) for runs in results.values()] == [1, 1]
    assert facts["b"]["name"] == "b"


def test_a_peer_that_cannot_be_loaded_is_left_out(tmp_path: Path, small: str):
    skipped: dict[str, str] = {}
    results, facts = measure.measure(
        [fake(tmp_path, "jmoe"), fake(tmp_path, "other", fails="load")],
        comparison(small),
        repetitions=1,
        warmup=0,
        together=True,
        skipped=skipped,
    )
    assert results.keys() == facts.keys() == {"jmoe"}
    assert skipped == {"other": "other failed: ValueError: no such weights"}


def test_rows_hold_speeds_and_the_ratio_to_ours(small: str):
    facts = {"weights": "int4", "bytes_per_token": 5e9}
    ours = [{"prefill_s": 2.0, "decode_s": 1.0, "read_bytes_per_s": 40e9}] * 3
    theirs = [{"prefill_s": 1.0, "decode_s": 4.0}] * 3
    rows = measure.rows(
        {"jmoe": ours, "llama.cpp": theirs},
        {"jmoe": facts, "llama.cpp": facts},
        comparison(small),
    )
    assert [row["prefill_tok_per_s"]["median"] for row in rows] == [4, 8]
    assert [row["decode_tok_per_s"]["median"] for row in rows] == [4, 1]
    assert [row["share_of_read"]["median"] for row in rows] == [0.5, 0.125]
    assert "jmoe_to_peer_decode" not in rows[0]
    assert rows[1]["jmoe_to_peer_prefill"]["pair_ratio"]["median"] == 0.5
    assert rows[1]["jmoe_to_peer_decode"]["pair_ratio"]["median"] == 4
    cells = [measure.cells(row | {"neighbours_cpu_share": 0.5}) for row in rows]
    assert cells[0].keys() == cells[1].keys()
    assert cells[1]["jmoe/it decode"] == "4.00"


def test_q4_0_holds_all_weights_of_the_model():
    raw = read_shape("mixtral-8x7b", 4)
    tensors = list(q4_0.tensors(raw))
    config = read_model_shape("mixtral-8x7b", num_layers=4).config
    num_weights = sizes.total(sizes.weight_sizes(config)).num_weights
    assert sum(tensor.num_weights for tensor in tensors) == num_weights
    # Two experts, attention and head: 4.5 bits of each weight; and routers and norms.
    used = 4 * (2 * 3 * 4096 * 14336 + 2 * 4096 * (4096 + 1024)) + 32000 * 4096
    plain = 4 * (8 * 4096 + 2 * 4096) + 4096
    assert q4_0.bytes_per_token(raw) == used * 18 / 32 + plain * 4
    assert q4_0.total_bytes(raw) > num_weights * 18 / 32


def test_jmoe_comes_first_and_what_is_not_there_is_left_out(small: str, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found, skipped = peers.find(comparison(small, peers=peers.OTHERS))
    assert [candidate.name for candidate in found] == ["jmoe"]
    assert skipped == {
        "llama.cpp": "not installed here; --llama_cpp_python names a Python that has it",
        "transformers": "torch and transformers not installed here",
    }


def test_what_does_not_fit_is_left_out(small: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 2**29)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20))
    chosen = comparison(small, peers=peers.OTHERS, cache_dir=str(tmp_path / "cache"))
    found, skipped = peers.find(chosen)
    assert [candidate.name for candidate in found] == ["jmoe"]
    assert "of which 0.5 are available" in skipped["transformers"]
    assert "no room" in skipped["llama.cpp"]
    assert not peers.fit_together(found)


def test_a_file_belongs_to_one_shape(small: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    files = set()
    for layers in (1, 2, 1):
        loading = comparison(small).loading | {"num_layers": layers}
        chosen = comparison(
            small, loading=loading, peers=("llama.cpp",), cache_dir=str(tmp_path / "cache")
        )
        candidate = peers.find(chosen)[0][1]
        assert candidate.settings["config"]["num_hidden_layers"] == layers
        files.add(candidate.settings["file"])
    assert len(files) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers=vllm"], "--peers names what is not known"),
        (["--norandom_weights"], "random weights"),
        (["--model=nowhere"], "no model of this name is known"),
        (["--quant=5g64"], "quantization"),
        (["--prompt_tokens=0"], "--prompt_tokens"),
        (["--prompt_tokens=40000"], "longer than the model's context"),
        (["--repetitions=0"], "--repetitions"),
        (["--llama_cpp_python=nowhere/python"], "--llama_cpp_python is no Python with"),
    ],
)
def test_bad_flags_are_one_error_and_no_measurement(flags: list[str], message: str):
    assert_one_error(run_script("compare_peers.py", *flags), message)


def test_output_is_one_json_object(small: str):
    result = run_script(
        "compare_peers.py",
        f"--model={small}",
        "--num_layers=1",
        "--peers=transformers",
        "--prompt_tokens=8",
        "--new_tokens=4",
        "--repetitions=2",
        "--output=json",
    )
    assert result.returncode == 0, result.stderr.decode()
    (line,) = result.stdout.decode().splitlines()
    value = json.loads(line)
    assert {"commit", "machine", "comparison", "in_turns", "skipped", "rows"} < value.keys()
    names = [row["peer"] for row in value["rows"]]
    assert names + list(value["skipped"]) == ["jmoe", "transformers"]
    for row in value["rows"]:
        assert len(row["decode_tok_per_s"]["samples"]) == 2
        assert row["facts"]["bytes_per_token"] > 0
    if "transformers" in names:
        assert value["rows"][1]["jmoe_to_peer_decode"]["pair_ratio"]["median"] > 0
