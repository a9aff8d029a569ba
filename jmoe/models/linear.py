"""The matrix products of the decoder: accumulated in float32, exact for float32 inputs."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

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


def linear_of_stack(
    x: Float[Array, "rows I"],
    w_NOI: Float[Array, "N O I"],
    index: Int[Array, ""],
    tile_bytes: int | None,
) -> Float[Array, "rows O"]:
    """Multiplies by one weight of a stack, like ``linear`` by ``w_NOI[index]``.

    XLA copies a matrix out of a stack before it multiplies. In tiles that stay in the
    processor's cache the copy costs little; whole, it is written to memory and read again.

    Args:
      x: activations.
      w_NOI: stacked weights, in the dtype of x.
      index: which weight.
      tile_bytes: size of a tile; None copies the matrix whole.
    """
    num_weights, num_outputs, num_inputs = w_NOI.shape
    row_bytes = num_inputs * w_NOI.dtype.itemsize
    if tile_bytes is None or num_outputs * row_bytes <= tile_bytes:
        return _product(x, w_NOI[index])
    # The largest power of two that divides the outputs and fits.
    tile_rows = min(
        num_outputs & -num_outputs, 1 << (max(1, tile_bytes // row_bytes).bit_length() - 1)
    )
    num_tiles = num_outputs // tile_rows
    tiles = w_NOI.reshape(num_weights * num_tiles, tile_rows, num_inputs)

    def one_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        out = _product(x, tiles[index * num_tiles + i])
        return lax.dynamic_update_slice(y, out, (0, i * tile_rows))

    y = jnp.zeros((x.shape[0], num_outputs), jnp.float32)
    return lax.fori_loop(0, num_tiles, one_tile, y)


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
