"""The streaming read that benchmarks compare with: it must read everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.native import ops

# Up to a step of vectors and behind; several streams; several parts.
SIZES = (0, 1, 7, 8, 9, 255, 1023, 1024, 1025, 4097, 2**20 - 1, 3 * 2**20 + 13)


def checksum(array: np.ndarray) -> np.ndarray:
    data = array.tobytes()
    words = np.frombuffer(data + bytes(-len(data) % 8), np.uint64)
    return np.bitwise_xor.reduce(words, initial=np.uint64(0)).reshape(1).view(np.uint32)


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_counts(isa, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    for num_threads in (1, 2, 5, 0):
        np.testing.assert_array_equal(ops.read(jnp.asarray(data), num_threads), checksum(data))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "complex64", "bool", "int8"])
def test_arrays_of_every_type(kernels, dtype):
    array = jnp.arange(3 * 5 * 7).reshape(3, 5, 7).astype(dtype)
    expected = checksum(np.asarray(array))
    np.testing.assert_array_equal(jax.jit(ops.read)(array), expected)
