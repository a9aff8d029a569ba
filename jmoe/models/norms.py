"""Normalisations, chosen by NormConfig.kind."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jmoe.config import NormConfig
from jmoe.models.weights import parameter


def rms_norm(
    x: Float[Array, "*rows D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
    """Root-mean-square normalisation in float32, rounded to the dtype of x before scaling.

    Source: https://arxiv.org/abs/1910.07467; the rounding order is Mixtral's.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale_D * x32.astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, config: NormConfig, size: int, dtype: str):
        self.eps = config.eps
        self.scale = parameter((size,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


NORMS = {"rms": RMSNorm}
