"""Quantizing matrix by matrix: equal to one call of the solver, in the order of the decoder."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmoe.errors import CheckpointError
from jmoe.models.decoder import abstract_parameters
from jmoe.quant.formats import BF16, F32, DenseFormat, QuantFormat, parse_format
from jmoe.quant.layout import MATRICES, ExpertLayout, aligned_empty
from jmoe.quant.quant_array import QuantArray, from_parts, validate
from jmoe.quant.solver import METHODS, quantize
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec
from jmoe.store import finite
from jmoe.store import quantize as store_quantize
from jmoe.store.finite import is_finite
from jmoe.store.quantize import (
    layer_blobs,
    matrix_paths,
    quantize_matrix,
    quantized_parameters,
    read_ahead,
    shared_parameters,
    shared_shapes,
)
from jmoe.store.source import RandomSource
from tests.models.configs import mixtral_json

_FORMATS = ["4g64", "3g32", "2g16", "8g64sf", "4g16f", "8g256s"]


def _quant_format(text: str) -> QuantFormat:
    fmt = parse_format(text)
    assert isinstance(fmt, QuantFormat)
    return fmt


def _source(**changes: Any) -> RandomSource:
    return RandomSource(mixtral_json(hidden_size=64, intermediate_size=128, **changes), "small")


def _bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fmt", [*map(parse_format, _FORMATS)], ids=str)
def test_pieces_give_what_one_call_gives(fmt, method, monkeypatch):
    monkeypatch.setattr(store_quantize, "_PIECE_WEIGHTS", 5 * 512)
    w = np.random.default_rng(0).standard_normal((33, 512), np.float32) ** 3
    w = (w / 50).astype(ml_dtypes.bfloat16)
    parts = quantize_matrix(w, fmt, method, where="here")
    expected = quantize(jnp.asarray(w), fmt, method).array.parts()
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        np.testing.assert_array_equal(_bits(part), _bits(expected[name]), name)
        assert part.ctypes.data % 64 == 0
    array = from_parts({name: jnp.asarray(part) for name, part in parts.items()}, fmt)
    validate(array)
    assert array.shape == w.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (17, 100), (32, 511)])
@pytest.mark.parametrize("fmt", ["4g64", "8g64sf", "2g16f"])
def test_weights_that_are_not_finite_are_refused_by_name(fmt, place, value, monkeypatch):
    monkeypatch.setattr(store_quantize, "_PIECE_WEIGHTS", 5 * 512)
    w = np.ones((33, 512), ml_dtypes.bfloat16)
    w[place] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity in layers\.3\.router"):
        quantize_matrix(w, _quant_format(fmt), "rtn", where="layers.3.router")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_finite_is_neither_nan_nor_infinite(dtype, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_ELEMENTS", 4)
    finfo = ml_dtypes.finfo(dtype)
    sound = np.array([finfo.max, finfo.min, finfo.tiny, -0.0, 0, 1, -1], dtype)
    assert is_finite(sound)
    assert is_finite(sound[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for i in range(7):
            damaged = sound.copy()
            damaged[i] = bad
            assert not is_finite(damaged)


def test_an_overflow_on_the_way_to_a_dense_format_is_refused():
    source = _source()
    huge = np.full((4, 64), np.finfo(np.float32).max, np.float32)
    parts = {"values": np.empty((4, 64), ml_dtypes.bfloat16)}
    with pytest.raises(CheckpointError, match="NaN or infinity in here"):
        store_quantize.store_matrix(huge, BF16, "rtn", parts, where="here")
    assert is_finite(source.read("lm_head"))


@pytest.mark.parametrize("quant", ["attn4-experts4", "attn3-experts3", "int8", "bf16", "f32"])
def test_blobs_hold_the_matrices_of_their_expert(quant: str):
    source, spec = _source(), PRESETS[quant]
    layout = ExpertLayout.of(64, 128, spec)
    blobs = list(layer_blobs(source, 1, layout, "rtn"))
    assert len(blobs) == 4
    used_before = aligned_empty((4, layout.num_bytes), np.uint8)
    used_before[:] = 255
    assert len(list(layer_blobs(source, 1, layout, "rtn", used_before))) == 4
    for expert, blob in enumerate(blobs):
        np.testing.assert_array_equal(blob, used_before[expert])
        for matrix in MATRICES:
            w, fmt = source.read(f"layers.1.experts.{matrix}", expert), layout.format(matrix)
            if isinstance(fmt, DenseFormat):
                expected = {"values": w.astype(fmt.dtype)}
            else:
                expected = quantize_matrix(w, fmt, "rtn", where="")
            for name, part in layout.host_views(blob)[matrix].items():
                np.testing.assert_array_equal(_bits(part), _bits(expected[name]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quant", ["attn4-experts4", "int8", "bf16", "attention=f32,experts=4g32,embeddings=8g64"]
)
def test_quantized_parameters_come_in_the_order_of_the_decoder(quant: str, tied: bool):
    source, spec = _source(tie_word_embeddings=tied), parse_spec(quant)
    read_bytes = []
    parameters = list(quantized_parameters(source, "float32", spec, "rtn", read_bytes.append))
    expected = abstract_parameters(source.config, "float32", spec)
    assert sum(read_bytes) == source.total_bytes
    for array, (path, shape) in zip(parameters, expected.items(), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype), path
        assert array.ctypes.data % 64 == 0, path
    by_path = dict(zip(expected, parameters, strict=True))
    np.testing.assert_array_equal(
        by_path["layers.1.router"], source.read("layers.1.router").astype(np.float32)
    )


def test_shared_parameters_are_those_that_were_announced():
    source, spec = _source(), parse_spec("attention=4g64,experts=4g64,embeddings=f32")
    shapes = shared_shapes(source, spec)
    arrays = dict(shared_parameters(source, spec, "rtn"))
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == shapes
    expected = abstract_parameters(source.config, "bfloat16", spec)
    assert set(arrays) == {path for path in expected if not path.endswith(".blobs")}
    assert arrays["embed_tokens"].dtype == np.float32
    assert arrays["lm_head"].dtype == arrays["layers.0.router"].dtype == ml_dtypes.bfloat16


def test_norms_and_routers_keep_the_type_of_the_source():
    class Float16Source(RandomSource):
        def read(self, path, expert=None):
            return super().read(path, expert).astype(np.float16)

    source = Float16Source(mixtral_json(hidden_size=64, intermediate_size=128), "small")
    arrays = dict(shared_parameters(source, PRESETS["bf16"], "rtn"))
    types = {path: array.dtype.name for path, array in arrays.items()}
    for path in matrix_paths(source, PRESETS["bf16"]):
        kept = path.endswith((".router", ".scale"))
        assert types[path] == ("float16" if kept else "bfloat16"), path


def test_not_finite_weights_of_an_expert_are_named():
    class Damaged(RandomSource):
        def read(self, path, expert=None):
            w = super().read(path, expert)
            if (path, expert) == ("layers.1.experts.w3", 2):
                w[5, 6] = np.nan
            return w

    source = Damaged(mixtral_json(hidden_size=64, intermediate_size=128), "small")
    for spec in (PRESETS["attn4-experts4"], PRESETS["bf16"], QuantSpec(experts=F32)):
        with pytest.raises(CheckpointError, match=r"in layers\.1\.experts\.w3, expert 2"):
            list(quantized_parameters(source, "float32", spec, "rtn"))


def test_reading_is_one_ahead_and_its_errors_keep_their_place():
    read = []

    class Failing(RandomSource):
        def read(self, path, expert=None):
            read.append(expert)
            if expert == 2:
                raise CheckpointError("gone")
            return super().read(path, expert)

    source = Failing(mixtral_json(hidden_size=64, intermediate_size=128), "small")
    keys = [store_quantize.MatrixKey("layers.0.experts.w1", expert) for expert in range(4)]
    matrices = read_ahead(source, keys)
    assert next(matrices)[0].expert == 0
    assert len(read) <= 2
    assert next(matrices)[0].expert == 1
    with pytest.raises(CheckpointError, match="gone"):
        next(matrices)


def test_a_quantized_matrix_is_a_quant_array():
    parts = quantize_matrix(np.ones((2, 64), np.float32), _quant_format("4g64"), "hqq", where="")
    assert isinstance(from_parts(parts, _quant_format("4g64")), QuantArray)
