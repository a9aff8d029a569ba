"""The matrix products of the decoder: accumulated in float32, exact for float32 inputs.

A weight is an array, or a QuantArray, or lies among others in a stack; callers need not know.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jmoe.native import ops
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import ExpertLayout, MatrixName, read_rows
from jmoe.quant.matmul import (
    MAX_REDUCE_ROWS,
    dequantized_product,
    dot,
    precision,
    reduce_product,
)
from jmoe.quant.quant_array import QuantArray, dequantize

# XLA:CPU converts the whole of a bfloat16 weight to float32 for every product with fewer rows.
MIN_ROWS_BFLOAT16_CPU = 4
# Of a weight at a time: in the second or third cache of any recent processor, and in the second
# of a large GPU.
CPU_TILE_BYTES = 4 * 2**20
ACCELERATOR_TILE_BYTES = 32 * 2**20

Weight = jax.Array | QuantArray


def linear(
    x: Float[Array, "*rows I"], w_OI: Weight, host: HostKernels | None = None
) -> Float[Array, "*rows O"]:
    """Multiplies rows of x by a weight stored [out, in], as checkpoints store it.

    Contracting the last dimension of both is what XLA:GPU turns into one kernel for a
    single row; the transposed layout is not.

    Args:
      x: activations.
      w_OI: weight, in the dtype of x or quantized.
      host: kernels to use instead of XLA's products, in a program for the CPU backend.

    Returns:
      x @ w.T, accumulated and returned in float32 for every input dtype: callers round once,
      where they mean to, and XLA:CPU has a fast path for bfloat16 only with a float32 result.
    """
    num_rows = math.prod(x.shape[:-1])
    if host is not None and host.takes(w_OI, num_rows):
        rows = x.reshape(-1, x.shape[-1])
        y = ops.linear(rows, w_OI, host.activation_bits, host.num_threads)
        return y.reshape(*x.shape[:-1], -1)
    if isinstance(w_OI, QuantArray):
        rows = x.reshape(-1, x.shape[-1])
        y = lax.platform_dependent(rows, w_OI, cpu=_linear_cpu, default=_linear_accelerator)
        return y.reshape(*x.shape[:-1], -1)
    if x.dtype == jnp.bfloat16 and num_rows < MIN_ROWS_BFLOAT16_CPU:
        return lax.platform_dependent(x, w_OI, cpu=_padded_dot, default=dot)
    return dot(x, w_OI)


def embed(token_ids: Int[Array, "*rows"], w_VD: Weight) -> Float[Array, "*rows D"]:
    """Rows of the embedding table."""
    if isinstance(w_VD, QuantArray):
        return dequantize(w_VD[token_ids])
    return w_VD[token_ids]


@dataclasses.dataclass(frozen=True)
class ArrayStack:
    """Weights [N, out, in] in one array, of which a program reads one at a traced index."""

    w_NOI: jax.Array

    @property
    def num_outputs(self) -> int:
        return self.w_NOI.shape[1]

    def rows(self, index: jax.Array, first_row: jax.Array | int, num_rows: int) -> jax.Array:
        """Some outputs of one weight."""
        size = (1, num_rows, self.w_NOI.shape[2])
        return lax.dynamic_slice(self.w_NOI, (index, first_row, 0), size)[0]


@dataclasses.dataclass(frozen=True)
class BlobStack:
    """The same for one matrix of every expert, inside blobs [E, items]."""

    blobs: jax.Array
    layout: ExpertLayout
    matrix: MatrixName

    @property
    def num_outputs(self) -> int:
        return self.layout.matrix_shape(self.matrix)[0]

    def rows(self, index: jax.Array, first_row: jax.Array | int, num_rows: int) -> Weight:
        return read_rows(self.blobs, self.layout, self.matrix, index, first_row, num_rows)


Stack = ArrayStack | BlobStack


def linear_of_stack(
    x: Float[Array, "rows I"],
    stack: Stack,
    index: Int[Array, ""],
    tile_bytes: int | None,
    reduce: bool = False,
) -> Float[Array, "rows O"]:
    """Multiplies by one weight of a stack, like ``linear``.

    XLA copies a matrix out of a stack before it multiplies, and writes a quantized one out
    dequantized. In tiles that stay in the processor's cache that costs little; whole, it is
    written to memory and read again.

    Args:
      x: activations.
      stack: the weights.
      index: which weight.
      tile_bytes: size of a tile in the dtype of x; None takes the matrix whole.
      reduce: multiply and sum instead, which reads the weight in place on a GPU; for few rows.
    """
    if reduce:
        return _reduce(x, stack.rows(index, 0, stack.num_outputs))

    def product(first: jax.Array | int, size: int) -> jax.Array:
        w = stack.rows(index, first, size)
        return dequantized_product(x, w) if isinstance(w, QuantArray) else dot(x, w.astype(x.dtype))

    return _tiled(product, x, stack.num_outputs, tile_bytes)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two operands with the same accumulation and precision as ``linear``."""
    return jnp.einsum(spec, a, b, precision=precision(a), preferred_element_type=jnp.float32)


def _reduce(x: jax.Array, w_OI: Weight) -> jax.Array:
    if isinstance(w_OI, QuantArray):
        return reduce_product(x, w_OI, of_stack=True)
    w = w_OI.astype(jnp.float32)
    return jnp.stack([jnp.sum(w * row, axis=-1) for row in x.astype(jnp.float32)])


def _linear_cpu(x: jax.Array, w_OI: QuantArray) -> jax.Array:
    return _tiled_quant(x, w_OI, CPU_TILE_BYTES)


def _linear_accelerator(x: jax.Array, w_OI: QuantArray) -> jax.Array:
    if x.shape[0] <= MAX_REDUCE_ROWS:
        return reduce_product(x, w_OI)
    # Else XLA:GPU dequantizes the weights of all layers at the start of the program.
    x, w_OI = lax.optimization_barrier((x, w_OI))
    return _tiled_quant(x, w_OI, ACCELERATOR_TILE_BYTES)


def _tiled_quant(x: jax.Array, w_OI: QuantArray, tile_bytes: int) -> jax.Array:
    def product(first: jax.Array | int, size: int) -> jax.Array:
        tile = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, first, size), w_OI)
        return dequantized_product(x, tile)

    return _tiled(product, x, w_OI.shape[0], tile_bytes)


def _tiled(
    product: Callable[[jax.Array | int, int], jax.Array],
    x: jax.Array,
    num_outputs: int,
    tile_bytes: int | None,
) -> jax.Array:
    """Collects product(first output, number of outputs) over tiles of a weight."""
    tile_rows = num_outputs
    if tile_bytes is not None:
        max_rows = max(1, tile_bytes // (x.shape[-1] * x.dtype.itemsize))
        limit = min(max_rows, num_outputs)
        tile_rows = next(n for n in range(limit, 0, -1) if num_outputs % n == 0)
    if tile_rows == num_outputs:
        return product(0, num_outputs)

    def one_tile(i: jax.Array, y: jax.Array) -> jax.Array:
        out = product(i * tile_rows, tile_rows)
        return lax.dynamic_update_slice(y, out, (0, i * tile_rows))

    y = jnp.zeros((x.shape[0], num_outputs), jnp.float32)
    return lax.fori_loop(0, num_outputs // tile_rows, one_tile, y)


def _padded_dot(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    padding = ((0, MIN_ROWS_BFLOAT16_CPU - rows.shape[0]), (0, 0))
    product = dot(jnp.pad(rows, padding), w_OI)[: rows.shape[0]]
    return product.reshape(*x.shape[:-1], -1)
