"""Products with quantized matrices, in every form, against float64 on the stored weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models import linear
from jmoe.quant import matmul
from jmoe.quant.matmul import MAX_REDUCE_ROWS, dequantized_product, reduce_product
from jmoe.quant.solver import quantize
from tests.quant import cases
from tests.quant.cases import quant_format

FORMATS = [quant_format(text) for text in ("8g64sf", "4g64", "4g16f", "3g16", "3g256s", "2g16")]
OUTPUTS, INPUTS = 48, 512
ROWS = (1, 2, 3, 4, 5, 16, 33)

# Of the copy of the weights in bfloat16; x is exact in both.
MAX_NMSE = {"float32": 1e-11, "bfloat16": 2e-5}


@functools.cache
def weights(fmt):
    w = np.random.default_rng(0).standard_t(4, (OUTPUTS, INPUTS)) * INPUTS**-0.5
    return quantize(jnp.asarray(w, jnp.float32), fmt, "rtn").array


def inputs(num_rows, dtype):
    return jnp.asarray(np.random.default_rng(1).normal(size=(num_rows, INPUTS)), dtype)


def check(product, num_rows, dtype, fmt, max_nmse):
    x = inputs(num_rows, dtype)
    y = product(x, weights(fmt))
    assert y.dtype == jnp.float32 and y.shape == (num_rows, OUTPUTS)
    expected = np.asarray(x, np.float64) @ cases.reference_dequantize(weights(fmt)).T
    # Row by row: each is somebody's token.
    for got_row, expected_row in zip(np.asarray(y), expected, strict=True):
        assert cases.nmse(got_row, expected_row) < max_nmse


reduce_whole = jax.jit(functools.partial(reduce_product, of_stack=False))
reduce_of_stack = jax.jit(functools.partial(reduce_product, of_stack=True))


@pytest.mark.parametrize("product", [reduce_whole, reduce_of_stack], ids=["whole", "of a stack"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_multiply_and_sum(product, fmt):
    # In float32 whatever x is: also in bfloat16 the error is that of the sums.
    check(product, MAX_REDUCE_ROWS, "bfloat16", fmt, 1e-11)
    check(product, 1, "float32", fmt, 1e-11)


@pytest.mark.parametrize("num_rows", [2, 3, MAX_REDUCE_ROWS + 1])
def test_multiply_and_sum_takes_any_number_of_rows(num_rows):
    check(reduce_whole, num_rows, "float32", quant_format("4g64"), 1e-11)
    check(reduce_of_stack, num_rows, "float32", quant_format("2g16"), 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantized_product(dtype, fmt):
    check(jax.jit(dequantized_product), 5, dtype, fmt, MAX_NMSE[dtype])
    if fmt.bits in (2, 4):  # the form for accelerators
        check(jax.jit(matmul._in_byte_order), 5, dtype, fmt, MAX_NMSE[dtype])


@jax.jit
def on_cpu(x, w):
    return linear.linear(x, w)


@functools.partial(jax.jit, static_argnums=2)
def in_tiles(x, w, tile_bytes):
    return linear._tiled_quant(x, w, tile_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", ROWS)
def test_linear_takes_any_number_of_rows(dtype, num_rows):
    check(on_cpu, num_rows, dtype, quant_format("4g64"), MAX_NMSE[dtype])


@pytest.mark.parametrize("num_rows", [1, MAX_REDUCE_ROWS, MAX_REDUCE_ROWS + 1, 33])
def test_linear_as_on_an_accelerator(num_rows):
    accelerator = jax.jit(linear._linear_accelerator)
    check(accelerator, num_rows, "bfloat16", quant_format("4g64"), MAX_NMSE["bfloat16"])


@pytest.mark.parametrize("tile_rows", [1, 5, 16, 48, 1000])
def test_tiles_give_the_same_product(tile_rows):
    # 48 outputs in tiles of at most 5 are tiles of 4.
    product = functools.partial(in_tiles, tile_bytes=tile_rows * INPUTS * 4)
    check(product, 5, "float32", quant_format("2g16"), 1e-11)


def test_linear_keeps_leading_dimensions():
    x = inputs(6, "float32").reshape(2, 3, INPUTS)
    y = linear.linear(x, weights(quant_format("4g64")))
    expected = (
        np.asarray(x, np.float64) @ cases.reference_dequantize(weights(quant_format("4g64"))).T
    )
    assert y.shape == (2, 3, OUTPUTS)
    assert cases.nmse(y, expected) < 1e-11


def test_embedding_rows_are_dequantized():
    w = weights(quant_format("4g64"))
    ids = jnp.array([[0, 47], [3, 3]])
    expected = cases.reference_dequantize(w)[np.asarray(ids)]
    np.testing.assert_allclose(linear.embed(ids, w), expected, rtol=1e-5, atol=1e-6)
