"""Where the three matrices of an expert lie in its blob: one contiguous run of bytes.

One blob per expert is what a file holds, what one transfer moves, what the host kernels and
the programs read. Codes of w1, w3 and w2 come first, then their scales, zero points and
second-level parameters, each part at a multiple of 64 bytes: a cache line, and the width of
the widest vector.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmoe.quant.formats import DenseFormat, Format, Part
from jmoe.quant.quant_array import PART_NAMES, QuantArray, from_parts
from jmoe.quant.spec import QuantSpec

ALIGNMENT = 64

MatrixName = Literal["w1", "w3", "w2"]
MATRICES: tuple[MatrixName, ...] = ("w1", "w3", "w2")


class PlacedPart(NamedTuple):
    """An array of a matrix, and its first byte in the blob."""

    part: Part
    offset: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """The blob of an expert with SwiGLU matrices w1 (gate), w3 (up) [F, D] and w2 (down) [D, F].

    Attributes:
      hidden_size: D.
      intermediate_size: F.
      formats: of w1, w3 and w2; all quantized, or all of one float type.
    """

    hidden_size: int
    intermediate_size: int
    formats: tuple[Format, Format, Format]

    @classmethod
    def of(cls, hidden_size: int, intermediate_size: int, spec: QuantSpec) -> "ExpertLayout":
        """The layout of an expert in the formats of a spec.

        Raises:
          ConfigError: a group size does not divide the rows.
        """
        layout = cls(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            formats=spec.experts_formats,
        )
        _place(layout)  # which raises
        return layout

    @property
    def num_bytes(self) -> int:
        """Of a blob, padding included: a multiple of 64."""
        return _place(self)[1]

    @property
    def dtype(self) -> str:
        """Of the array that holds blobs: uint8, or the float type of dense experts."""
        fmt = self.formats[0]
        return fmt.dtype if isinstance(fmt, DenseFormat) else "uint8"

    @property
    def num_items(self) -> int:
        """Of a blob, in items of ``dtype``."""
        return self.num_bytes // jnp.dtype(self.dtype).itemsize

    def format(self, matrix: MatrixName) -> Format:
        return self.formats[MATRICES.index(matrix)]

    def matrix_shape(self, matrix: MatrixName) -> tuple[int, int]:
        """[outputs, inputs]."""
        hidden, width = self.hidden_size, self.intermediate_size
        return (hidden, width) if matrix == "w2" else (width, hidden)

    def parts(self, matrix: MatrixName) -> Mapping[str, PlacedPart]:
        """The arrays of a matrix by name: those of QuantArray, or "values" if it is dense."""
        return _place(self)[0][matrix]

    def host_views(self, blob: np.ndarray) -> dict[MatrixName, dict[str, np.ndarray]]:
        """A blob's arrays, as views to read or to fill: uint8 [num_bytes], aligned to 64."""
        assert blob.dtype == np.uint8 and blob.shape == (self.num_bytes,)

        def view(placed: PlacedPart) -> np.ndarray:
            part, offset = placed
            return blob[offset : offset + part.num_bytes].view(part.dtype).reshape(part.shape)

        return {
            matrix: {name: view(placed) for name, placed in self.parts(matrix).items()}
            for matrix in MATRICES
        }


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
    """Uninitialised, starting at a multiple of 64: XLA:CPU takes such an array without a copy."""
    dtype = jnp.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + num_bytes].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether XLA:CPU takes it without a copy."""
    return array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous


def aligned_as(array: np.ndarray, dtype: np.dtype | type | str) -> np.ndarray:
    """An aligned array of this type; the same one if it is of this type already."""
    if array.dtype == jnp.dtype(dtype):
        return array
    converted = aligned_empty(array.shape, dtype)
    converted[...] = array
    return converted


@functools.lru_cache(maxsize=32)
def _place(layout: ExpertLayout) -> tuple[dict[MatrixName, dict[str, PlacedPart]], int]:
    """Places every part; returns them by matrix, and the size of the blob."""
    parts = {
        matrix: layout.format(matrix).parts(*layout.matrix_shape(matrix)) for matrix in MATRICES
    }
    placed: dict[MatrixName, dict[str, PlacedPart]] = {matrix: {} for matrix in MATRICES}
    offset = 0
    for name in ("values", *PART_NAMES):
        for matrix in MATRICES:
            if name in parts[matrix]:
                placed[matrix][name] = PlacedPart(parts[matrix][name], offset)
                offset += -(-parts[matrix][name].num_bytes // ALIGNMENT) * ALIGNMENT
    return placed, offset


def read_rows(
    blobs: jax.Array,
    layout: ExpertLayout,
    matrix: MatrixName,
    expert: jax.Array | int,
    first_row: jax.Array | int,
    num_rows: int,
) -> QuantArray | jax.Array:
    """Rows of one expert's matrix, read out of stacked blobs inside a program.

    Every part is a slice of the stack at a static offset, never of a whole blob, so that
    nothing but what is used needs to be read.

    Args:
      blobs: [E, num_items] of the layout's dtype.
      layout: of each blob.
      matrix: "w1", "w3" or "w2".
      expert: index of the blob.
      first_row: first output.
      num_rows: how many outputs.

    Returns:
      [num_rows, inputs]: a QuantArray, or an array of the layout's dtype.
    """
    item_bytes = jnp.dtype(layout.dtype).itemsize

    def read(placed: PlacedPart) -> jax.Array:
        (_, *columns), dtype = placed.part
        row_bytes = placed.part.num_bytes // placed.part.shape[0]
        row_items = row_bytes // item_bytes
        start = placed.offset // item_bytes + first_row * row_items
        run = lax.dynamic_slice(blobs, (expert, start), (1, num_rows * row_items))
        if dtype == layout.dtype:
            return run.reshape(num_rows, *columns)
        width = jnp.dtype(dtype).itemsize
        return lax.bitcast_convert_type(run.reshape(num_rows, *columns, width), jnp.dtype(dtype))

    parts = {name: read(placed) for name, placed in layout.parts(matrix).items()}
    fmt = layout.format(matrix)
    return parts["values"] if isinstance(fmt, DenseFormat) else from_parts(parts, fmt)
