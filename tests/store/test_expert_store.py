"""A converted model: its parameters as they were stored, its experts in one host copy."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jmoe.engines.resident import ResidentEngine
from jmoe.errors import CapacityError, ConfigError
from jmoe.models.decoder import abstract_parameters
from jmoe.models.random_weights import random_blobs
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import parse_spec
from jmoe.store.convert import Conversion
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.expert_store import ExpertStore
from jmoe.store.quantize import quantized_parameters
from jmoe.store.source import RandomSource
from tests.models.configs import mixtral_json
from tests.store.small_stores import CONFIG_CHANGES, write_store

_QUANTS = [
    "attn4-experts4",
    "attn2-experts3",
    "int8",
    "bf16",
    "f32",
    "attention=3g16f,experts=2g16s,embeddings=4g32,head=8g64sf",
]
_KINDS = ["mmap", "ram"]


def _as_float32(array: object) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", _QUANTS)
def test_parameters_are_those_that_were_stored(quant: str, dtype: str, kind: str, tmp_path: Path):
    stored = write_store(tmp_path / "store", quant)
    model = ConvertedModel.open(tmp_path / "store", verify=True)
    assert model.quant == parse_spec(quant)
    assert model.method == "rtn"
    assert model.config_json["hidden_size"] == model.config.hidden_size == 64
    expected = abstract_parameters(model.config, dtype, model.quant)
    with model.open_experts(kind) as store:
        found = list(model.parameters(store, dtype))
        for (path, shape), array in zip(expected.items(), found, strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype), path
            np.testing.assert_array_equal(_as_float32(array), _as_float32(stored[path]), path)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("quant", ["attn4-experts4", "bf16", "f32"])
def test_the_engine_on_the_cpu_runs_in_the_stores_memory(quant: str, kind: str, tmp_path: Path):
    write_store(tmp_path / "store", quant)
    model = ConvertedModel.open(tmp_path / "store")
    device = jax.devices("cpu")[0]
    store = model.open_experts(kind)
    assert store.lock_pages(device).kind == "plain"
    host = list(model.parameters(store, "float32"))
    engine = ResidentEngine(model.config, host, "float32", device, model.quant)
    for array, parameter in zip(host, engine.parameters, strict=True):
        assert parameter.unsafe_buffer_pointer() == array.ctypes.data
    for layer in range(store.num_layers):
        path = f"layers.{layer}.experts.blobs"
        i = list(abstract_parameters(model.config, "float32", model.quant)).index(path)
        assert engine.parameters[i].unsafe_buffer_pointer() == store.layer(layer).ctypes.data

    before = engine.logits([1, 2, 3])
    del host
    store.close()
    np.testing.assert_array_equal(engine.logits([1, 2, 3]), before)  # the engine holds the memory


@pytest.mark.parametrize("kind", _KINDS)
def test_layers_are_aligned_contiguous_and_read_only(kind: str, tmp_path: Path):
    stored = write_store(tmp_path / "store", "attn4-experts3")
    model = ConvertedModel.open(tmp_path / "store")
    store = model.open_experts(kind)
    assert (store.memory, store.memory_reason) == (kind, "as asked for")
    assert (store.num_layers, store.num_experts) == (2, 4)
    assert store.layout == ExpertLayout.of(64, 128, model.quant)
    assert store.num_bytes == model.expert_bytes == 2 * 4 * store.layout.num_bytes
    for layer in range(2):
        blobs = store.layer(layer)
        assert blobs.shape == (4, store.layout.num_bytes)
        assert blobs.dtype == np.uint8
        assert blobs.flags.c_contiguous and not blobs.flags.writeable
        assert blobs.ctypes.data % 4096 == 0
        np.testing.assert_array_equal(blobs, stored[f"layers.{layer}.experts.blobs"])


def test_memory_is_chosen_by_what_is_free(tmp_path: Path):
    write_store(tmp_path / "store")
    model = ConvertedModel.open(tmp_path / "store")
    store = model.open_experts(available_bytes=1 << 40)
    assert store.memory == "ram"
    assert store.memory_reason.endswith("1024.0 GiB of memory free")
    store = model.open_experts("auto", available_bytes=1 << 20)
    assert store.memory == "mmap"
    assert "1.0 MiB of memory free, too little" in store.memory_reason
    assert model.open_experts().memory in ("ram", "mmap")
    with pytest.raises(CapacityError, match="do not fit into host memory"):
        model.open_experts("ram", available_bytes=1)
    with pytest.raises(ConfigError, match="unknown kind of host memory"):
        model.open_experts("disk")


def test_progress_adds_up_to_what_was_announced(tmp_path: Path):
    write_store(tmp_path / "store", "bf16")
    hashed: list[int] = []
    model = ConvertedModel.open(tmp_path / "store", verify=True, on_bytes=hashed.append)
    assert sum(hashed) == model.manifest.total_bytes
    loaded: list[int] = []
    store = model.open_experts("ram", loaded.append)
    assert sum(loaded) == model.expert_bytes
    shared: list[int] = []
    for _ in model.parameters(store, "float32", shared.append):
        pass
    assert sum(shared) == model.shared_bytes
    assert model.expert_bytes + model.shared_bytes <= model.manifest.total_bytes
    model.open_experts("mmap", lambda num_bytes: pytest.fail("a mapping loads nothing"))


def test_a_store_can_be_closed_twice_and_views_outlive_it(tmp_path: Path):
    stored = write_store(tmp_path / "store")
    for kind in _KINDS:
        store = ConvertedModel.open(tmp_path / "store").open_experts(kind)
        store.lock_pages(jax.devices("cpu")[0])
        view = store.layer(1)
        store.close()
        store.close()
        np.testing.assert_array_equal(view, stored["layers.1.experts.blobs"])
        with pytest.raises(AssertionError, match="closed"):
            store.layer(1)


def test_a_store_of_arrays_in_memory_is_as_good():
    layout = ExpertLayout.of(64, 128, parse_spec("bf16"))
    blobs = [random_blobs(layout, 3, seed).view(np.uint8) for seed in range(2)]
    store = ExpertStore(layout, blobs, "ram", "quantized while loading")
    assert (store.num_layers, store.num_experts) == (2, 3)
    assert store.layer(1).ctypes.data == blobs[1].ctypes.data
    assert store.lock_pages(jax.devices("cpu")[0]) is store.lock_pages(jax.devices("cpu")[0])


@pytest.mark.parametrize("quant", ["attn4-experts3", "bf16"])
def test_a_converted_model_is_what_quantizing_while_loading_makes(quant: str, tmp_path: Path):
    source = RandomSource(mixtral_json(**CONFIG_CHANGES), "a test", seed=3)
    Conversion(source, tmp_path / "store", parse_spec(quant), method="rtn").run()
    model = ConvertedModel.open(tmp_path / "store", verify=True)
    assert model.config == source.config
    assert (str(model.quant), model.method) == (quant, "rtn")
    expected = list(quantized_parameters(source, "float32", model.quant, "rtn"))
    with model.open_experts("mmap") as store:
        found = list(model.parameters(store, "float32"))
    for array, other in zip(found, expected, strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(_as_float32(array), _as_float32(other))


def test_tied_embeddings_and_side_files(tmp_path: Path):
    stored = write_store(tmp_path / "store", tie_word_embeddings=True)
    assert "lm_head" not in stored
    (tmp_path / "store" / "README.md").write_text("not in the manifest, and nobody's business")
    model = ConvertedModel.open(tmp_path / "store")
    store = model.open_experts("mmap")
    assert len(list(model.parameters(store, "bfloat16"))) == len(stored)
