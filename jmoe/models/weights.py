"""Parameters of modules: shapes first, values later.

A module declares shapes only; values come as a flat tuple of arrays when a program is traced
(``decoder.rebuild``). So describing a model of any size allocates nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.quant.formats import Format, QuantFormat
from jmoe.quant.quant_array import PART_NAMES, QuantArray, from_parts
from jmoe.quant.spec import QuantSpec


def parameter(shape: tuple[int, ...], dtype: str) -> nnx.Param:
    """An array of this shape, to be filled in."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


class QuantWeight(nnx.Module):
    """A quantized matrix: its arrays as parameters. ``weight[...]`` is a QuantArray."""

    def __init__(self, shape: tuple[int, int], fmt: QuantFormat):
        self.format = fmt
        for name, part in fmt.parts(*shape).items():
            setattr(self, name, parameter(part.shape, part.dtype))

    def __getitem__(self, index: object) -> QuantArray:
        parts = {name: getattr(self, name)[index] for name in PART_NAMES if hasattr(self, name)}
        return from_parts(parts, self.format)


def component_format(path: str, quant: QuantSpec) -> Format | None:
    """The format of a matrix outside of the experts; None if it is never quantized.

    Args:
      path: of the matrix, as in ``decoder.abstract_parameters`` without quantization.
      quant: the formats.
    """
    if path == "embed_tokens":
        return quant.embeddings
    if path == "lm_head":
        return quant.head
    return quant.attention if ".attention." in path else None


def matrix(shape: tuple[int, int], fmt: Format | None, dtype: str) -> nnx.Param | QuantWeight:
    """A weight [outputs, inputs]: quantized, or an array of the model's dtype."""
    if isinstance(fmt, QuantFormat):
        return QuantWeight(shape, fmt)
    return parameter(shape, dtype)
