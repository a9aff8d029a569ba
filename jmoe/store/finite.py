"""Finding NaN and infinity by the bits of floats, in little memory beside the array."""

import dataclasses
from collections.abc import Iterator

import numpy as np

_CHUNK_ELEMENTS = 1 << 20  # keeps temporaries small beside the array

# Per type: an unsigned integer of its size, and the exponent bits, all set in NaN and infinity.
_EXPONENTS = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """How many elements of an array are not numbers."""

    num_nan: int
    num_inf: int


def is_finite(array: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity in a C-contiguous array of a float type."""
    infinity = _EXPONENTS[array.dtype.name][1]
    return all(int(np.max(magnitudes)) < infinity for magnitudes in _magnitudes(array))


def count_non_finite(array: np.ndarray) -> NonFinite:
    """Counts what ``is_finite`` looks for."""
    infinity = _EXPONENTS[array.dtype.name][1]
    num_nan = num_inf = 0
    for magnitudes in _magnitudes(array):
        num_inf += int(np.count_nonzero(magnitudes == infinity))
        num_nan += int(np.count_nonzero(magnitudes > infinity))
    return NonFinite(num_nan=num_nan, num_inf=num_inf)


def _magnitudes(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bits but the sign, piece by piece: of two floats the larger has the larger."""
    uint, _ = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(uint)
    sign = uint(1 << (8 * array.itemsize - 1))
    for start in range(0, bits.size, _CHUNK_ELEMENTS):
        yield bits[start : start + _CHUNK_ELEMENTS] & ~sign
