"""Headers: sound files of the safetensors library are read, every damage is one typed error."""

import contextlib
import os
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jmoe.errors import CheckpointError
from jmoe.store.safetensors_file import DTYPE_BITS, TensorInfo, printable, read_header
from tests.faults.checkpoints import FILE_FAULTS, entry, safetensors_bytes

_SAVED_DTYPES = {
    "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def _read(directory: Path, contents: bytes) -> dict[str, TensorInfo]:
    path = directory / "model.safetensors"
    path.write_bytes(contents)
    return read_header(path)


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damage_is_one_error_that_says_what_is_wrong(fault: str, tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        _read(tmp_path, FILE_FAULTS[fault].contents)
    assert caught.value.what.startswith("model.safetensors ")
    assert caught.value.where == tmp_path
    for words in FILE_FAULTS[fault].words:
        assert words in str(caught.value)
    assert caught.value.do
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 1000


def test_missing_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        read_header(tmp_path / "absent.safetensors")


def test_link_to_nowhere_is_a_missing_file(tmp_path: Path):
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is missing"):
        read_header(tmp_path / "x.safetensors")


def test_directory_instead_of_a_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path)


def test_pipe_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.touch(mode=stat.S_IWUSR)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_name_too_long_for_the_file_system(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / ("x" * 300))


def test_offsets_are_absolute_in_the_file(tmp_path: Path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(begin=8, end=16), "a": entry()}
    contents = safetensors_bytes(header, bytes(range(16)))
    infos = _read(tmp_path, contents)
    assert set(infos) == {"a", "b"}
    start = len(contents) - 16
    assert (infos["a"].offset, infos["b"].offset) == (start, start + 8)
    assert infos["b"].file == tmp_path / "model.safetensors"
    assert infos["b"].num_bytes == 8


def test_no_tensors_at_all(tmp_path: Path):
    assert _read(tmp_path, safetensors_bytes({})) == {}


def test_empty_tensors_own_no_bytes(tmp_path: Path):
    header = {
        "x": entry(shape=[0, 3], end=0),
        "y": entry(),
        "z": entry(shape=[0], begin=8, end=8),
        "scalar": entry(shape=[], begin=8, end=12),
    }
    infos = _read(tmp_path, safetensors_bytes(header, bytes(12)))
    assert infos["x"].shape == (0, 3)
    assert infos["scalar"].shape == ()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_type_of_the_format_is_known(dtype: str, tmp_path: Path):
    num_bytes = DTYPE_BITS[dtype]
    header = {"w": entry(dtype=dtype, shape=[8], end=num_bytes)}
    infos = _read(tmp_path, safetensors_bytes(header, bytes(num_bytes)))
    assert infos["w"].dtype == dtype


@given(data=st.data())
def test_files_of_the_safetensors_library(data: st.DataObject, tmp_path_factory):
    names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    specs = data.draw(
        st.dictionaries(
            names, st.tuples(st.sampled_from(sorted(_SAVED_DTYPES)), shapes), min_size=1
        )
    )
    metadata = data.draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    arrays = {name: np.ones(shape, _SAVED_DTYPES[dtype]) for name, (dtype, shape) in specs.items()}
    save_file(arrays, path, metadata)
    infos = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == specs
    contents = path.read_bytes()
    for name, info in infos.items():
        stored = contents[info.offset : info.offset + info.num_bytes]
        assert stored == arrays[name].tobytes()


_SOUND = safetensors_bytes(
    {"a": entry(), "b": entry(dtype="BF16", shape=[2, 3], begin=8, end=20)}, bytes(20)
)


@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(_SOUND) - 1), st.integers(1, 255)), min_size=1, max_size=6
    ),
    length=st.integers(0, len(_SOUND)),
)
def test_random_damage_is_harmless_or_a_checkpoint_error(flips, length, tmp_path_factory):
    contents = bytearray(_SOUND)
    for position, mask in flips:
        contents[position] ^= mask
    for damaged in (bytes(contents), bytes(contents[:length]), _SOUND[:length]):
        try:
            infos = _read(tmp_path_factory.getbasetemp(), damaged)
        except CheckpointError as error:
            assert str(error).isprintable() or "\n" in str(error)
        else:
            assert all(info.offset + info.num_bytes <= len(damaged) for info in infos.values())


_KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"])


@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner),
    )
)
def test_any_json_as_header_is_harmless_or_a_checkpoint_error(header, tmp_path_factory):
    with contextlib.suppress(CheckpointError):
        _read(tmp_path_factory.getbasetemp(), safetensors_bytes(header))


def test_names_are_shown_without_control_characters():
    assert printable("model.layers.0") == "model.layers.0"
    assert "\x1b" not in printable("\x1b[2J")
    assert len(printable("x" * 10_000)) < 300
