"""QuantArray: what validate checks, what indexing selects, what dequantizing gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.errors import ConfigError
from jmoe.quant.quant_array import QuantArray, from_parts, validate
from tests.quant import cases
from tests.quant.cases import quant_format

SHAPE = (3, 8, 64)


def abstract(text: str, **changes) -> QuantArray:
    """A QuantArray of shapes only, with some arrays replaced."""
    fmt = quant_format(text)
    *stack, num_rows, num_columns = SHAPE
    parts = {
        name: jax.ShapeDtypeStruct((*stack, *part.shape), jnp.dtype(part.dtype))
        for name, part in fmt.parts(num_rows, num_columns).items()
    }
    return dataclasses.replace(from_parts(parts, fmt), **changes)


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@pytest.mark.parametrize("text", ["8g64", "4g16", "3g32", "2g64", "4g16s", "4g16f", "8g64sf"])
def test_valid_arrays_are_accepted_in_every_form(text):
    array = abstract(text)
    validate(array)
    assert array.shape == SHAPE and array.ndim == 3
    validate(jax.tree.map(lambda part: np.zeros(part.shape, part.dtype), array))
    validate(jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), array))


VIOLATIONS = {
    "codes without rows": ("4g16", {"codes": struct((32,), "uint8")}, "codes have the shape"),
    "codes of another dtype": ("4g16", {"codes": struct((3, 8, 32), "int8")}, "codes: int8"),
    "scales missing": ("4g16", {"scales": None}, "lacks scales"),
    "scales of another shape": ("4g16", {"scales": struct((3, 8, 2), "uint8")}, "scales: "),
    "scales of another dtype": ("4g16", {"scales": struct((3, 8, 4), "bfloat16")}, "scales: "),
    "flat scales of another dtype": ("4g16f", {"scales": struct((3, 8, 4), "float32")}, "scales:"),
    "scales of another stack": ("4g16", {"scales": struct((2, 8, 4), "uint8")}, "scales: "),
    "scales without the stack": ("4g16", {"scales": struct((8, 4), "uint8")}, "scales: "),
    "zeros missing": ("4g16", {"zeros": None}, "lacks zeros"),
    "zeros of a symmetric format": ("4g16s", {"zeros": struct((3, 8, 4), "uint8")}, "has zeros"),
    "zeros of another shape": ("4g16", {"zeros": struct((3, 8, 5), "uint8")}, "zeros: "),
    "zeros of another dtype": ("4g16f", {"zeros": struct((3, 8, 4), "uint8")}, "zeros: "),
    "nested missing": ("4g16", {"nested": None}, "lacks nested"),
    "nested of a flat format": ("4g16f", {"nested": struct((3, 8, 1, 4), "float32")}, "has nested"),
    "nested of another shape": ("4g16", {"nested": struct((3, 8, 1, 2), "float32")}, "nested: "),
    "nested of another number": ("4g16", {"nested": struct((3, 8, 3, 4), "float32")}, "nested: "),
    "nested of another dtype": ("4g16", {"nested": struct((3, 8, 1, 4), "bfloat16")}, "nested: "),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_every_violated_invariant_is_found(name):
    text, changes, message = VIOLATIONS[name]
    with pytest.raises(ValueError, match=message):
        validate(abstract(text, **changes))


def test_rows_that_are_not_whole_groups_are_found():
    with pytest.raises(ConfigError, match="does not divide the rows"):
        validate(abstract("4g16", codes=struct((3, 8, 28), "uint8")))


@pytest.mark.parametrize("fmt", cases.FORMATS, ids=str)
def test_dequantizing_follows_the_documentation(fmt):
    array, _ = cases.quantized_special(fmt, "rtn")
    scales, zeros = (np.abs(p)[..., None] for p in cases.read_parameters(array))
    expected = cases.by_group(cases.reference_dequantize(array), fmt)
    error = np.abs(cases.by_group(np.asarray(cases.decode(array), np.float64), fmt) - expected)
    # A few roundings of float32: of scale and zero point, of the difference, of the product.
    assert np.all(error <= 8 * 2**-24 * (fmt.max_code + zeros) * scales + cases.TINY)


def test_indexing_selects_matrices_and_rows():
    array, _ = cases.quantized_special(quant_format("4g64"), "rtn")
    whole = np.asarray(cases.decode(array))
    validate(array[1])
    np.testing.assert_array_equal(cases.decode(array[1]), whole[1])
    np.testing.assert_array_equal(cases.decode(array[0, 2:5]), whole[0, 2:5])
    rows = jnp.array([[3, 3], [0, 7]])
    np.testing.assert_array_equal(cases.decode(array[1][rows]), whole[1][np.asarray(rows)])


def test_bytes_are_those_of_the_parts_and_the_format_is_static():
    fmt = quant_format("3g64")
    array, _ = cases.quantized_special(fmt, "rtn")
    per_matrix = sum(p.num_bytes for p in fmt.parts(cases.ROWS, cases.COLUMNS).values())
    assert array.nbytes == cases.STACK * per_matrix
    leaves, structure = jax.tree.flatten(array)
    assert len(leaves) == 4
    assert jax.tree.unflatten(structure, leaves).format == fmt
    flat = dataclasses.replace(array, format=quant_format("3g64f"))
    assert jax.tree.structure(flat) != structure
