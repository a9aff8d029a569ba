"""What only products with weights in float types promise; test_linear.py has the rest.

A result is a row of x times a row of the weights, and depends on nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.native import ops

DTYPES = ["float32", "bfloat16"]
# Of each row; bfloat16 weights and activations are taken as they are.
MAX_NMSE = 1e-12
# Columns are added up in chunks of so many, for up to 16 rows of x at a time.
CHUNK = 2048

SHAPES = [
    (1, CHUNK),
    (9, CHUNK + 1),
    (33, 3 * CHUNK - 1),  # not all columns of 16 rows at once
    (8, 17 * CHUNK + 40),  # nor of one
    (67, 31),
]
ROWS = (1, 2, 4, 6, 16, 23, 100)


@functools.partial(jax.jit, static_argnums=2)
def product(x, w, num_threads=0):
    return ops.linear(x, w, num_threads=num_threads)


def weights(shape: tuple[int, int], dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def activations(num_rows: int, num_columns: int) -> jax.Array:
    generator = np.random.default_rng(num_columns)
    return jnp.asarray(generator.standard_normal((num_rows, num_columns)), jnp.float32)


def bits_of(y) -> np.ndarray:
    return np.asarray(y).view(np.uint32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(isa, dtype, shape):
    w = weights(shape, dtype)
    for num_rows in ROWS:
        x = activations(num_rows, shape[1])
        expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        error = np.sum((np.asarray(product(x, w)) - expected) ** 2, axis=1)
        # As if signs were random: one sum may be small.
        size = np.sum(np.asarray(x, np.float64) ** 2 @ np.asarray(w, np.float64).T ** 2, axis=1)
        assert np.all(error < MAX_NMSE * size)


@pytest.mark.parametrize("num_columns", [80, CHUNK + 17, 8 * CHUNK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_gets_the_same_bits(isa, dtype, num_columns):
    """So a token does not depend on those that are computed along with it."""
    w = weights((37, num_columns), dtype)
    x = activations(41, num_columns)
    together = bits_of(product(x, w))
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 40):
        for first in (0, 41 - num_rows):
            rows = slice(first, first + num_rows)
            np.testing.assert_array_equal(bits_of(product(x[rows], w)), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_alone_gets_the_same_bits(isa, dtype):
    """So it does not matter how the outputs are split over threads."""
    w = weights((301, 333), dtype)
    for num_rows in (1, 3, 6):
        x = activations(num_rows, 333)
        together = bits_of(product(x, w))
        for first, num_outputs in ((0, 1), (5, 3), (0, 8), (64, 32), (100, 201)):
            some = slice(first, first + num_outputs)
            np.testing.assert_array_equal(bits_of(product(x, w[some])), together[:, some])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_where_it_is(isa, dtype, value):
    w, x = weights((37, 333), dtype), activations(7, 333)
    before = np.asarray(product(x, w))
    for column in (0, 1, 31, 300, 331, 332):
        of_row = np.array(product(x.at[4, column].set(value), w))
        assert not np.any(np.isfinite(of_row[4]))
        of_row[4] = before[4]
        np.testing.assert_array_equal(of_row, before)
        of_output = np.array(product(x, w.at[20, column].set(value)))
        assert not np.any(np.isfinite(of_output[:, 20]))
        of_output[:, 20] = before[:, 20]
        np.testing.assert_array_equal(of_output, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(isa, dtype):
    w = weights((1003, 700), dtype)
    for num_rows in (1, 5, 33):
        x = activations(num_rows, 700)
        expected = bits_of(product(x, w, 1))
        for num_threads in (2, 5, 0):
            np.testing.assert_array_equal(bits_of(product(x, w, num_threads)), expected)
