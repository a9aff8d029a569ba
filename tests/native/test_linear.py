"""Products with one matrix, against float64 on the stored weights and against XLA's."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.errors import ConfigError
from jmoe.models import linear
from jmoe.native import choice, library, ops
from jmoe.native.choice import HostKernels
from jmoe.quant.formats import BF16, F32, Format, QuantFormat
from jmoe.quant.quant_array import QuantArray, from_parts
from tests.native.conftest import ISAS
from tests.quant.cases import nmse, quant_format, random_parts, reference_dequantize

ALL_BITS = (8, 16, 24)
# Of each row. Twice what ops.py promises of many numbers: the roundings of few do not average out.
MAX_NMSE = {8: 2e-4, 16: 2e-8, 24: 2e-12}

FORMATS = [
    QuantFormat(bits=bits, group_size=group_size, symmetric=symmetric, nested=nested)
    for bits, group_size, symmetric, nested in itertools.product(
        (8, 4, 3, 2), (16, 32, 64, 128, 256), (False, True), (False, True)
    )
]
FORMATS = [fmt for fmt in FORMATS if choice.supports(fmt)]

# Neither a multiple of the rows of a tile nor of a thread's part.
OUTPUTS = 37
# Up to four rows are multiplied in one form, more in another one.
EVERY_ROWS = (1, 2, 3, 5)

# Formats and row lengths that take other ways through the kernels.
SHAPES = [
    ("4g16", 16),  # one group
    ("3g32", 32),
    ("2g16", 48),  # less than a vector
    ("8g16s", 16 * 31),
    ("4g256", 256),
    ("4g16f", 512),  # as many groups as two or four vectors of their scales
    ("3g64s", 64 * 48),
    ("2g16", 16 * 129),  # 3 nested groups of 43
    ("4g16f", 16 * 129),
    ("8g16", 16 * 131),  # 131 nested groups of one
    ("2g16s", 16 * 258),  # 3 of 86, and more columns than one tile
    ("2g16", 16 * 320),  # 4 of 80: the second run of 256 groups begins within one
    ("2g16", 8192),  # 4 of 128
    ("4g16sf", 16 * 259),
    ("3g32", 32 * 129),
    ("4g64", 4096),
    ("4g64", 4096 + 64),
    ("8g256", 256 * 17),
    ("3g256sf", 256 * 33),
]
SHAPE_ROWS = (1, 2, 3, 4, 5, 6, 13, 33)
SHAPE_OUTPUTS = 33

DENSE_SHAPES = [(1, 1), (5, 7), (37, 80), (33, 515), (3, 2049), (19, 4131)]


def random_matrix(fmt: Format, num_rows: int, num_columns: int) -> jax.Array | QuantArray:
    generator = np.random.default_rng(num_columns)
    parts = random_parts(fmt, (num_rows, num_columns), generator)
    arrays = {name: jnp.asarray(part) for name, part in parts.items()}
    return from_parts(arrays, fmt) if isinstance(fmt, QuantFormat) else arrays["values"]


@functools.lru_cache(maxsize=1000)
def case(fmt: Format, num_rows: int, num_columns: int) -> tuple[jax.Array | QuantArray, np.ndarray]:
    """A matrix, and its weights in float64."""
    w = random_matrix(fmt, num_rows, num_columns)
    exact = reference_dequantize(w) if isinstance(w, QuantArray) else np.asarray(w, np.float64)
    return w, exact


def normal(num_rows: int, num_columns: int, dtype="float32") -> np.ndarray:
    generator = np.random.default_rng(num_rows)
    return generator.standard_normal((num_rows, num_columns), np.float32).astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def products(xs, w, all_bits=ALL_BITS, num_threads=0):
    """One program for many products: compiling takes longer than running."""
    return [{bits: ops.linear(x, w, bits, num_threads) for bits in all_bits} for x in xs]


def bits_of(y) -> np.ndarray:
    """Floats to compare as they are, NaN included."""
    return np.asarray(y).view(np.uint32)


def check(xs, w, exact: np.ndarray, max_nmse=MAX_NMSE):
    """Compares products of each row: it is somebody's token.

    NMSE is relative to the mean square that a sum of such products has if their signs are random:
    of few columns the sums themselves may be small.
    """
    results = products(xs, w, tuple(max_nmse))
    assert all(y.dtype == jnp.float32 for of_x in results for y in of_x.values())
    rows = np.concatenate(xs).astype(np.float64)
    expected, size = rows @ exact.T, np.sum(rows**2 @ exact.T**2, axis=1)
    for bits, limit in max_nmse.items():
        y = np.concatenate([of_x[bits] for of_x in results])
        assert y.shape == expected.shape
        assert np.all(np.sum((y - expected) ** 2, axis=1) < limit * size)


def test_there_is_no_other_instruction_set(kernels):
    assert set(kernels.jmoe_isas().decode().split(",")) <= set(ISAS)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(isa, fmt):
    w, exact = case(fmt, OUTPUTS, 5 * fmt.group_size)
    check([normal(rows, w.shape[1]) for rows in EVERY_ROWS], w, exact)


@pytest.mark.parametrize(("text", "num_columns"), SHAPES)
def test_every_shape(isa, text, num_columns):
    w, exact = case(quant_format(text), SHAPE_OUTPUTS, num_columns)
    check([normal(rows, num_columns) for rows in SHAPE_ROWS], w, exact, {24: MAX_NMSE[24]})


@pytest.mark.parametrize("text", ["8g64sf", "4g64", "3g32", "2g16f"])
def test_bfloat16_activations_are_exact(isa, text):
    w, exact = case(quant_format(text), OUTPUTS, 5 * 64)
    check([normal(rows, 5 * 64, "bfloat16") for rows in EVERY_ROWS], w, exact)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
@pytest.mark.parametrize("fmt", [BF16, F32], ids=str)
def test_weights_in_float_types(isa, fmt, shape, x_dtype):
    w, exact = case(fmt, *shape)
    xs = [normal(rows, shape[1], x_dtype) for rows in (1, 2, 3, 4, 5, 6, 13, 17, 33)]
    check(xs, w, exact, {24: MAX_NMSE[24]})


@pytest.mark.parametrize("text", ["8g64sf", "4g16", "3g32", "2g64s", "bf16", "f32"])
def test_the_same_as_through_xla(isa, text):
    fmt = {"bf16": BF16, "f32": F32}.get(text) or quant_format(text)
    w, _ = case(fmt, OUTPUTS, 512)
    for num_rows in (1, 5):
        x = jnp.asarray(normal(num_rows, 512, "bfloat16" if fmt == BF16 else "float32"))
        expected = np.asarray(through_xla(x, w), np.float64)
        assert nmse(on_host(x, w), expected) < 2e-12


through_xla = jax.jit(linear.linear)


@jax.jit
def on_host(x, w):
    return linear.linear(x, w, HostKernels(activation_bits=24))


def test_leading_dimensions_are_kept(kernels):
    w, exact = case(quant_format("4g64"), OUTPUTS, 512)
    x = normal(6, 512).reshape(2, 3, 512)
    y = on_host(x, w)
    assert y.shape == (2, 3, OUTPUTS)
    assert nmse(y, np.asarray(x, np.float64) @ exact.T) < MAX_NMSE[24]


@pytest.mark.parametrize("fmt", [quant_format("4g64"), F32], ids=str)
def test_no_rows_and_no_outputs(isa, fmt):
    w, _ = case(fmt, OUTPUTS, 512)
    x = jnp.asarray(normal(3, 512))
    assert ops.linear(x[:0], w).shape == (0, OUTPUTS)
    assert ops.linear(x, w[:0]).shape == (3, 0)


# Numbers out of the ordinary.


@pytest.mark.parametrize("text", ["8g256", "8g256s", "4g256", "3g256s", "2g256"])
def test_the_largest_sums_of_integers_fit(isa, text):
    """All codes and all activations of a row as large as they get, of one sign and of both."""
    fmt = quant_format(text)
    w, _ = case(fmt, OUTPUTS, 512)
    assert isinstance(w, QuantArray)
    w = from_parts(w.parts() | {"codes": jnp.full(w.codes.shape, 255, jnp.uint8)}, fmt)
    signs = np.array([1, -1, 1, -1, 1], np.float32)[:, None] * np.ones((5, 512), np.float32)
    signs[2:4, ::2] *= -1
    exact = reference_dequantize(w)
    size = np.sum(np.abs(exact), axis=1)
    for x, results in zip((signs, signs[:2]), products([signs, signs[:2]], w), strict=True):
        for y in results.values():
            # Where the zero point is large, too, more is rounded than comes out.
            assert np.max(np.abs(np.asarray(y) - x @ exact.T) / size) < 1e-5


@pytest.mark.parametrize("text", ["8g64sf", "4g16", "3g32", "2g64s"])
@pytest.mark.parametrize("num_rows", [2, 7])
def test_rows_of_all_magnitudes(isa, text, num_rows):
    w, exact = case(quant_format(text), OUTPUTS, 512)
    x = normal(num_rows, 512)
    # Below 1e-30 activations are zero: the largest of a group decides.
    for size in (1e-20, 1e-10, 1e10, 1e35):
        check([x * np.float32(size)], w, exact)
    for size in (0.0, 1e-33, 1e-38):
        for y in products([x * np.float32(size)], w)[0].values():
            np.testing.assert_array_equal(y, 0)
    # A group does not see the others: neither huge nor tiny ones.
    sizes = np.logspace(-20, 20, 512 // 64).repeat(64).astype(np.float32)
    check([x * sizes], w, exact)


@pytest.mark.parametrize("text", ["8g64sf", "4g16", "3g32", "2g64s"])
@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_not_a_number_stays_in_its_row(isa, text, num_rows):
    """One NaN or infinity makes all products of its row NaN, and changes no other row."""
    w, _ = case(quant_format(text), OUTPUTS, 512)
    x = normal(num_rows, 512)
    before = products([x], w)[0]
    for value, row, column in itertools.product(
        (np.nan, -np.nan, np.inf, -np.inf), {0, num_rows - 1}, (0, 1, 255, 511)
    ):
        damaged = x.copy()
        damaged[row, column] = value
        after = products([damaged], w)[0]
        for bits in ALL_BITS:
            y, expected = np.array(after[bits]), np.array(before[bits])
            assert np.all(np.isnan(y[row]))
            y[row] = expected[row]
            np.testing.assert_array_equal(y, expected)


def test_weights_that_are_no_numbers_stay_in_their_output(isa):
    w, _ = case(quant_format("4g64f"), OUTPUTS, 512)
    assert isinstance(w, QuantArray)
    damaged = w.parts() | {"scales": w.scales.at[20, 3].set(jnp.nan)}
    xs = [normal(rows, 512) for rows in (1, 7)]
    after = products(xs, from_parts(damaged, w.format))
    for one_before, one_after in zip(products(xs, w), after, strict=True):
        for bits in ALL_BITS:
            y, expected = np.array(one_after[bits]), np.array(one_before[bits])
            assert np.all(np.isnan(y[:, 20]))
            y[:, 20] = expected[:, 20]
            np.testing.assert_array_equal(y, expected)


# Threads.


def threading_case(text: str):
    fmt = F32 if text == "f32" else quant_format(text)
    w, _ = case(fmt, 517, 320)
    return [normal(rows, 320) for rows in (1, 4, 65)], w


@pytest.mark.parametrize("text", ["8g64sf", "4g16", "3g32", "2g64s", "f32"])
def test_any_number_of_threads_gives_the_same_bits(isa, text):
    xs, w = threading_case(text)
    one = products(xs, w, (8, 24), 1)
    for num_threads in (2, 5, 0):
        for results, expected in zip(products(xs, w, (8, 24), num_threads), one, strict=True):
            for bits in (8, 24):
                np.testing.assert_array_equal(bits_of(results[bits]), bits_of(expected[bits]))


def test_calls_at_the_same_time_give_the_same_bits(isa):
    cases = [threading_case(text) for text in ("8g64sf", "4g16", "3g32", "f32")]
    expected = [products(xs, w, (8, 24), 5) for xs, w in cases]

    def call(i: int) -> bool:
        xs, w = cases[i % len(cases)]
        results = products(xs, w, (8, 24), 5)
        return all(
            np.array_equal(bits_of(got[bits]), bits_of(wanted[bits]))
            for got, wanted in zip(results, expected[i % len(cases)], strict=True)
            for bits in (8, 24)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(64)))


def test_without_kernels_a_call_is_an_error(monkeypatch):
    unavailable = library.Status(False, None, "not built", "install jmoe again")
    monkeypatch.setattr(library, "_load", lambda: (unavailable, None))
    with pytest.raises(ConfigError, match="the host kernels are not available"):
        ops.linear(jnp.ones((1, 8)), jnp.ones((8, 8)))
