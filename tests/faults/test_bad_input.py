"""Bad input to generate.py: one typed error each, exit 2, no traceback, nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jmoe
from tests.faults.checkpoints import (
    FIRST_SHARD,
    INDEX_NAME,
    LFS_POINTER,
    TINY_MIXTRAL,
    WEB_PAGE,
    entry,
    link_model,
    replace,
    safetensors_bytes,
)
from tests.scripts.processes import assert_one_error, run_script

Damage = Callable[[Path], object]


def edit_config(**changes: Any) -> Damage:
    def apply(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        replace(directory / "config.json", json.dumps(config).encode())

    return apply


def write(name: str, contents: bytes) -> Damage:
    return lambda directory: replace(directory / name, contents)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def cut_header(directory: Path) -> None:
    replace(directory / FIRST_SHARD, (directory / FIRST_SHARD).read_bytes()[:300])


def cut_data(directory: Path) -> None:
    replace(directory / FIRST_SHARD, (directory / FIRST_SHARD).read_bytes()[:-1])


def edit_first_shard(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Rewrites the first shard with other tensors, and the index to match it."""

    def apply(directory: Path) -> None:
        import ml_dtypes  # noqa: F401  (numpy learns bfloat16)

        with safe_open(directory / FIRST_SHARD, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors)
        (directory / FIRST_SHARD).unlink()
        save_file(tensors, directory / FIRST_SHARD)
        index = json.loads((directory / INDEX_NAME).read_text())
        others = {k: v for k, v in index["weight_map"].items() if v != FIRST_SHARD}
        index["weight_map"] = others | dict.fromkeys(tensors, FIRST_SHARD)
        replace(directory / INDEX_NAME, json.dumps(index).encode())

    return apply


W1 = "model.layers.0.block_sparse_moe.experts.3.w1.weight"

FAULTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "config_missing": (remove("config.json"), ("config.json is missing",)),
    "config_not_json": (write("config.json", b"{"), ("config.json is not JSON",)),
    "config_a_list": (write("config.json", b"[]"), ("must hold a JSON object", "list")),
    "config_wrong_type": (edit_config(hidden_size="192"), ("hidden_size", "'192'")),
    "model_type_unknown": (edit_config(model_type="gpt2"), ("model_type='gpt2'", "mixtral")),
    "too_many_experts_per_token": (edit_config(num_experts_per_tok=9), ("9 of 8 experts",)),
    "setting_unknown": (edit_config(logit_scale=2.0), ("logit_scale=2.0",)),
    "shard_absent": (remove(FIRST_SHARD), (FIRST_SHARD, "missing")),
    "shard_lfs_pointer": (write(FIRST_SHARD, LFS_POINTER), ("Git LFS pointer", "git lfs pull")),
    "shard_web_page": (write(FIRST_SHARD, WEB_PAGE), ("web page",)),
    "shard_of_0_bytes": (write(FIRST_SHARD, b""), ("is empty",)),
    "shard_of_7_bytes": (write(FIRST_SHARD, b"1234567"), ("7 bytes",)),
    "shard_header_cut": (cut_header, ("truncated within its header",)),
    "shard_data_cut": (cut_data, ("is truncated",)),
    "shard_header_longer_than_file": (
        write(FIRST_SHARD, (10**6).to_bytes(8, "little") + b"{}"),
        ("truncated within its header",),
    ),
    "shard_offsets_overlap": (
        write(FIRST_SHARD, safetensors_bytes({"v": entry(), "w": entry()}, bytes(8))),
        ("bytes that two tensors own",),
    ),
    "tensor_missing": (edit_first_shard(lambda t: t.pop(W1)), ("missing", W1)),
    "tensor_extra": (edit_first_shard(lambda t: t.update(more=t[W1])), ("more",)),
    "tensor_misshaped": (
        edit_first_shard(lambda t: t.update({W1: t[W1][:-1].copy()})),
        (W1, "[255, 192]", "[256, 192]"),
    ),
    "tensor_of_integers": (
        edit_first_shard(lambda t: t.update({W1: np.zeros((256, 192), np.int8)})),
        (W1, "I8"),
    ),
    "tokenizer_missing": (remove("tokenizer.json"), ("tokenizer.json",)),
    "tokenizer_damaged": (write("tokenizer.json", b'{"version": "1.0"}'), ("tokenizer.json",)),
    "chat_template_malformed": (
        write("chat_template.jinja", b"{% for m in messages %}{{ m.content }}"),
        ("chat template",),
    ),
    "generation_config_wrong": (
        write("generation_config.json", b'{"eos_token_id": "two"}'),
        ("eos_token_id",),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_model_is_one_error(name, tmp_path):
    damage, words = FAULTS[name]
    directory = link_model(tmp_path / "model")
    damage(directory)
    with pytest.raises(jmoe.JmoeError) as caught:
        jmoe.load(directory)
    for word in words:
        assert word in str(caught.value)
    assert str(directory) in str(caught.value), "the error does not say where"


# The rest of the way, from the exception to the exit status, is the same for all.
@pytest.mark.parametrize("name", ["config_wrong_type", "shard_data_cut", "tensor_missing"])
def test_a_damaged_model_ends_the_script_with_2(name, tmp_path):
    damage, words = FAULTS[name]
    damage(link_model(tmp_path / "model"))
    before = sorted(tmp_path.rglob("*"))
    result = run_script("generate.py", f"--model={tmp_path}/model", cwd=tmp_path)
    assert_one_error(result, *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_wrong_tensor_is_reported_at_once(tmp_path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        for expert in range(7):
            del tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
        tensors["more"] = tensors[W1]
        tensors[W1] = tensors[W1].T.copy()

    directory = link_model(tmp_path / "model")
    edit_first_shard(change)(directory)
    with pytest.raises(jmoe.CheckpointError) as caught:
        jmoe.load(directory)
    message = str(caught.value)
    assert "7" in message and "more" in message and W1 in message
    listed = [e for e in range(7) if f"experts.{e}.w2.weight" in message]
    assert len(listed) == 5, "the first five, and the count"


@pytest.mark.parametrize(
    ("flags", "stdin", "words"),
    [
        (["--model=absent/directory/"], b"", ["absent/directory"]),
        (["--prompt="], b"", ["the prompt is empty"]),
        (["--prompt=-"], b"", ["the prompt is empty"]),
        (["--prompt=" + "x = 1\n" * 600], b"", ["longer than the model's context", "1023"]),
        (["--prompt=-"], b"caf\xe9", ["not UTF-8", "0xe9 at offset 3"]),
        (["--prompt_file=absent.txt"], b"", ["absent.txt", "cannot be read"]),
        (["--temperature=-1"], b"", ["temperature"]),
        (["--temperature=nan"], b"", ["temperature"]),
        (["--top_p=0"], b"", ["top_p"]),
        (["--top_p=1.5"], b"", ["top_p"]),
        (["--max_new_tokens=0"], b"", ["max_new_tokens"]),
        (["--max_new_tokens=many"], b"", ["max_new_tokens", "many"]),
        (["--stop="], b"", ["stop string"]),
        (["--dtype=int3"], b"", ["dtype"]),
        (["--no_such_flag"], b"", ["no_such_flag"]),
        (["prompt without a flag"], b"", ["unexpected argument"]),
        (["--raw", "--chat"], b"", ["--raw"]),
        (["--chat", "--prompt=x"], b"", ["--chat"]),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else "",
)
def test_a_bad_request_is_one_error(flags, stdin, words):
    assert_one_error(run_script("generate.py", *flags, stdin=stdin), *words)


def test_an_empty_directory_is_one_error(tmp_path):
    result = run_script("generate.py", f"--model={tmp_path}", cwd=tmp_path)
    assert_one_error(result, "config.json is missing", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_chat_template_cannot_chat(tmp_path):
    directory = link_model(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    assert_one_error(
        run_script("generate.py", f"--model={directory}", "--chat"), "no chat template"
    )
    assert_one_error(
        run_script("generate.py", f"--model={directory}", "--system=x"), "chat template"
    )


def test_jsonl_lines_that_are_no_prompts_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"fine"\n\n{"question": "?"}\n')
    result = run_script("generate.py", f"--prompt_file={path}")
    assert_one_error(result, "prompts.jsonl, line 3")


def test_the_embedded_model_is_sound():
    assert (TINY_MIXTRAL / "LICENSE-PYTHON.txt").exists()
    assert jmoe.load().num_parameters == 16_931_520
