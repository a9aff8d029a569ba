"""The matrix products of the decoder: accumulated in float32, exact for float32 inputs."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# XLA:CPU converts the whole of a bfloat16 weight to float32 for every product with fewer rows.
MIN_ROWS_BFLOAT16_CPU = 4


def linear(x: Float[Array, "*rows I"], w_OI: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    """Multiplies rows of x by a weight stored [out, in], as checkpoints store it.

    Contracting the last dimension of both is what XLA:GPU turns into one kernel for a
    single row; the transposed layout is not.

    Args:
      x: activations.
      w_OI: weight, in the dtype of x.

    Returns:
      x @ w.T, accumulated and returned in float32 for every input dtype: callers round once,
      where they mean to, and XLA:CPU has a fast path for bfloat16 only with a float32 result.
    """
    num_rows = math.prod(x.shape[:-1])
    if x.dtype == jnp.bfloat16 and num_rows < MIN_ROWS_BFLOAT16_CPU:
        return lax.platform_dependent(x, w_OI, cpu=_padded_product, default=_product)
    return _product(x, w_OI)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two operands with the same accumulation and precision as ``linear``."""
    return jnp.einsum(spec, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(x: jax.Array) -> lax.Precision:
    # By default float32 is multiplied in TF32 on a GPU and in bfloat16 on a TPU.
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def _product(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    return lax.dot_general(
        x,
        w_OI,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=_precision(x),
        preferred_element_type=jnp.float32,
    )


def _padded_product(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    padding = ((0, MIN_ROWS_BFLOAT16_CPU - rows.shape[0]), (0, 0))
    product = _product(jnp.pad(rows, padding), w_OI)[: rows.shape[0]]
    return product.reshape(*x.shape[:-1], -1)
