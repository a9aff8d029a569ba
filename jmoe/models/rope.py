"""Rotary position embedding, chosen by RopeConfig.kind.

Source: https://arxiv.org/abs/2104.09864, in the half-split layout of Hugging Face: element i
of a head is rotated together with element i + P/2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe.config import RopeConfig


def default_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angles per position of each pair: theta^(-2i/P), float32 [P/2]."""
    # Not numpy's float32 power: it is off by up to two units in the last place, on some machines
    # only, and at position 32768 that turns a pair by up to 0.004 too much.
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim).astype(np.float64)
    return 1.0 / (config.theta**exponents).astype(np.float32)


FREQUENCIES = {"default": default_frequencies}


def rotation(
    positions_BL: Int[Array, "B L"], config: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
    """Cosine and sine of every position's angles, float32."""
    frequencies = FREQUENCIES[config.kind](config, head_dim)
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BLHP: Float[Array, "B L H P"],
    cos: Float[Array, "B L half"],
    sin: Float[Array, "B L half"],
) -> Float[Array, "B L H P"]:
    """Rotates queries or keys to their positions; computed in float32, dtype kept."""
    first, second = jnp.split(x_BLHP.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BLHP.dtype)
