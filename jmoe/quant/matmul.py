"""Products with matrices in few bits: dequantized as they are read, or just before.

Which form is good depends on the number of rows of x and on the backend; ``linear_quant``
chooses. All of them accumulate and return float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.quant.packing import planes
from jmoe.quant.quant_array import QuantArray, dequantize, scales_and_zeros

# A multiply-reduce for every row: XLA:GPU makes one kernel of it, which reads packed codes and
# writes nothing but the result.
MAX_REDUCE_ROWS = 4


def precision(x: jax.Array) -> lax.Precision:
    """Of products with x: by default XLA takes float32 as TF32 on a GPU, as bfloat16 on a TPU."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def dot(x: Float[Array, "*rows K"], w_NK: Float[Array, "N K"]) -> Float[Array, "*rows N"]:
    """x @ w.T for a weight of the dtype of x."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w_NK, contract_last, precision=precision(x), preferred_element_type=jnp.float32
    )


def linear_quant(x_RK: Float[Array, "R K"], w: QuantArray) -> Float[Array, "R N"]:
    """x @ w.T on an accelerator: multiply-reduce for few rows, else dequantize and dot."""
    if x_RK.shape[0] <= MAX_REDUCE_ROWS:
        return reduce_product(x_RK, w)
    return dot(x_RK, dequantize(w).astype(x_RK.dtype))


def reduce_product(x_RK: Float[Array, "R K"], w: QuantArray) -> Float[Array, "R N"]:
    """One multiply and sum over packed codes per row of x, in float32."""
    return jnp.stack([_reduce_row(x_K, w) for x_K in x_RK])


def _reduce_row(x_K: jax.Array, w: QuantArray) -> jax.Array:
    size = w.format.group_size
    scales_NG, zeros_NG = scales_and_zeros(w)
    num_rows, num_groups = scales_NG.shape
    x = x_K.astype(jnp.float32)
    # Sum of code * x over each group, plane by plane and field by field, so that a byte is
    # read once.
    total, offset = 0.0, 0
    for bits, first in planes(w.format):
        num_fields = 8 // bits
        width = size // num_fields
        packed = w.codes[:, offset : offset + num_groups * width]
        packed = packed.reshape(num_rows, num_groups, width)
        offset += num_groups * width
        x_fields = x.reshape(num_groups, num_fields, width) * (1 << first)
        products = 0.0
        for i in range(num_fields):
            field = (packed >> (i * bits)) & ((1 << bits) - 1)
            products += field.astype(jnp.float32) * x_fields[None, :, i]
        total += jnp.sum(products * scales_NG[..., None], axis=(1, 2))
    offsets = zeros_NG * scales_NG * jnp.sum(x.reshape(num_groups, size), axis=-1)
    return total - jnp.sum(offsets, axis=-1)
