"""Which parts of a model the host kernels compute, and how exactly.

Static in programs: a model is built with a ``HostKernels``, or with None, which leaves everything
to XLA.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jmoe.errors import ConfigError
from jmoe.quant.formats import BF16, DenseFormat, Format, QuantFormat
from jmoe.quant.quant_array import QuantArray

ActivationBits = Literal[8, 16, 24]
DEFAULT_ACTIVATION_BITS: ActivationBits = 8

# XLA's products of plain matrices are faster from so many rows on: it has instructions for
# bfloat16, and a library for float32.
MAX_DENSE_ROWS = 64

# Of three bits, a group's third bits would be less than a lane of the vectors.
_MIN_GROUP_SIZE_3_BITS = 32


def supports(fmt: Format) -> bool:
    """Whether there is a kernel for weights in this format."""
    if isinstance(fmt, DenseFormat):
        return True
    return fmt.bits != 3 or fmt.group_size >= _MIN_GROUP_SIZE_3_BITS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostKernels:
    """How the host kernels are used.

    Attributes:
      activation_bits: fixed-point bits of activations that meet weights in few bits: 24 is as
        exact as float32, 8 the fastest (``native.ops`` states the errors). With a scale for every
        group of weights, 8 changed the perplexity of a 4-bit model by less than 0.02 %
        (docs/measurements/host-kernels.md).
      num_threads: at most so many; 0 takes all that XLA has.
    """

    activation_bits: ActivationBits = DEFAULT_ACTIVATION_BITS
    num_threads: int = 0

    def __post_init__(self):
        if self.activation_bits not in get_args(ActivationBits):
            raise ConfigError(
                "activations have another number of bits",
                got=self.activation_bits,
                expected="8, 16 or 24",
            )
        if self.num_threads < 0:
            raise ConfigError("the number of threads is negative", got=self.num_threads)

    def takes(self, w: jax.Array | QuantArray, num_rows: int) -> bool:
        """Whether to multiply so many rows by a weight with a kernel."""
        if isinstance(w, QuantArray):
            return supports(w.format)
        return w.dtype in (jnp.float32, jnp.bfloat16) and num_rows <= MAX_DENSE_ROWS

    def takes_experts(self, formats: Sequence[Format], rows_per_expert: int) -> bool:
        """Whether to compute experts, of which each has about so many tokens, with kernels."""
        is_bfloat16 = BF16 in formats
        return all(map(supports, formats)) and not (
            is_bfloat16 and rows_per_expert > MAX_DENSE_ROWS
        )


def uncovered(formats: tuple[Format, ...]) -> tuple[QuantFormat, ...]:
    """Those formats that XLA computes in spite of the kernels."""
    return tuple(
        dict.fromkeys(f for f in formats if isinstance(f, QuantFormat) and not supports(f))
    )
