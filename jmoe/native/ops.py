"""The host kernels as JAX functions: for programs on the CPU backend, inside jit or outside.

Every function here has a counterpart that XLA compiles, which computes the same and is what tests
compare with: ``linear``: models.linear.linear; ``experts``: models.experts; ``attend``:
models.attention.attend. Callers ask ``choice.supports`` first; a call without kernels raises
ConfigError.

Activations of products in few bits are fixed-point numbers of 8, 16 or 24 bits with a scale for
every group of the weights (csrc/quant.inl). What that does to a product of normally distributed
numbers, as NMSE against the exact one, tests/native/test_linear.py pins: about 1e-4, 1e-9 and
1e-12. Weights in float types take activations in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmoe.native import library
from jmoe.native.choice import ActivationBits
from jmoe.quant.formats import QuantFormat
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.quant_array import QuantArray


def linear(
    x_RI: Float[Array, "R I"],
    w_OI: jax.Array | QuantArray,
    activation_bits: ActivationBits = 24,
    num_threads: int = 0,
) -> Float[Array, "R O"]:
    """x @ w.T in float32.

    Args:
      x_RI: bfloat16 or float32.
      w_OI: bfloat16, float32 or quantized.
      activation_bits: of x, if w is quantized.
      num_threads: at most so many; 0 takes all that XLA has.
    """
    library.require()
    fmt = w_OI.format if isinstance(w_OI, QuantArray) else None
    parts = list(w_OI.parts().values()) if isinstance(w_OI, QuantArray) else [w_OI]
    call = jax.ffi.ffi_call(
        "jmoe_linear", jax.ShapeDtypeStruct((x_RI.shape[0], w_OI.shape[0]), jnp.float32)
    )
    return call(
        x_RI,
        *parts,
        bits=np.int64(fmt.bits if fmt else 0),
        group_size=np.int64(fmt.group_size if fmt else 0),
        symmetric=np.int64(fmt.symmetric if fmt else 0),
        nested=np.int64(fmt.nested if fmt else 0),
        activation_bits=np.int64(activation_bits),
        num_threads=np.int64(num_threads),
    )


def experts(
    x_TD: Float[Array, "T D"],
    expert_ids_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    valid_T: Bool[Array, " T"],
    blobs: jax.Array,
    layout: ExpertLayout,
    activation_bits: ActivationBits = 24,
    num_threads: int = 0,
) -> Float[Array, "T D"]:
    """The weighted sum of every token's experts, read where they lie.

    Args:
      x_TD: bfloat16 or float32.
      expert_ids_TK: an id outside of [0, E) counts as no expert.
      weights_TK: float32.
      valid_T: tokens to compute; the others come out as zeros.
      blobs: [E, items], as the layout says.
      layout: of each blob.
      activation_bits: of x and of the hidden state, if the weights are quantized.
      num_threads: at most so many; 0 takes all that XLA has.

    Returns:
      Added up in float32 in the order of k, in the dtype of x. The same bits for every number
      of threads.
    """
    library.require()
    call = jax.ffi.ffi_call("jmoe_experts", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    return call(
        x_TD,
        expert_ids_TK.astype(jnp.int32),
        weights_TK,
        valid_T,
        blobs,
        layout=_layout_numbers(layout),
        hidden_size=np.int64(layout.hidden_size),
        intermediate_size=np.int64(layout.intermediate_size),
        activation_bits=np.int64(activation_bits),
        num_threads=np.int64(num_threads),
    )


def experts_of_arrays(
    x_TD: Float[Array, "T D"],
    expert_ids_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    valid_T: Bool[Array, " T"],
    w1_EFD: Float[Array, "E F D"],
    w3_EFD: Float[Array, "E F D"],
    w2_EDF: Float[Array, "E D F"],
    num_threads: int = 0,
) -> Float[Array, "T D"]:
    """Like ``experts``, with plain weights in three stacks of one float type."""
    library.require()
    call = jax.ffi.ffi_call("jmoe_experts_of_arrays", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    ids_TK = expert_ids_TK.astype(jnp.int32)
    return call(
        x_TD, ids_TK, weights_TK, valid_T, w1_EFD, w3_EFD, w2_EDF, num_threads=np.int64(num_threads)
    )


def attend(
    q_BLHP: Float[Array, "B L H P"],
    k_BGMP: Float[Array, "B G M P"],
    v_BGMP: Float[Array, "B G M P"],
    start_B: Int[Array, " B"],
    window: int | None = None,
    num_threads: int = 0,
) -> Float[Array, "B L H P"]:
    """Causal attention of L new positions to a KV cache that holds them already.

    Args:
      q_BLHP: queries at positions start_B to start_B + L - 1, bfloat16 or float32.
      k_BGMP: keys; query head h reads key-value head h // (H / G).
      v_BGMP: values, in the dtype of the keys.
      start_B: may differ between sequences.
      window: a query sees so many keys up to its own; None: all.
      num_threads: at most so many; 0 takes all that XLA has.

    Returns:
      In the dtype of q; computed in float32. The same bits for every number of threads.
    """
    library.require()
    call = jax.ffi.ffi_call("jmoe_attend", jax.ShapeDtypeStruct(q_BLHP.shape, q_BLHP.dtype))
    return call(
        q_BLHP,
        k_BGMP,
        v_BGMP,
        start_B.astype(jnp.int32),
        window=np.int64(window or 0),
        num_threads=np.int64(num_threads),
    )


def read(array: jax.Array, num_threads: int = 0) -> jax.Array:
    """Reads an array as fast as memory gives it: the bound that benchmarks compare with.

    Returns:
      uint32 [2] that depends on every byte.
    """
    library.require()
    call = jax.ffi.ffi_call("jmoe_read", jax.ShapeDtypeStruct((2,), jnp.uint32))
    return call(array, num_threads=np.int64(num_threads))


def _layout_numbers(layout: ExpertLayout) -> np.ndarray:
    """What csrc/ffi_experts.cpp reads: eight numbers for each matrix."""
    numbers = []
    for matrix in MATRICES:
        fmt, parts = layout.format(matrix), layout.parts(matrix)

        def offset(name: str, parts=parts) -> int:
            return parts[name].offset if name in parts else 0

        if isinstance(fmt, QuantFormat):
            nested = parts["nested"].part.shape[1] if fmt.nested else 0
            head = [fmt.bits, fmt.group_size, int(fmt.symmetric), nested]
            numbers += [*head, *(offset(name) for name in ("codes", "scales", "zeros", "nested"))]
        else:
            numbers += [0, 0, 0, 0, offset("values"), 0, 0, 0]
    return np.array(numbers, np.int64)
