"""Formats, weights and a second, plain reading of the stored form, for the tests of quant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.quant.formats import Format, QuantFormat, parse_format
from jmoe.quant.layout import MATRICES, ExpertLayout, aligned_empty
from jmoe.quant.quant_array import QuantArray, dequantize, from_parts
from jmoe.quant.solver import Method, Quantized, quantize


def quant_format(text: str) -> QuantFormat:
    fmt = parse_format(text)
    assert isinstance(fmt, QuantFormat)
    return fmt


# Every number of bits with the smallest and the largest group, nested, flat and symmetric.
FORMATS = [
    quant_format(text)
    for text in (
        *("8g16", "8g256", "8g64f", "8g64s", "8g64sf"),
        *("4g16", "4g64", "4g256", "4g64f", "4g32s", "4g32sf"),
        *("3g16", "3g256", "3g64f", "3g128s"),
        *("2g16", "2g256", "2g64f", "2g16s", "2g64sf"),
    )
]

HQQ_FORMATS = [quant_format(text) for text in ("4g64", "3g16", "2g256", "8g64", "4g16f")]

# One shape for all weights: a program is compiled once per shape and format.
STACK, ROWS, COLUMNS = 2, 14, 512

# Smallest normal float32: below it XLA:CPU has no numbers but zero.
TINY = float(np.finfo(np.float32).tiny)

decode = jax.jit(dequantize)


def special_rows(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A row of every kind that a solver might stumble over."""
    normal = generator.normal(size=COLUMNS)
    signs = np.sign(normal)
    outlier, sparse, alternating = normal.copy(), normal.copy(), normal.copy()
    outlier[COLUMNS // 3] = 1e6
    sparse[: COLUMNS // 2] = 0
    alternating[::2] = 0
    return {
        "normal": normal,
        "all zero": np.zeros(COLUMNS),
        "constant": np.full(COLUMNS, 0.3),
        "constant and negative": np.full(COLUMNS, -7.0),
        "all positive, far from zero": 100 + normal,
        "all negative, far from zero": -1e4 + normal,
        "one huge outlier": outlier,
        "one weight": np.eye(1, COLUMNS, 37)[0],
        "half of the groups zero": sparse,
        "every other weight zero": alternating,
        "tiny": normal * 1e-12,
        "huge": normal * 1e30,
        "subnormal": signs * generator.uniform(0, 1e-38, COLUMNS),
        "of all magnitudes": signs * np.exp(generator.uniform(-20, 10, COLUMNS)),
    }


@functools.cache
def special_weights() -> np.ndarray:
    """[STACK, ROWS, COLUMNS]; the second matrix has the same kinds of rows, other numbers."""
    rows = [list(special_rows(np.random.default_rng(i)).values()) for i in range(STACK)]
    weights = np.array(rows, np.float32)
    assert weights.shape == (STACK, ROWS, COLUMNS)
    return weights


@functools.cache
def quantized_special(fmt: QuantFormat, method: Method) -> Quantized:
    return quantize(jnp.asarray(special_weights()), fmt, method)


def locations(fmt: QuantFormat, num_columns: int) -> list[list[tuple[int, int, int, int]]]:
    """Where the code of every column is, in the words of packing.py's docstring.

    Returns:
      For every column its pieces: (byte of the row, bit of the byte, number of bits, bit of the
      code).
    """
    size = fmt.group_size
    found = []
    for column in range(num_columns):
        group, j = divmod(column, size)
        if fmt.bits == 3:
            low = (group * (size // 4) + j % (size // 4), 2 * (j // (size // 4)), 2, 0)
            first_high = num_columns // 4
            high_byte = first_high + group * (size // 8) + j % (size // 8)
            found.append([low, (high_byte, j // (size // 8), 1, 2)])
        else:
            width = size * fmt.bits // 8  # bytes of a group
            byte = group * width + j % width
            found.append([(byte, fmt.bits * (j // width), fmt.bits, 0)])
    return found


def pack_plainly(codes: list[int], fmt: QuantFormat) -> list[int]:
    """The bytes of one row of codes, bit by bit."""
    row = [0] * (len(codes) * fmt.bits // 8)
    for code, pieces in zip(codes, locations(fmt, len(codes)), strict=True):
        for byte, bit, num_bits, first in pieces:
            row[byte] |= ((code >> first) % (1 << num_bits)) << bit
    return row


def read_codes(packed: np.ndarray, fmt: QuantFormat) -> np.ndarray:
    """Codes [..., K] of packed bytes, by the same table."""
    num_columns = packed.shape[-1] * 8 // fmt.bits
    pieces = np.array(locations(fmt, num_columns))  # [K, pieces, 4]
    codes = np.zeros((*packed.shape[:-1], num_columns), np.int64)
    for byte, bit, num_bits, first in pieces.transpose(1, 2, 0):
        codes |= (packed[..., byte].astype(np.int64) >> bit) % (1 << num_bits) << first
    return codes


def read_parameters(array: QuantArray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points [..., G] in float64, as the docstring of QuantArray has them."""
    scales = np.asarray(array.scales, np.float64)
    if array.zeros is None:
        zeros = np.full(scales.shape, 2.0 ** (array.format.bits - 1))
    else:
        zeros = np.asarray(array.zeros, np.float64)
    if array.nested is None:
        return scales, zeros
    nested = np.asarray(array.nested, np.float64)
    share = scales.shape[-1] // nested.shape[-2]
    nested = np.repeat(nested, share, axis=-2)
    scales = scales * nested[..., 0] + nested[..., 1]
    return scales, zeros if array.zeros is None else zeros * nested[..., 2] + nested[..., 3]


def reference_dequantize(array: QuantArray) -> np.ndarray:
    """The weights in float64, from the stored bytes."""
    scales, zeros = (np.repeat(p, array.format.group_size, axis=-1) for p in read_parameters(array))
    return (read_codes(np.asarray(array.codes), array.format) - zeros) * scales


def by_group(values: np.ndarray, fmt: QuantFormat) -> np.ndarray:
    """[..., K] as [..., G, Q]."""
    return values.reshape(*values.shape[:-1], -1, fmt.group_size)


def nmse(got: np.ndarray | jax.Array, expected: np.ndarray) -> float:
    error = np.asarray(got, np.float64) - expected
    return float(np.sum(error**2) / np.sum(np.square(expected, dtype=np.float64)))


def random_parts(
    fmt: Format, shape: tuple[int, int], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """The arrays of a matrix of random codes, scales and zero points."""
    if not isinstance(fmt, QuantFormat):
        return {"values": generator.normal(size=shape).astype(jnp.dtype(fmt.dtype))}
    parts = {}
    scale = shape[1] ** -0.5 / (1 << fmt.bits)
    # Largest code of 255 and smallest value of scales, then of zero points.
    steps = np.array([3 * scale / 255, scale, fmt.max_code / 255, 0])
    for name, part in fmt.parts(*shape).items():
        random = generator.uniform(size=part.shape)
        if name == "nested":
            values = steps[: part.shape[-1]] * (1 + random)
        elif part.dtype == "uint8":
            values = random * 256
        else:
            values = random * (fmt.max_code if name == "zeros" else 4 * scale)
        parts[name] = values.astype(jnp.dtype(part.dtype))
    return parts


def random_expert_blobs(
    layout: ExpertLayout, num_experts: int, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Blobs of random experts, and the weights that they stand for.

    Returns:
      [num_experts, num_items], and by matrix [num_experts, outputs, inputs] in float64.
    """
    generator = np.random.default_rng(seed)
    blobs = aligned_empty((num_experts, layout.num_bytes), np.uint8)
    blobs[:] = 0xFF  # what lies between the parts must not matter
    weights: dict[str, list[np.ndarray]] = {matrix: [] for matrix in MATRICES}
    for blob in blobs:
        for matrix, views in layout.host_views(blob).items():
            fmt = layout.format(matrix)
            parts = random_parts(fmt, layout.matrix_shape(matrix), generator)
            for name, view in views.items():
                view[...] = parts[name]
            if isinstance(fmt, QuantFormat):
                weights[matrix].append(reference_dequantize(from_parts(parts, fmt)))
            else:
                weights[matrix].append(parts["values"].astype(np.float64))
    return blobs.view(layout.dtype), {name: np.stack(ws) for name, ws in weights.items()}
