"""Stores that do not fit into memory: what is said of them, what is refused, and what it cost."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.errors import CheckpointError, RequestError
from jmoe.loading import EMBEDDED_MODEL
from jmoe.quant.spec import parse_spec
from jmoe.store import host_memory
from jmoe.store.convert import Conversion
from jmoe.store.source import CheckpointSource
from tests.planning.traces import random_trace
from tests.scripts.processes import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import _common

_OFFLOAD = {"policy": "offload", "device_memory_gib": 0.02}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "store"
    Conversion(CheckpointSource(EMBEDDED_MODEL), path, parse_spec("f32"), method="rtn").run()
    return path


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 54 MiB of experts do not fit, and a few of them can be locked."""
    for module in ("find", "disk"):  # which both ask
        monkeypatch.setattr(f"jmoe.loading.{module}.available_host_bytes", lambda: 32 << 20)


def test_a_store_that_does_not_fit_gives_the_same_text_and_says_what_it_costs(
    store: Path, little_memory: None
):
    with jmoe.load(store, **_OFFLOAD) as llm:
        assert "they stay in mapped files" in llm.plan.reasons[-1]
        notes = [note for note in llm.notes if note.startswith("disk: ")]
        result = llm.generate("def read(", max_new_tokens=12, temperature=0)
    expected = jmoe.load(None, **_OFFLOAD).generate("def read(", max_new_tokens=12, temperature=0)
    assert result.token_ids == expected.token_ids
    assert len(notes) == 3
    assert "54.0 MiB of experts are mapped, and 32.0 MiB of memory are free" in notes[0]
    assert "are read ahead" in notes[1]
    assert "locked in memory" in notes[2]
    assert expected.stats.disk is None
    disk = result.stats.disk
    assert disk is not None and disk.decode.needed > 0
    (line,) = (x for x in _common.describe_stats(result.stats) if x.startswith("disk: "))
    assert f"{disk.decode.waited_for} of {disk.decode.needed} experts waited for" in line
    assert f"{disk.locked_experts} locked" in line
    value = result.stats.to_json()
    assert value["disk"]["decode"] == dataclasses.asdict(disk.decode)
    if disk.decode.read_bytes is not None:
        assert value["disk_bytes_per_token"] == disk.decode.read_bytes / 11
        assert "MiB a token" in line


def test_a_program_that_computes_where_experts_lie_is_read_for_exactly(
    store: Path, little_memory: None
):
    with jmoe.load(store, policy="resident") as llm:
        result = llm.generate("def read(", max_new_tokens=3)
        assert any("does not say which it uses" in note for note in llm.notes)
        assert any("are read when they are touched" in note for note in llm.notes)
    disk = result.stats.disk
    assert disk is not None and (disk.decode.needed, disk.locked_experts) == (0, 0)
    assert "waited for" not in _common.describe_stats(result.stats)[1]


def test_a_record_of_routing_says_which_experts_to_lock(
    store: Path, little_memory: None, tmp_path: Path
):
    random_trace(60, 12, 8).save(tmp_path / "trace.npz")
    arguments = {"popularity": tmp_path / "trace.npz", "lock_memory_gib": 4 / 1024}
    with jmoe.load(store, policy="resident", **arguments) as llm:
        (note,) = (note for note in llm.notes if "locked in memory" in note)
        assert "nothing is" in note or (
            "the 7 of 96 most used experts are, first those of the recorded routing" in note
        )


def test_experts_in_memory_have_no_disk(store: Path):
    with jmoe.load(store, **_OFFLOAD, read_ahead=False) as llm:
        assert llm.notes[-1] == "read_ahead has no effect: no expert is mapped"
        assert llm.engine.disk is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"host_memory": "ram", "read_ahead": False}, ("read_ahead is for", "host_memory ram")),
        ({"host_memory": "ram", "lock_memory_gib": 1.0}, ("lock_memory_gib is for", "ram")),
        ({"lock_memory_gib": -1.0}, ("must be 0 or more", "-1.0")),
        ({"lock_memory_gib": float("nan")}, ("must be 0 or more",)),
        ({"lock_memory_gib": 1.0}, ("does not say which ones it uses most", "popularity")),
    ],
)
def test_what_contradicts_itself_is_refused(arguments: dict, words: tuple[str, ...], store: Path):
    with pytest.raises(RequestError) as caught:
        jmoe.load(store, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_popularity_without_memory_to_lock_or_slots_to_fill_is_refused(store: Path, tmp_path: Path):
    random_trace(20, 12, 8).save(tmp_path / "trace.npz")
    arguments = {"popularity": tmp_path / "trace.npz", "lock_memory_gib": 0.0}
    with pytest.raises(RequestError, match="nothing is to be locked"):
        jmoe.load(store, policy="resident", **arguments)
    with jmoe.load(store, **_OFFLOAD, **arguments) as llm:
        assert any("experts are on the device to begin with" in note for note in llm.notes)


@pytest.mark.parametrize("model", [None, "mixtral-8x7b"])
def test_only_a_store_can_be_mapped(model: str | None):
    with pytest.raises(RequestError, match="lock_memory_gib is for a converted store"):
        jmoe.load(
            model,
            random_weights=model is not None,
            num_layers=1 if model else None,
            lock_memory_gib=1,
        )


def test_records_of_other_models_are_refused(store: Path, tmp_path: Path):
    path = tmp_path / "trace.npz"
    with pytest.raises(CheckpointError):
        jmoe.load(store, popularity=path)
    random_trace(20, 11, 8).save(path)
    with pytest.raises(RequestError, match="of another model") as caught:
        jmoe.load(store, popularity=path)
    assert caught.value.got == "11 layers of 8 experts, top 2"
    empty = random_trace(2, 12, 8)
    empty = dataclasses.replace(
        empty, decode_expert_ids=empty.decode_expert_ids[:0], decode_offsets=np.zeros(3, np.int64)
    )
    empty.save(path)
    with pytest.raises(RequestError, match="has no tokens"):
        jmoe.load(store, popularity=path)


def test_a_file_system_that_cannot_map_is_said_to_be_one(store: Path, little_memory, monkeypatch):
    """A store larger than memory cannot be read into it either."""

    def refuse(*args, **more):
        raise OSError(19, "No such device")

    monkeypatch.setattr(host_memory.mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match="cannot be mapped into memory") as caught:
        jmoe.load(store)
    assert caught.value.got == "No such device"
    assert caught.value.do is not None and "another file system" in caught.value.do
