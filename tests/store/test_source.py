"""Sources of weights: the same matrices as the decoder's parameters, by path and expert."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jmoe.errors import CheckpointError, ConfigError, RequestError
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.store import known_models
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.open_source import open_source
from jmoe.store.parameters import read_parameters
from jmoe.store.source import CheckpointSource, RandomSource, WeightSource
from tests.faults.checkpoints import FIRST_SHARD, TINY_MIXTRAL, link_model, replace
from tests.models.configs import mixtral_json


def _read_all(source: WeightSource) -> dict[str, np.ndarray]:
    arrays = {}
    for path, parameter in abstract_parameters(source.config).items():
        if ".experts." in path:
            experts = [source.read(path, expert) for expert in range(parameter.shape[0])]
            arrays[path] = np.stack(experts)
        else:
            arrays[path] = source.read(path)
    return arrays


def test_a_checkpoint_gives_the_parameters_that_loading_gives():
    source = CheckpointSource(TINY_MIXTRAL)
    arrays = _read_all(source)
    assert sum(array.nbytes for array in arrays.values()) == source.total_bytes
    loaded = read_parameters(Checkpoint.open(TINY_MIXTRAL), source.config, "bfloat16")
    for (path, array), expected in zip(arrays.items(), loaded, strict=True):
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.view(np.uint16), expected.view(np.uint16), path)


def test_arrays_are_aligned_so_that_xla_takes_them_without_a_copy():
    for source in (CheckpointSource(TINY_MIXTRAL), RandomSource(mixtral_json(), "small")):
        assert source.read("layers.1.experts.w2", 3).ctypes.data % 64 == 0


def test_a_fingerprint_says_nothing_of_the_place_and_tells_changed_weights(tmp_path: Path):
    fingerprint = CheckpointSource(TINY_MIXTRAL).fingerprint()
    assert str(TINY_MIXTRAL.parent) not in json.dumps(fingerprint)
    copy = link_model(tmp_path / "copy")
    assert CheckpointSource(copy).fingerprint() == fingerprint
    contents = bytearray((copy / FIRST_SHARD).read_bytes())
    contents[-1] ^= 1
    replace(copy / FIRST_SHARD, bytes(contents))
    assert CheckpointSource(copy).fingerprint() != fingerprint


def test_random_weights_depend_on_seed_path_and_expert_and_on_nothing_else():
    source = RandomSource(mixtral_json(), "small")
    again = _read_all(RandomSource(mixtral_json(num_hidden_layers=3), "other", seed=0))
    arrays = _read_all(source)
    for path, array in arrays.items():
        np.testing.assert_array_equal(array.view(np.uint16), again[path].view(np.uint16))
    w1 = arrays["layers.0.experts.w1"].view(np.uint16)
    others = [
        arrays["layers.1.experts.w1"],
        arrays["layers.0.experts.w3"],
        _read_all(RandomSource(mixtral_json(), "small", seed=1))["layers.0.experts.w1"],
    ]
    assert all((w1 != other.view(np.uint16)).any() for other in others)
    assert (w1[0] != w1[1]).any()
    assert sum(array.nbytes for array in arrays.values()) == source.total_bytes


def test_random_weights_are_normal_and_scaled_by_their_inputs():
    config_json = mixtral_json(hidden_size=256, intermediate_size=1024)
    w2 = RandomSource(config_json, "small").read("layers.0.experts.w2", 0).astype(np.float32)
    assert abs(w2.mean()) < 1e-3
    np.testing.assert_allclose(w2.std(), 1024**-0.5, rtol=0.02)
    kurtosis = np.mean(w2**4) / np.mean(w2**2) ** 2
    np.testing.assert_allclose(kurtosis, 3, rtol=0.05)
    assert (RandomSource(config_json, "small").read("final_norm.scale") == 1).all()


def test_known_models_are_those_in_configs():
    names = known_models.known_model_names()
    assert {"mixtral-8x7b", "mixtral-8x22b"} <= set(names)
    for name in names:
        families.config_from_json(known_models.read_known_model(name), name)
    assert known_models.read_known_model("mixtral-8x7b", 4)["num_hidden_layers"] == 4


@pytest.mark.parametrize("name", ["mixtral-9x9b", "../models/mixtral-8x7b", "", "\x1b[2J"])
def test_models_that_are_not_known_are_refused_with_those_that_are(name: str):
    with pytest.raises(ConfigError, match="mixtral-8x7b") as caught:
        known_models.read_known_model(name)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ConfigError, match="mixtral-8x7b"):
        open_source(name, random_weights=True)


def test_number_of_layers_is_at_least_one():
    with pytest.raises(ConfigError, match="at least one layer"):
        known_models.read_known_model("mixtral-8x7b", 0)


def test_opening_finds_out_what_the_user_means(tmp_path: Path, monkeypatch):
    assert open_source(TINY_MIXTRAL).name == "tiny-mixtral"
    source = open_source("mixtral-8x7b", random_weights=True, num_layers=2, seed=3)
    assert source.config.num_hidden_layers == 2
    assert source.fingerprint()["seed"] == 3
    shape = open_source(str(TINY_MIXTRAL), random_weights=True)
    assert shape.config == open_source(TINY_MIXTRAL).config
    # A directory goes before a known shape of the same name.
    monkeypatch.chdir(tmp_path)
    link_model(tmp_path / "mixtral-8x7b")
    assert open_source("mixtral-8x7b").config.hidden_size == 192


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("mixtral-8x7b", {}, "add --random_weights"),
        (TINY_MIXTRAL, {"num_layers": 2}, "add --random_weights"),
        ("mixtral-8x7b", {"random_weights": True, "revision": "main"}, "no revision"),
    ],
)
def test_options_that_contradict_each_other(model, options, words):
    with pytest.raises(RequestError, match=words):
        open_source(model, **options)


def test_a_converted_store_is_no_source(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RequestError, match="converted store already"):
        open_source(tmp_path)


def test_an_absent_directory_is_a_checkpoint_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no directory"):
        open_source(tmp_path / "absent")
