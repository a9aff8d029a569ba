"""Orbax checkpoints: the same bits back, whole or not at all, and damage is noticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.errors import CapacityError, CheckpointError, ConfigError, RequestError
from jmoe.loading import EMBEDDED_MODEL
from jmoe.models.decoder import abstract_parameters
from jmoe.models.families import config_from_json
from jmoe.models.random_weights import random_parameters
from jmoe.quant.spec import parse_spec
from jmoe.store import orbax
from jmoe.store.open_source import open_source
from jmoe.store.orbax import OrbaxSource, is_checkpoint, restore_parameters, save_checkpoint
from jmoe.store.quantize import quantized_parameters
from jmoe.store.source import CheckpointSource
from tests.models.configs import mixtral_json
from tests.resident_engine import resident_engine


def make(dtype="bfloat16", **changes):
    config = config_from_json(mixtral_json(**changes), "a test")
    paths = abstract_parameters(config, dtype)
    return dict(zip(paths, random_parameters(config, dtype), strict=True))


@pytest.fixture(scope="module")
def parameters():
    return make()


@pytest.fixture(scope="module")
def saved(parameters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    (folder / "tokenizer.json").write_text("{}")
    side_files = {"tokenizer.json": folder / "tokenizer.json"}
    save_checkpoint(folder / "model", mixtral_json(), parameters, side_files)
    return folder / "model"


def assert_same_bits(got, expected):
    assert list(got) == list(expected)
    for path, array in expected.items():
        assert got[path].dtype == array.dtype, path
        assert np.asarray(got[path]).tobytes() == np.asarray(array).tobytes(), path


def test_parameters_come_back_with_the_same_bits(saved, parameters):
    restored = restore_parameters(saved)
    assert_same_bits(restored, parameters)
    assert all(isinstance(array, jax.Array) for array in restored.values())
    assert {array.sharding for array in restored.values()} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }


def test_the_directory_is_that_of_a_model(saved):
    assert is_checkpoint(saved)
    assert sorted(os.listdir(saved)) == ["config.json", "parameters", "tokenizer.json"]
    assert json.loads((saved / "config.json").read_text()) == mixtral_json()
    assert os.listdir(saved.parent).count("model.partial") == 0


def test_numpy_arrays_of_other_types_are_saved_as_they_are(tmp_path):
    parameters = {path: np.asarray(array) for path, array in make("float32").items()}
    parameters["embed_tokens"] = parameters["embed_tokens"].astype(np.float16)
    parameters["lm_head"] = parameters["lm_head"].astype(jnp.bfloat16)
    save_checkpoint(tmp_path / "model", mixtral_json(), parameters)
    assert_same_bits(restore_parameters(tmp_path / "model"), parameters)


def test_parameters_are_converted_on_request(saved, parameters):
    restored = restore_parameters(str(saved), "float32")
    for path, array in parameters.items():
        assert restored[path].dtype == jnp.float32
        np.testing.assert_array_equal(restored[path], np.asarray(array, np.float32))


def test_shardings_may_differ_between_saving_and_restoring(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.store.orbax_shardings", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # nothing that Orbax has to say


def test_a_source_reads_one_matrix_at_a_time(saved, parameters):
    source = OrbaxSource(saved)
    assert source.name == "model" and source.directory == saved
    assert source.config_json == mixtral_json()
    assert source.config == config_from_json(mixtral_json(), "a test")
    assert source.total_bytes == sum(array.nbytes for array in parameters.values())
    assert source.side_files() == {"tokenizer.json": saved / "tokenizer.json"}
    for path, array in parameters.items():
        if array.ndim < 3:
            pieces = [(source.read(path), array)]
        else:
            pieces = [(source.read(path, e), array[e]) for e in range(len(array))]
        for got, expected in pieces:
            assert got.flags.c_contiguous and got.dtype == expected.dtype
            assert got.tobytes() == np.asarray(expected).tobytes()


def test_an_expert_is_stored_apart_from_its_neighbours(saved):
    store = OrbaxSource(saved)._open("layers.0.experts.w1")
    assert store.chunk_layout.read_chunk.shape == (1, 48, 32)


def test_fingerprints_tell_saves_apart(saved, parameters, tmp_path):
    fingerprint = OrbaxSource(saved).fingerprint()
    copied = shutil.copytree(saved, tmp_path / "copy")
    assert OrbaxSource(copied).fingerprint() == fingerprint
    save_checkpoint(tmp_path / "again", mixtral_json(), parameters)
    assert OrbaxSource(tmp_path / "again").fingerprint() != fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert str(saved) not in json.dumps(fingerprint)


def test_nothing_is_overwritten(saved, parameters):
    before = sorted(saved.rglob("*"))
    with pytest.raises(RequestError, match="exists already"):
        save_checkpoint(saved, mixtral_json(), parameters)
    assert sorted(saved.rglob("*")) == before


def test_what_an_interrupted_save_left_is_not_touched(tmp_path, parameters):
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "something").write_text("")
    with pytest.raises(RequestError, match="interrupted save is in the way"):
        save_checkpoint(tmp_path / "model", mixtral_json(), parameters)
    assert os.listdir(tmp_path) == ["model.partial"] and os.listdir(left) == ["something"]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), MemoryError()])
def test_a_save_that_fails_leaves_nothing(tmp_path, parameters, monkeypatch, error):
    write = orbax._write

    def fail(directory, arrays):
        write(directory, arrays)
        raise error

    monkeypatch.setattr(orbax, "_write", fail)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save_checkpoint(tmp_path / "model", mixtral_json(), parameters)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_comes_into_being_meanwhile_is_kept(tmp_path, parameters, monkeypatch):
    write = orbax._write

    def meanwhile(directory, arrays):
        write(directory, arrays)
        (tmp_path / "model").mkdir()

    monkeypatch.setattr(orbax, "_write", meanwhile)
    with pytest.raises(RequestError, match="exists already"):
        save_checkpoint(tmp_path / "model", mixtral_json(), parameters)
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == []


def test_too_little_space_is_noticed_before(tmp_path, parameters, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CapacityError, match="do not fit on the disk"):
        save_checkpoint(tmp_path / "model", mixtral_json(), parameters)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist_is_refused(tmp_path, parameters):
    with pytest.raises(CheckpointError, match="cannot be made"):
        save_checkpoint(tmp_path / "no" / "model", mixtral_json(), parameters)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lm_head": None}, "no lm_head"),
        ({"layers.0.experts.blobs": jnp.zeros(3)}, "layers.0.experts.blobs, which the model does"),
        ({"lm_head": jnp.zeros((64, 31))}, r"lm_head: \[64, 31\] instead of \[64, 32\]"),
        ({"lm_head": jnp.zeros((64, 32), jnp.int8)}, "lm_head: int8"),
    ],
)
def test_parameters_of_another_model_are_refused(tmp_path, parameters, change, expected):
    changed = {k: v for k, v in (parameters | change).items() if v is not None}
    with pytest.raises(RequestError, match=expected):
        save_checkpoint(tmp_path / "model", mixtral_json(), changed)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def largest_file(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_truncated_and_missing_files_are_noticed(saved, tmp_path):
    truncated, lacking = (Path(shutil.copytree(saved, tmp_path / name)) for name in "ab")
    file = largest_file(truncated)
    os.truncate(file, file.stat().st_size // 2)
    largest_file(lacking).unlink()
    for directory in (truncated, lacking):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_everything(OrbaxSource(directory))

    # In a process of its own: Orbax drops unfinished coroutines, of which pytest complains.
    program = """if True:
        import sys
        from jmoe.errors import CheckpointError
        from jmoe.store.orbax import restore_parameters
        for directory in sys.argv[1:]:
            try:
                restore_parameters(directory)
            except CheckpointError as error:
                assert "cannot be read" in error.what and "save" in error.do, error
                print("noticed")
    """
    result = subprocess.run(
        [sys.executable, "-c", program, str(truncated), str(lacking)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # What Orbax says on stderr of coroutines that it drops depends on the moment.
    assert (result.returncode, result.stdout) == (0, "noticed\nnoticed\n"), result.stderr


def read_everything(source):
    for path, shape in abstract_parameters(source.config).items():
        experts = range(shape.shape[0]) if len(shape.shape) == 3 else [None]
        for expert in experts:
            source.read(path, expert)


def test_a_damaged_list_of_parameters_is_noticed(copy):
    (copy / "parameters" / "_METADATA").write_text("{")
    for read in (restore_parameters, OrbaxSource):
        with pytest.raises(CheckpointError, match="list of parameters cannot be read"):
            read(copy)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "no layers.2"),
        ({"num_hidden_layers": 1}, "which the model does not have"),
        ({"vocab_size": 65}, r"\[64, 32\] instead of \[65, 32\]"),
    ],
)
def test_another_configuration_is_noticed(copy, changes, expected):
    (copy / "config.json").write_text(json.dumps(mixtral_json(**changes)))
    for read in (restore_parameters, OrbaxSource):
        with pytest.raises(CheckpointError, match=expected):
            read(copy)


def test_a_missing_configuration_is_noticed(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        restore_parameters(copy)


def test_other_directories_are_no_checkpoints(tmp_path):
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no Orbax checkpoint"):
        restore_parameters(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory"):
        OrbaxSource(tmp_path / "absent")


def test_a_sharding_that_does_not_divide_is_the_callers_mistake(saved):
    three = jax.sharding.AbstractMesh((3,), ("x",))
    thirds = jax.sharding.NamedSharding(three, jax.sharding.PartitionSpec("x"))
    with pytest.raises(ValueError, match="divi"):
        restore_parameters(saved, sharding=lambda path, shape: thirds)


def test_a_model_loads_and_converts_from_such_a_checkpoint(tmp_path):
    original = CheckpointSource(EMBEDDED_MODEL)
    shapes = abstract_parameters(original.config)
    parameters = {
        path: original.read(path)
        if len(shape.shape) < 3
        else np.stack([original.read(path, e) for e in range(shape.shape[0])])
        for path, shape in shapes.items()
    }
    directory = tmp_path / "model"
    save_checkpoint(directory, original.config_json, parameters, original.side_files())

    assert_same_bits(restore_parameters(directory), parameters)
    plain, embedded = (jmoe.load(model, dtype="bfloat16") for model in (directory, None))
    for ours, theirs in zip(
        resident_engine(plain).parameters, resident_engine(embedded).parameters, strict=True
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert plain.tokenizer.encode("def main(") == embedded.tokenizer.encode("def main(")

    source = open_source(directory)
    assert isinstance(source, OrbaxSource)
    quant = parse_spec("attention=8g64sf,experts=4g64")
    ours, theirs = (
        list(quantized_parameters(either, "bfloat16", quant, "rtn"))
        for either in (source, original)
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
