"""Checkpoints: found through the index, compared both ways, read into place and converted."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jmoe.errors import CheckpointError
from jmoe.store.checkpoint import Checkpoint
from tests.faults.checkpoints import (
    DIRECTORY_FAULTS,
    FIRST_SHARD,
    INDEX_NAME,
    TINY_MIXTRAL,
    entry,
    link_model,
    replace,
    safetensors_bytes,
    write_index,
    write_sharded,
)

_BF16 = np.dtype(ml_dtypes.bfloat16)
_ONES = np.ones((2, 3), np.float32)


def _save_one(directory: Path, array: np.ndarray) -> Checkpoint:
    save_file({"w": array}, directory / "model.safetensors")
    return Checkpoint.open(directory)


# Opening.


@pytest.mark.parametrize("fault", DIRECTORY_FAULTS)
def test_damaged_directory(fault: str, tmp_path: Path):
    link_model(tmp_path)
    DIRECTORY_FAULTS[fault].damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.where == tmp_path
    for words in DIRECTORY_FAULTS[fault].words:
        assert words in str(caught.value)


def test_all_missing_shards_are_counted_and_five_are_named(tmp_path: Path):
    write_index(tmp_path, {f"w{n}": f"model-{n:05}-of-00019.safetensors" for n in range(1, 20)})
    with pytest.raises(CheckpointError, match="19 shards of 19 missing") as caught:
        Checkpoint.open(tmp_path)
    text = str(caught.value)
    assert "model-00005-of-00019" in text
    assert "model-00006-of-00019" not in text


def test_link_to_nowhere_is_a_missing_shard(tmp_path: Path):
    link_model(tmp_path)
    (tmp_path / FIRST_SHARD).unlink()
    (tmp_path / FIRST_SHARD).symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="1 shard of 5 missing"):
        Checkpoint.open(tmp_path)


def test_no_such_directory(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"there is no directory .*absent"):
        Checkpoint.open(tmp_path / "absent")


def test_file_instead_of_a_directory(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file, not a model directory"):
        Checkpoint.open(tmp_path / "model.safetensors")


def test_empty_directory(tmp_path: Path):
    with pytest.raises(CheckpointError, match="an empty directory"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats_are_named_with_a_remedy(name: str, tmp_path: Path):
    (tmp_path / "config.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="convert them to safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.got == name


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "x", {"w": 7}, {"w": None}, {"w": ["a.safetensors"]}]
)
def test_index_without_a_usable_map(weight_map: object, tmp_path: Path):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map") as caught:
        Checkpoint.open(tmp_path)
    assert INDEX_NAME in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "*.safetensors",
        "model-[0-9].safetensors",
        "model.safetensors\n",
        "model\x00.safetensors",
        "\x1b[2J.safetensors",
        "pytorch_model.bin",
    ],
)
def test_hostile_shard_names_are_refused(shard: str, tmp_path: Path):
    write_index(tmp_path, {"w": shard})
    with pytest.raises(CheckpointError, match="not a plain file name") as caught:
        Checkpoint.open(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_only_files_that_the_index_names_are_opened(tmp_path: Path):
    link_model(tmp_path)
    for extra in ("consolidated.safetensors", "model-00006-of-00005.safetensors"):
        (tmp_path / extra).write_bytes(b"not even safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.num_shards == 5
    assert len(checkpoint.tensors) == 375
    assert checkpoint.unindexed == ()


def test_index_goes_before_a_single_file(tmp_path: Path):
    write_sharded(tmp_path, {"model-1.safetensors": {"w": _ONES}})
    (tmp_path / "model.safetensors").write_bytes(b"another copy")
    assert Checkpoint.open(tmp_path).tensors["w"].file.name == "model-1.safetensors"


def test_total_bytes_are_those_of_the_index_of_the_embedded_model():
    index = json.loads((TINY_MIXTRAL / INDEX_NAME).read_bytes())
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    assert checkpoint.total_bytes == index["metadata"]["total_size"]
    assert set(checkpoint.tensors) == set(index["weight_map"])


# Comparing.


def test_a_fitting_checkpoint_passes(tmp_path: Path):
    tensors = {"w": _ONES, "head": _ONES, "rotary": np.ones(3, np.float64)}
    checkpoint = Checkpoint.open(write_sharded(tmp_path, {"model-1.safetensors": tensors}))
    checkpoint.check(
        {"w": (2, 3)},
        optional={"head": (2, 3), "absent": (1,)},
        ignored=lambda name: name == "rotary",
    )


def test_everything_wrong_is_reported_at_once(tmp_path: Path):
    tensors = {"w": _ONES, "head": _ONES.T.copy(), "more": _ONES, "codes": np.ones(3, np.int8)}
    checkpoint = Checkpoint.open(write_sharded(tmp_path, {"model-1.safetensors": tensors}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(
            {"w": (3, 2), "codes": (3,)} | {f"gone{n}": (1,) for n in range(7)},
            optional={"head": (2, 3)},
        )
    text = str(caught.value)
    assert caught.value.where == tmp_path
    for words in (
        "7 tensors missing", "gone0", "gone4", "...",
        "1 tensor that the model does not have", "more",
        "2 tensors of another shape", "w: [2, 3] instead of [3, 2]", "head: [3, 2] instead of",
        "1 tensor of a type other than BF16, F16, F32", "codes: I8",
    ):  # fmt: skip
        assert words in text
    assert "gone5" not in text


def test_tensors_that_the_index_does_not_name_are_extra(tmp_path: Path):
    write_sharded(tmp_path, {"a.safetensors": {"w": _ONES, "x": _ONES}})
    write_index(tmp_path, {"w": "a.safetensors"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"w"}
    with pytest.raises(CheckpointError, match=r"x in a\.safetensors, not in the index"):
        checkpoint.check({"w": (2, 3)})
    checkpoint.check({"w": (2, 3)}, ignored=lambda name: name == "x")


def test_a_second_copy_in_another_shard_is_extra(tmp_path: Path):
    write_sharded(tmp_path, {"a.safetensors": {"w": _ONES}, "b.safetensors": {"w": _ONES}})
    save_file({"w": _ONES, "x": _ONES}, tmp_path / "b.safetensors")
    write_index(tmp_path, {"w": "a.safetensors", "x": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"w in b\.safetensors, not in the index"):
        Checkpoint.open(tmp_path).check({"w": (2, 3), "x": (2, 3)})


# Reading.


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.5.block_sparse_moe.experts.7.w2.weight",
        "model.layers.11.self_attn.o_proj.weight",
    ],
)
def test_read_gives_what_the_safetensors_library_gives(name: str):
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    with safe_open(checkpoint.tensors[name].file, framework="numpy") as file:
        expected = file.get_tensor(name)
    tensor = checkpoint.read(name)
    assert tensor.dtype == expected.dtype == _BF16
    np.testing.assert_array_equal(tensor.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(_BF16, np.float32), (np.float16, np.float32), (np.float32, _BF16), (np.float16, _BF16)],
)
def test_conversion_rounds_like_numpy(stored, wanted, tmp_path: Path):
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(stored)
    checkpoint = _save_one(tmp_path, array)
    destination = np.full((5, 7), np.nan, wanted)
    checkpoint.read_into("w", destination)
    np.testing.assert_array_equal(destination, array.astype(wanted))


def test_destinations_that_are_not_contiguous(tmp_path: Path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    checkpoint = _save_one(tmp_path, array)
    whole = np.zeros((3, 8), np.float32)
    checkpoint.read_into("w", whole[:, ::2])
    np.testing.assert_array_equal(whole[:, ::2], array)
    assert not whole[:, 1::2].any()


def test_matching_destination_is_filled_in_place(tmp_path: Path, monkeypatch):
    checkpoint = _save_one(tmp_path, _ONES)
    stacked = np.zeros((4, 2, 3), np.float32)
    monkeypatch.setattr(Checkpoint, "read", None)  # the way through a second array
    checkpoint.read_into("w", stacked[1])
    assert stacked.sum() == stacked[1].sum() == 6


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...], tmp_path: Path):
    checkpoint = _save_one(tmp_path, np.full(shape, 2.5, np.float32))
    assert checkpoint.read("w").shape == shape
    assert (checkpoint.read("w") == 2.5).all()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch):
    array = np.arange(1000, dtype=np.float32)
    checkpoint = _save_one(tmp_path, array)
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:333]], offset)
    )
    np.testing.assert_array_equal(checkpoint.read("w"), array)


def test_tensor_behind_four_gibibytes(tmp_path: Path):
    gap = 2**32 + 8
    header = {"gap": entry("U8", [gap], 0, gap), "w": entry("F32", [2], gap, gap + 8)}
    path = tmp_path / "model.safetensors"
    head = safetensors_bytes(header)
    with path.open("wb") as file:  # sparse: takes no room on the disk
        file.write(head)
        file.seek(len(head) + gap)
        file.write(np.array([1.5, -2], np.float32).tobytes())
    np.testing.assert_array_equal(Checkpoint.open(tmp_path).read("w"), [1.5, -2])


def test_shape_of_the_destination_is_checked(tmp_path: Path):
    checkpoint = _save_one(tmp_path, _ONES)
    with pytest.raises(CheckpointError, match="w has another shape") as caught:
        checkpoint.read_into("w", np.zeros((3, 2), np.float32))
    assert (caught.value.got, caught.value.expected) == ([2, 3], [3, 2])


def test_types_that_cannot_be_loaded(tmp_path: Path):
    checkpoint = _save_one(tmp_path, np.ones(3, np.int32))
    with pytest.raises(CheckpointError, match="one of BF16, F16, F32"):
        checkpoint.read("w")
    with pytest.raises(CheckpointError, match="got: I32"):
        checkpoint.read_into("w", np.zeros(3, np.float32))


def test_file_that_becomes_shorter_after_opening(tmp_path: Path):
    checkpoint = _save_one(tmp_path, _ONES)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors became shorter"):
        checkpoint.read("w")


def test_file_that_disappears_after_opening(tmp_path: Path):
    checkpoint = _save_one(tmp_path, _ONES)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoint.read("w")


def test_no_file_stays_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(TINY_MIXTRAL)
    checkpoint.read("model.norm.weight")
    broken = link_model(tmp_path)
    replace(broken / FIRST_SHARD, b"")
    with pytest.raises(CheckpointError):
        Checkpoint.open(broken)
    assert len(os.listdir("/proc/self/fd")) == before
