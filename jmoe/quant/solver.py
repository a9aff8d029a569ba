"""Choosing codes, scales and zero points: round-to-nearest, and HQQ.

Both start from the extremes of each group. HQQ then moves the zero point, by half-quadratic
splitting of a sparse (p < 1) norm of the error; it needs no data. Scales are rounded to their
stored form before anything depends on them, and codes are chosen last, with the stored scales
and zero points: what second-level quantization does to them is part of what is minimised.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models,
https://mobiusml.github.io/hqq_blog, as used by https://arxiv.org/abs/2312.17238.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.errors import ConfigError
from jmoe.quant.formats import QuantFormat
from jmoe.quant.packing import pack
from jmoe.quant.quant_array import QuantArray, scales_and_zeros

Method = Literal["rtn", "hqq"]
METHODS: tuple[Method, ...] = get_args(Method)

# Constants of the paper's code.
HQQ_NORM = 0.7
HQQ_BETA = 10.0
HQQ_BETA_GROWTH = 1.01
HQQ_ITERATIONS = 20


class Quantized(NamedTuple):
    """A quantized matrix, and whether all weights were finite; if not, the matrix is rubbish."""

    array: QuantArray
    finite: jax.Array


def check_method(method: str) -> None:
    """Raises ConfigError if there is no such method."""
    if method not in METHODS:
        raise ConfigError(
            "unknown quantization method", got=repr(method), expected=f"one of {', '.join(METHODS)}"
        )


@functools.partial(jax.jit, static_argnames=("fmt", "method"))
def quantize(w_NK: Float[Array, "*stack N K"], fmt: QuantFormat, method: Method) -> Quantized:
    """Quantizes matrices whose rows are a multiple of the group size.

    Rows do not depend on each other: a matrix may be quantized in pieces, bit for bit, unless
    they have but a few thousand weights (XLA adds those up in another order). In a symmetric
    format HQQ has no zero point to choose, and is round-to-nearest.

    Args:
      w_NK: weights of any float type.
      fmt: the format.
      method: "rtn" or "hqq".
    """
    *rows, num_columns = w_NK.shape
    w = w_NK.astype(jnp.float32).reshape(*rows, fmt.num_groups(num_columns), fmt.group_size)
    scales, zeros = _from_extremes(w, fmt)
    nested_group = fmt.nested_group(num_columns)
    scale_part, scale_steps = _store(scales, nested_group, fmt)
    nested = scale_steps
    array = QuantArray(
        codes=jnp.zeros((*rows, 0), jnp.uint8),
        scales=scale_part,
        zeros=None,
        nested=nested,
        format=fmt,
    )
    scales, _ = scales_and_zeros(array)
    zero_part = None
    if not fmt.symmetric:
        if method == "hqq":
            zeros = _hqq_zeros(w, scales, zeros, fmt)
        zero_part, zero_steps = _store(zeros, nested_group, fmt)
        if nested is not None and zero_steps is not None:
            nested = jnp.concatenate([nested, zero_steps], axis=-1)
    array = QuantArray(
        codes=array.codes, scales=scale_part, zeros=zero_part, nested=nested, format=fmt
    )
    scales, zeros = scales_and_zeros(array)
    zeros = zeros if isinstance(zeros, int) else zeros[..., None]
    codes = _codes(w, _inverse(scales)[..., None], zeros, fmt).astype(jnp.uint8)
    packed = pack(codes.reshape(w_NK.shape), fmt)
    array = QuantArray(codes=packed, scales=scale_part, zeros=zero_part, nested=nested, format=fmt)
    return Quantized(array, jnp.isfinite(w).all())


def _from_extremes(w: jax.Array, fmt: QuantFormat) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of each group; the scale is zero where all weights are."""
    if fmt.symmetric:
        scales = jnp.max(jnp.abs(w), axis=-1) / (fmt.symmetric_zero - 1)
        return scales, jnp.full_like(scales, fmt.symmetric_zero)
    low, high = jnp.min(w, axis=-1), jnp.max(w, axis=-1)
    # Widened until the zero point is at most one range away: second-level codes of the zero
    # points have one range for many groups, which one far off would spoil.
    low = jnp.where(low > 0, jnp.minimum(low, high / 2), low)
    high = jnp.where(high < 0, jnp.maximum(high, low / 2), high)
    scales = (high - low) / fmt.max_code
    return scales, -low * _inverse(scales)


def _inverse(scales: jax.Array) -> jax.Array:
    return jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)


def _codes(w: jax.Array, inverse: jax.Array, zeros: jax.Array | int, fmt: QuantFormat) -> jax.Array:
    return jnp.clip(jnp.round(w * inverse + zeros), 0, fmt.max_code)


def _store(
    values: jax.Array, nested_group: int, fmt: QuantFormat
) -> tuple[jax.Array, jax.Array | None]:
    """Values per group in the form in which they are stored, and their steps and offsets."""
    if not fmt.nested:
        return values.astype(jnp.bfloat16), None
    grouped = values.reshape(*values.shape[:-1], -1, nested_group)
    offset = jnp.min(grouped, axis=-1)
    step = (jnp.max(grouped, axis=-1) - offset) / 255
    codes = jnp.round((grouped - offset[..., None]) * _inverse(step)[..., None])
    codes = jnp.clip(codes, 0, 255).astype(jnp.uint8)
    return codes.reshape(values.shape), jnp.stack([step, offset], axis=-1)


def _hqq_zeros(w: jax.Array, scales: jax.Array, zeros: jax.Array, fmt: QuantFormat) -> jax.Array:
    """The best of the zero points that the iteration visits, group by group.

    Best is the least squared error weighted by the square of the weight. The paper's code
    keeps the last zero point; least absolute error, its measure of convergence, gave the
    embedded model a higher perplexity than round-to-nearest at 4 and 3 bits: errors of large
    weights matter more.
    """
    inverse, scales = _inverse(scales)[..., None], scales[..., None]
    importance = jnp.square(w)

    def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        zeros, best_zeros, best_error, beta = carry
        codes = _codes(w, inverse, zeros[..., None], fmt)
        error = w - (codes - zeros[..., None]) * scales
        weighted = jnp.sum(importance * jnp.square(error), axis=-1)
        better = weighted < best_error
        best_zeros = jnp.where(better, zeros, best_zeros)
        best_error = jnp.where(better, weighted, best_error)
        # The proximal operator of the p-norm is zero below a threshold. Few models have errors
        # above it, and the power costs more than all the rest.
        largest = jnp.max(jnp.abs(error), initial=0.0)
        sparse_mean = lax.cond(
            largest > beta ** (-1 / (2 - HQQ_NORM)),
            lambda: jnp.mean(_shrink(error, beta) * inverse, axis=-1),
            lambda: jnp.zeros_like(zeros),
        )
        zeros = jnp.mean(codes - w * inverse, axis=-1) + sparse_mean
        return zeros, best_zeros, best_error, beta * HQQ_BETA_GROWTH

    start = (zeros, zeros, jnp.full_like(zeros, jnp.inf), jnp.float32(HQQ_BETA))
    _, best_zeros, _, _ = lax.fori_loop(0, HQQ_ITERATIONS + 1, step, start)
    return best_zeros


def _shrink(error: jax.Array, beta: jax.Array) -> jax.Array:
    magnitude = jnp.abs(error)
    power = jnp.exp((HQQ_NORM - 1) * jnp.log(jnp.maximum(magnitude, 1e-30)))
    return jnp.sign(error) * jnp.maximum(magnitude - power / beta, 0)
