"""Codes to bytes: the documented layout, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.errors import ConfigError
from jmoe.quant.packing import pack, unpack
from tests.quant import cases
from tests.quant.cases import quant_format

BITS = (8, 4, 3, 2)
SIZES = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_the_documentation(bits, size):
    fmt = quant_format(f"{bits}g{size}")
    codes = np.random.default_rng(size).integers(0, 1 << bits, (3, 2 * size), np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes), fmt))
    assert packed.dtype == np.uint8
    assert packed.tolist() == [cases.pack_plainly(row, fmt) for row in codes.tolist()]


def test_a_few_bytes_by_hand():
    codes = jnp.arange(16, dtype=jnp.uint8)
    assert pack(codes, quant_format("8g16")).tolist() == list(range(16))
    four = [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    assert pack(codes, quant_format("4g16")).tolist() == four
    # Codes 0 to 3 in four neighbouring groups of four: every byte has them all.
    quarters = codes // 4
    assert pack(quarters, quant_format("2g16")).tolist() == [0b11_10_01_00] * 4
    assert pack(quarters + 4, quant_format("3g16")).tolist() == [0b11_10_01_00] * 4 + [0xFF] * 2


@functools.partial(jax.jit, static_argnums=1)
def pack_and_unpack(codes, fmt):
    packed = pack(codes, fmt)
    return packed, unpack(packed, fmt)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(BITS),
    st.sampled_from(SIZES),
    st.sampled_from([(), (1,), (0,), (2, 3), (2, 1, 2)]),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_unpack_is_the_inverse_of_pack(bits, size, leading, num_groups, seed):
    fmt = quant_format(f"{bits}g{size}")
    shape = (*leading, num_groups * size)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint8)
    packed, unpacked = pack_and_unpack(jnp.asarray(codes), fmt)
    assert packed.shape == (*leading, num_groups * size * bits // 8)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_string_is_codes(bits):
    # pack is the inverse of unpack too: no bit of a byte is unused.
    fmt = quant_format(f"{bits}g32")
    shape = (4, 2 * 32 * bits // 8)
    packed = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    codes = unpack(jnp.asarray(packed), fmt)
    assert int(codes.max()) <= fmt.max_code
    np.testing.assert_array_equal(pack(codes, fmt), packed)
    np.testing.assert_array_equal(codes, cases.read_codes(packed, fmt))


@pytest.mark.parametrize("num_columns", [1, 15, 17, 33, 48, 100])
def test_rows_that_are_not_whole_groups_are_refused_with_a_reason(num_columns):
    fmt = quant_format("4g32")
    with pytest.raises(ConfigError) as caught:
        fmt.parts(8, num_columns)
    error = caught.value
    assert "does not divide the rows" in error.what
    assert f"groups of 32 in rows of {num_columns}" in str(error.got)
    assert error.do == (
        "choose a smaller group, such as 4g16"
        if num_columns == 48
        else "leave this component in bf16"
    )
