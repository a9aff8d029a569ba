"""Choosing codes, scales and zero points: round-to-nearest, and HQQ.

Both start from the extremes of each group. HQQ then moves the zero point (quant/hqq.py). Scales
are rounded to their stored form before anything depends on them, and codes are chosen last, with
the stored scales and zero points: what second-level quantization does to them is part of what is
minimised.

The stages are programs of their own. In one program XLA:CPU computes the parameters of a group
again for each of its weights, and a code again for each bit plane: seven times slower.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jmoe.errors import ConfigError
from jmoe.quant.formats import QuantFormat
from jmoe.quant.hqq import best_zeros
from jmoe.quant.packing import pack
from jmoe.quant.quant_array import QuantArray, scales_and_zeros

Method = Literal["rtn", "hqq"]
METHODS: tuple[Method, ...] = get_args(Method)


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


def quantize(w_NK: Float[Array, "*stack N K"], fmt: QuantFormat, method: Method) -> Quantized:
    """Quantizes matrices whose rows are a multiple of the group size.

    Rows do not depend on each other: a matrix may be quantized in pieces, bit for bit, unless
    they have but a few thousand weights (XLA adds those up in another order). In a symmetric
    format HQQ has no zero point to choose, and is round-to-nearest.

    Args:
      w_NK: weights of any float type.
      fmt: the format.
      method: "rtn" or "hqq".

    Raises:
      ConfigError: the group size does not divide the rows.
    """
    w = jnp.asarray(w_NK)
    low, high, finite = _extremes(w, fmt)
    scale_part, nested, scales, zeros = _choose_scales(low, high, fmt)
    zero_part = None
    if not fmt.symmetric:
        if method == "hqq":
            zeros = best_zeros(w, scales, zeros, fmt)
        zero_part, nested, zeros = _store_zeros(zeros, scale_part, nested, fmt)
    codes = _choose_codes(w, scales, zeros, fmt)
    array = QuantArray(
        codes=_pack(codes, fmt), scales=scale_part, zeros=zero_part, nested=nested, format=fmt
    )
    return Quantized(array, finite)


_stage = functools.partial(jax.jit, static_argnames=("fmt",))


def _grouped(w: jax.Array, fmt: QuantFormat) -> jax.Array:
    """[..., N, K] to float32 [..., N, G, Q]."""
    *rows, num_columns = w.shape
    return w.astype(jnp.float32).reshape(*rows, fmt.num_groups(num_columns), fmt.group_size)


@_stage
def _extremes(w: jax.Array, fmt: QuantFormat) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The smallest and the largest weight of each group, and whether all weights are finite."""
    groups = _grouped(w, fmt)
    # XLA:CPU's minima lose a NaN. Zero times anything but a finite number is NaN.
    nothing = jnp.sum(groups * 0, axis=-1)
    return jnp.min(groups, axis=-1), jnp.max(groups, axis=-1), jnp.all(nothing == 0)


@_stage
def _choose_scales(
    low: jax.Array, high: jax.Array, fmt: QuantFormat
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Scales of the groups [..., N, G] as they are stored, and zero points that go with them.

    The scale is zero where all weights are.

    Returns:
      The array of scales, their second-level parameters if nested, what both stand for, and
      zero points.
    """
    if fmt.symmetric:
        scales = jnp.maximum(-low, high) / (fmt.symmetric_zero - 1)
        zeros = jnp.full_like(scales, fmt.symmetric_zero)
    else:
        # Widened until the zero point is at most one range away: second-level codes of the zero
        # points have one range for many groups, which one far off would spoil.
        low = jnp.where(low > 0, jnp.minimum(low, high / 2), low)
        high = jnp.where(high < 0, jnp.maximum(high, low / 2), high)
        scales = (high - low) / fmt.max_code
        zeros = -low * _inverse(scales)
    # A backend may or may not keep numbers below this; no model's weights are.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)
    part, steps = _store(scales, fmt)
    if fmt.nested:
        # Beside a group of zeros, a small scale must not become one of them.
        stored, _ = _read(part, None, steps, fmt)
        part = jnp.where((stored == 0) & (scales > 0), jnp.uint8(1), part)
    stored, _ = _read(part, None, steps, fmt)
    return part, steps, stored, zeros


@_stage
def _store_zeros(
    zeros: jax.Array, scale_part: jax.Array, scale_steps: jax.Array | None, fmt: QuantFormat
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The array of zero points, all second-level parameters, and the zero points stored."""
    part, steps = _store(zeros, fmt)
    nested = None
    if scale_steps is not None and steps is not None:
        nested = jnp.concatenate([scale_steps, steps], axis=-1)
    _, stored = _read(scale_part, part, nested, fmt)
    return part, nested, jnp.asarray(stored)


@_stage
def _choose_codes(
    w: jax.Array, scales: jax.Array, zeros: jax.Array, fmt: QuantFormat
) -> UInt8[Array, "*stack N K"]:
    codes = _grouped(w, fmt) * _inverse(scales)[..., None] + zeros[..., None]
    return jnp.clip(jnp.round(codes), 0, fmt.max_code).astype(jnp.uint8).reshape(w.shape)


_pack = _stage(pack)


def _inverse(scales: jax.Array) -> jax.Array:
    return jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)


def _store(values: jax.Array, fmt: QuantFormat) -> tuple[jax.Array, jax.Array | None]:
    """Values per group in the form in which they are stored, and their steps and offsets."""
    if not fmt.nested:
        return values.astype(jnp.bfloat16), None
    *rows, num_groups = values.shape
    grouped = values.reshape(*rows, -1, fmt.nested_group(num_groups * fmt.group_size))
    offset = jnp.min(grouped, axis=-1)
    step = (jnp.max(grouped, axis=-1) - offset) / 255
    codes = jnp.round((grouped - offset[..., None]) * _inverse(step)[..., None])
    codes = jnp.clip(codes, 0, 255).astype(jnp.uint8)
    return codes.reshape(values.shape), jnp.stack([step, offset], axis=-1)


def _read(
    scales: jax.Array, zeros: jax.Array | None, nested: jax.Array | None, fmt: QuantFormat
) -> tuple[jax.Array, jax.Array | int]:
    """Scales and zero points as a reader of the stored arrays finds them."""
    no_codes = jnp.zeros((*scales.shape[:-1], 0), jnp.uint8)
    return scales_and_zeros(
        QuantArray(codes=no_codes, scales=scales, zeros=zeros, nested=nested, format=fmt)
    )
