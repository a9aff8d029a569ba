"""Policy files: written and read back, and refused by the name of what is wrong in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from jmoe.errors import ConfigError, RequestError
from jmoe.planning.policy import MODES, Policy, read_request
from jmoe.residency.eviction import EVICTIONS
from tests.models.configs import small_config

POLICIES = [
    Policy(mode="resident"),
    Policy(mode="host"),
    Policy(mode="offload"),
    Policy(mode="offload", slots=7, eviction="lfu", lookahead=0),
    Policy(
        mode="offload",
        slots=(3, 0),
        num_staging=4,
        eviction="random",
        lookahead=2,
        fetch=3,
        prefill_chunk=64,
    ),
    Policy(mode="offload", slots=(3, 0), eviction="lfu", engine="compiled", tokens_per_call=8),
    Policy(mode="offload", engine="auto", fetch_ahead=2),
]


def policy_file(directory: Path, **changes: Any) -> Path:
    """A policy of offloading with some fields changed; None removes one."""
    value = {"version": 1, "mode": "offload"} | changes
    path = directory / "policy.json"
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
    return path


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_is_read_as_it_was_written(policy: Policy, tmp_path: Path):
    path = tmp_path / "policy.json"
    policy.write(path)
    assert Policy.read(path) == policy
    assert Policy.from_json(policy.to_json()) == policy
    assert list(tmp_path.iterdir()) == [path]
    policy.write(path)  # replaces


def test_what_a_file_leaves_out_is_open(tmp_path: Path):
    assert Policy.read(policy_file(tmp_path)) == Policy(mode="offload")
    assert Policy.read(policy_file(tmp_path, slots=[1, 2])).slots == (1, 2)


def test_a_file_has_a_line_for_each_field(tmp_path: Path):
    Policy(mode="offload", slots=(2,) * 32).write(tmp_path / "policy.json")
    lines = (tmp_path / "policy.json").read_text().splitlines()
    assert len(lines) == 14
    assert lines[3] == f' "slots": {[2] * 32},'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, ["another version", "got: 2", '"version": 1']),
        ({"version": True}, ["another version"]),
        ({"version": None}, ["another version", "got: none"]),
        ({"mode": None}, ["no mode", "resident, offload, host"]),
        ({"mode": "auto"}, ["mode", "resident, offload, host"]),
        ({"mode": ["offload"]}, ["mode"]),
        ({"slot": 3}, ["no such field", "'slot'", "num_staging"]),
        ({"slots": []}, ["slots"]),
        ({"slots": [2, -1]}, ["slots", "[2, -1]"]),
        ({"slots": [2, 1.5]}, ["slots"]),
        ({"slots": True}, ["slots"]),
        ({"slots": "all"}, ["slots", '"all"']),
        ({"num_staging": -1}, ["num_staging", "whole number"]),
        ({"num_staging": "4"}, ["num_staging"]),
        ({"eviction": "fifo"}, ["eviction", ", ".join(EVICTIONS)]),
        ({"eviction": 3}, ["eviction"]),
        ({"lookahead": 1.0}, ["lookahead"]),
        ({"fetch": False}, ["fetch"]),
        ({"prefill_chunk": 100}, ["prefill_chunk", "power of two from 16 to 512"]),
        ({"prefill_chunk": 1024}, ["prefill_chunk"]),
        ({"engine": "fast"}, ["engine", "auto, thread, compiled"]),
        ({"engine": "compiled", "tokens_per_call": 0}, ["tokens_per_call", "from 1 to 256"]),
        ({"engine": "compiled", "tokens_per_call": 2.0}, ["tokens_per_call"]),
        ({"tokens_per_call": 2}, ["tokens_per_call is for", "the engine thread"]),
        ({"fetch_ahead": 1}, ["fetch_ahead is for", "the engine thread"]),
        ({"engine": "compiled", "eviction": "likely"}, ["eviction", "lru or lfu"]),
        ({"engine": "auto", "eviction": "random"}, ["eviction", "the engine auto"]),
        ({"engine": "compiled", "slots": 8}, ["slots", "by layer, not one pool"]),
        ({"mode": "resident", "engine": "compiled"}, ["engine is for the mode offload"]),
        ({"mode": "resident", "slots": [1, 1]}, ["slots is for the mode offload"]),
        ({"mode": "host", "lookahead": 0}, ["lookahead is for the mode offload"]),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(changes: dict[str, Any], words: list[str], tmp_path: Path):
    path = policy_file(tmp_path, **changes)
    with pytest.raises(ConfigError) as raised:
        Policy.read(path)
    for word in (*words, str(path), "--save_policy"):
        assert word in str(raised.value)


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_what_is_no_json_object_is_refused(contents: bytes, tmp_path: Path):
    path = tmp_path / "policy.json"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=r"policy\.json"):
        Policy.read(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="missing"):
        Policy.read(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.read(tmp_path)


def test_a_file_that_cannot_be_written_is_refused_and_nothing_stays(tmp_path: Path):
    with pytest.raises(RequestError, match="cannot be written"):
        POLICIES[0].write(tmp_path / "absent" / "policy.json")
    with pytest.raises(RequestError, match="cannot be written"):
        POLICIES[0].write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not tmp_path.with_name(f"{tmp_path.name}.tmp").exists()


def test_a_request_is_a_mode_or_a_file(tmp_path: Path):
    for mode in ("auto", *MODES):
        assert read_request(mode) == mode
    assert read_request(str(policy_file(tmp_path))) == Policy(mode="offload")
    with pytest.raises(RequestError, match="auto, resident, offload, host, or a file"):
        read_request("ofload")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": (1, 1, 1)}, ["another shape", "3 layers", "for 2"]),
        ({"slots": (5, 1)}, ["another shape", "5 slots", "at most 4"]),
        ({"slots": 9}, ["another shape", "9 slots", "at most 8"]),
        ({"fetch": 5}, ["another shape", "fetch 5", "at most 4"]),
        ({"num_staging": 3}, ["too few places", "3 for staging, 0 slots", "4 together"]),
        ({"num_staging": 3, "slots": (4, 0)}, ["too few places"]),
        ({"num_staging": 1, "slots": (4, 4)}, ["too few places", "at least 2 for staging"]),
        (
            {"num_staging": 4, "engine": "compiled"},
            [
                "the experts of a token",
                "0 slots + 4 for staging = 4",
                "2 experts + 3 for prompts = 5",
            ],
        ),
        (
            {"num_staging": 2, "slots": (4, 4), "engine": "compiled"},
            ["8 slots + 2", "at least 3 for staging"],
        ),
        ({"fetch_ahead": 5, "engine": "compiled"}, ["another shape", "fetch_ahead 5"]),
    ],
    ids=str,
)
def test_a_policy_for_another_model_is_refused(fields: dict[str, Any], words: list[str]):
    with pytest.raises(RequestError) as raised:
        Policy(mode="offload", **fields).check_model(small_config())
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"slots": (4, 0)},
        {"slots": 8},
        {"num_staging": 4},
        {"num_staging": 2, "slots": (2, 3)},
        {"num_staging": 3, "slots": 1},
        {"lookahead": 5, "fetch": 4},
        {"num_staging": 3, "slots": (1, 1), "engine": "compiled"},
        {"num_staging": 5, "slots": (0, 0), "engine": "compiled"},
        {"num_staging": 2, "slots": (4, 4), "engine": "auto"},
    ],
    ids=str,
)
def test_a_policy_for_this_model_passes(fields: dict[str, Any]):
    Policy(mode="offload", **fields).check_model(small_config())
