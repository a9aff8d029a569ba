"""A matrix, or a stack of them, in few bits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jmoe.quant.formats import QuantFormat
from jmoe.quant.packing import unpack

# Names of the arrays, in the order in which they lie in files and blobs.
PART_NAMES = ("codes", "scales", "zeros", "nested")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantArray:
    """Weights [*stack, N, K] as packed codes with a scale and a zero point per group.

    A pytree of arrays (jax or numpy, or ShapeDtypeStruct) with a static format. Invariants,
    checked by ``validate``; G = K / group_size groups of a row:

    * codes: uint8 [*stack, N, K * bits / 8], packed as ``packing`` says.
    * scales: bfloat16 [*stack, N, G], or uint8 codes of them if the format is nested.
    * zeros: zero points, of the same shape and dtype; None if the format is symmetric.
    * nested: float32 [*stack, N, G2, 4], where G2 divides G: step and offset of the scales'
      codes, then step and offset of the zero points' (absent if symmetric: [..., 2]); a
      value is code * step + offset. None if the format is not nested.
    * all arrays have the same leading dimensions.
    """

    codes: UInt8[Array, "*stack N bytes"]
    scales: jax.Array
    zeros: jax.Array | None
    nested: jax.Array | None
    format: QuantFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [*stack, N, K]."""
        *stack, num_bytes = self.codes.shape
        return (*stack, num_bytes * 8 // self.format.bits)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, jax.Array]:
        """The arrays that there are, by name, in the order of ``PART_NAMES``."""
        arrays = {name: getattr(self, name) for name in PART_NAMES}
        return {name: array for name, array in arrays.items() if array is not None}

    def __getitem__(self, index: object) -> "QuantArray":
        """Selects along the leading dimensions: matrices of a stack, rows of a matrix."""
        return jax.tree.map(lambda part: part[index], self)


def from_parts(parts: Mapping[str, Any], fmt: QuantFormat) -> QuantArray:
    """Puts a QuantArray together from the arrays that its format has, by name."""
    assert parts.keys() <= set(PART_NAMES)
    return QuantArray(
        codes=parts["codes"],
        scales=parts["scales"],
        zeros=parts.get("zeros"),
        nested=parts.get("nested"),
        format=fmt,
    )


def validate(array: QuantArray) -> None:
    """Checks every invariant of QuantArray.

    Raises:
      ValueError: naming the first one that does not hold.
      ConfigError: the group size does not divide the rows.
    """
    if len(array.codes.shape) < 2:
        raise ValueError(f"codes have the shape {list(array.codes.shape)}, not [..., N, bytes]")
    *stack, num_rows, num_columns = array.shape
    expected = array.format.parts(num_rows, num_columns)
    for name in PART_NAMES:
        part, wanted = getattr(array, name), expected.get(name)
        if (part is None) != (wanted is None):
            verb = "lacks" if part is None else "has"
            raise ValueError(f"a QuantArray of format {array.format} {verb} {name}")
        if part is None or wanted is None:
            continue
        shape = (*stack, *wanted.shape)
        if tuple(part.shape) != shape or np.dtype(part.dtype) != np.dtype(wanted.dtype):
            raise ValueError(
                f"{name}: {part.dtype} {list(part.shape)} instead of {wanted.dtype} {list(shape)}"
            )


def scales_and_zeros(
    array: QuantArray,
) -> tuple[Float[Array, "*stack N G"], Float[Array, "*stack N G"] | int]:
    """Scale and zero point of every group in float32; the latter an int if symmetric."""
    fmt = array.format
    nested = array.nested

    def decode(codes: jax.Array, first: int) -> jax.Array:
        if nested is None:
            return codes.astype(jnp.float32)
        *stack, num_groups = codes.shape
        grouped = codes.reshape(*stack, nested.shape[-2], -1).astype(jnp.float32)
        values = grouped * nested[..., first, None] + nested[..., first + 1, None]
        return values.reshape(*stack, num_groups)

    scales = decode(array.scales, 0)
    return scales, fmt.symmetric_zero if array.zeros is None else decode(array.zeros, 2)


def dequantize(array: QuantArray) -> Float[Array, "*stack N K"]:
    """The weights in float32: (code - zero point) * scale."""
    scales, zeros = scales_and_zeros(array)
    codes = unpack(array.codes, array.format)
    grouped = codes.reshape(*scales.shape, array.format.group_size).astype(jnp.float32)
    zeros = zeros if isinstance(zeros, int) else zeros[..., None]
    return ((grouped - zeros) * scales[..., None]).reshape(codes.shape)
