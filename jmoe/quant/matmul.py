"""Products with matrices in few bits: dequantized as they are read, or a tile at a time.

Which form is good depends on the number of rows of x and on the backend. There are two, chosen by
compiling for an H100 and reading what each writes to memory (tests/hlo). Both accumulate and
return float32.

* ``reduce_product``: multiply and sum. XLA:GPU makes one kernel of it, which reads the packed
  codes and writes nothing but the result. For up to MAX_REDUCE_ROWS rows of x.
* ``dequantized_product``: a copy of the weights in the dtype of x, and a dot. XLA writes the copy
  to memory, so ``models.linear`` hands it tiles that stay in a cache.

What XLA:GPU fuses into dots (codes of 8 bits, scales after the product) is not used: out of a blob
it copies the codes first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jmoe.quant.packing import planes, unpack
from jmoe.quant.quant_array import QuantArray, scales_and_zeros

MAX_REDUCE_ROWS = 4

# A float32 with these bits is 2^23, and its last bit is worth one: integers below that become
# float32 by an OR and a subtraction, which is less work on a GPU than a conversion.
_BITS_OF_2_23 = np.uint32(0x4B000000)
_2_23 = np.float32(2**23)
# Bytes of a group that one element of the sum takes together.
_UNIT_BYTES = 4


def precision(x: jax.Array) -> lax.Precision:
    """Of products with x: by default XLA takes float32 as TF32 on a GPU, as bfloat16 on a TPU."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def dot(x: Float[Array, "*rows K"], w_NK: Float[Array, "N K"]) -> Float[Array, "*rows N"]:
    """x @ w.T for a weight of the dtype of x."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w_NK, contract_last, precision=precision(x), preferred_element_type=jnp.float32
    )


def dequantized_product(x_RK: Float[Array, "R K"], w: QuantArray) -> Float[Array, "R N"]:
    """x @ w.T through a copy of w in the dtype of x."""
    if w.format.bits in (2, 4):
        return lax.platform_dependent(x_RK, w, cpu=_in_order, default=_in_byte_order)
    return _in_order(x_RK, w)


def _in_order(x_RK: jax.Array, w: QuantArray) -> jax.Array:
    return dot(x_RK, _weights(unpack(w.codes, w.format), w, x_RK.dtype))


def _in_byte_order(x_RK: jax.Array, w: QuantArray) -> jax.Array:
    """With the columns of codes that share a byte side by side.

    XLA:GPU then reads a byte once, and needs 48 instead of 66 instructions for four weights of
    4 bits. On a CPU the same takes up to three times as long.
    """
    num_fields = 8 // w.format.bits
    shifts = jnp.arange(num_fields, dtype=jnp.uint8) * jnp.uint8(w.format.bits)
    codes = (w.codes[..., None] >> shifts) & jnp.uint8(w.format.max_code)
    fields = x_RK.reshape(x_RK.shape[0], -1, num_fields, w.format.group_size // num_fields)
    # As an array of its own: else XLA may bring the weights into the order of x instead.
    x = lax.optimization_barrier(jnp.swapaxes(fields, 2, 3).reshape(x_RK.shape))
    return dot(x, _weights(codes, w, x.dtype))


def _weights(codes: jax.Array, w: QuantArray, dtype: jnp.dtype) -> jax.Array:
    """[N, K] of unpacked codes, in their order within groups."""
    scales_NG, zeros = scales_and_zeros(w)
    if w.format.nested:
        # As arrays of their own: else XLA decodes them again for every weight.
        scales_NG = lax.optimization_barrier(scales_NG)
        zeros = zeros if isinstance(zeros, int) else lax.optimization_barrier(zeros)
    zeros = zeros if isinstance(zeros, int) else zeros[..., None]
    grouped = codes.reshape(*scales_NG.shape, -1).astype(jnp.float32)
    return ((grouped - zeros) * scales_NG[..., None]).astype(dtype).reshape(len(scales_NG), -1)


def reduce_product(
    x_RK: Float[Array, "R K"], w: QuantArray, *, of_stack: bool = False
) -> Float[Array, "R N"]:
    """x @ w.T as a multiply and sum over packed codes for every row of x.

    Args:
      x_RK: few rows.
      w: the weights.
      of_stack: whether they are a slice of a larger array. For several rows XLA:GPU then copies
        the codes in front of the form that does the least arithmetic; another form reads
        them in place.
    """
    in_place = x_RK.shape[0] > 1 and of_stack and w.format.bits != 3
    return _reduce_bytes(x_RK, w) if in_place else _reduce_units(x_RK, w)


def _reduce_bytes(x_RK: jax.Array, w: QuantArray) -> jax.Array:
    """One element of the sum per byte."""
    assert w.format.bits != 3
    num_fields = 8 // w.format.bits
    width = w.format.group_size // num_fields
    scales_NG, zeros = scales_and_zeros(w)
    num_rows, num_groups = scales_NG.shape
    zeros = zeros if isinstance(zeros, int) else zeros[..., None]
    codes = w.codes.reshape(num_rows, num_groups, width)
    fields = [
        ((codes >> (i * w.format.bits)) & w.format.max_code).astype(jnp.float32) - zeros
        for i in range(num_fields)
    ]
    x = x_RK.astype(jnp.float32).reshape(-1, 1, num_groups, num_fields, width)
    rows = []
    for r in range(x.shape[0]):
        products = sum(field * x[r, :, :, i] for i, field in enumerate(fields))
        rows.append(jnp.sum(products * scales_NG[..., None], axis=(1, 2)))
    return jnp.stack(rows)


def _reduce_units(x_RK: jax.Array, w: QuantArray) -> jax.Array:
    """One element of the sum per _UNIT_BYTES bytes of a group.

    Codes stay at their place in the byte; x is divided by that power of two instead. The zero
    point is taken off once per unit, times the sum of its x.
    """
    bits, size = w.format.bits, w.format.group_size
    scales_NG, zeros = scales_and_zeros(w)
    num_rows, num_groups = scales_NG.shape
    num_fields = 8 if bits == 3 else 8 // bits
    unit = min(_UNIT_BYTES, size // num_fields)
    num_units = size // num_fields // unit
    x = x_RK.astype(jnp.float32).reshape(-1, num_groups, num_fields, num_units, unit)
    terms = _three_bit_terms if bits == 3 else _terms
    values, rows = [], []
    for value, field, byte, shift in terms(w, (num_rows, num_groups), num_units, unit):
        values.append(value)
        rows.append(x[:, :, field, :, byte] * np.float32(2.0**-shift))
    # As arrays of their own: else every product gathers and converts x again.
    x_terms, x_sums = lax.optimization_barrier((jnp.stack(rows, axis=1), jnp.sum(x, axis=(2, 4))))
    zeros = zeros if isinstance(zeros, int) else zeros[..., None]
    out = []
    for r in range(x.shape[0]):
        products = sum(value * x_terms[r, i] for i, value in enumerate(values))
        offset = zeros * x_sums[r]
        out.append(jnp.sum((products - offset) * scales_NG[..., None], axis=(1, 2)))
    return jnp.stack(out)


def _terms(w: QuantArray, groups: tuple[int, int], num_units: int, unit: int):
    """Yields (value [N, G, units], field, byte of the unit, power of two in the value)."""
    bits = w.format.bits
    codes = w.codes.reshape(*groups, num_units, unit)
    for byte in range(unit):
        column = codes[..., byte].astype(jnp.uint32)
        for field in range(8 // bits):
            shift = bits * field
            value = column & np.uint32(w.format.max_code << shift)
            yield _small_float(value), field, byte, shift


def _three_bit_terms(w: QuantArray, groups: tuple[int, int], num_units: int, unit: int):
    """The same for codes of two planes: eighth i of a group is bit i of the high plane's bytes,
    and field i // 2 of the low plane's bytes in half i % 2."""
    (low_bits, _), _ = planes(w.format)
    low_bytes = w.codes.shape[1] * low_bits // w.format.bits
    low = w.codes[:, :low_bytes].reshape(*groups, 2, num_units, unit)
    high = w.codes[:, low_bytes:].reshape(*groups, num_units, unit)
    for byte in range(unit):
        high_column = high[..., byte].astype(jnp.uint32)
        low_columns = [low[:, :, half, :, byte].astype(jnp.uint32) for half in (0, 1)]
        for eighth in range(8):
            shift = 2 * (eighth // 2)
            move = shift + 2 - eighth
            moved = high_column << move if move >= 0 else high_column >> -move
            value = low_columns[eighth % 2] & np.uint32(3 << shift) | moved & np.uint32(4 << shift)
            yield _small_float(value), eighth, byte, shift


def _small_float(value: jax.Array) -> jax.Array:
    """Exact float32 of unsigned integers below 2^23."""
    return lax.bitcast_convert_type(value | _BITS_OF_2_23, jnp.float32) - _2_23
