"""Applying the chosen experts to tokens, and combining their outputs.

Two forms compute the same sum; ``choose_form`` picks by number of tokens and platform:

* *reduce*: every assignment of a token to an expert on its own, as a multiply and a sum
  over the stacked weights at the expert's index. XLA:GPU fuses the indexing into the
  reduction and reads the weights in place, where a dot would copy the expert first.
* *blocks*: assignments sorted by expert and padded to blocks of one expert each; a loop
  takes one block of tokens through one expert at a time with dots. No work or memory is
  proportional to tokens times experts, and no token is ever dropped.

Outputs are combined in top-k order in both, never in the order of experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.models.linear import (
    ACCELERATOR_TILE_BYTES,
    CPU_TILE_BYTES,
    ArrayStack,
    BlobStack,
    Stack,
    linear_of_stack,
)
from jmoe.models.router import Routing
from jmoe.models.weights import parameter
from jmoe.native import ops
from jmoe.native.choice import HostKernels
from jmoe.quant.formats import BF16, F32, Format
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.matmul import MAX_REDUCE_ROWS
from jmoe.quant.spec import QuantSpec

# A token of Mixtral. Four tokens unrolled take XLA:GPU six times as long to compile as a loop.
MAX_UNROLLED_ASSIGNMENTS = 2

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertForm:
    kind: Literal["reduce", "blocks"]
    block_rows: int = 1  # tokens per block
    tile_bytes: int | None = None  # of a weight to multiply by at a time; None is all of it
    reduce: bool = False  # in blocks too, multiply and sum


def choose_form(num_tokens: int, config: ModelConfig, platform: str) -> ExpertForm:
    """Picks the form for so many tokens on a platform ("cpu", "gpu", "tpu")."""
    if num_tokens <= MAX_REDUCE_ROWS and platform != "cpu":
        return ExpertForm("reduce")
    # About one block per expert: every block copies or dequantizes its expert, which weighs
    # more than multiplying a few rows of padding.
    per_expert = -(-num_tokens * config.router.top_k // config.router.num_experts)
    block_rows = min(1 << (per_expert - 1).bit_length(), 128)
    if platform == "cpu":
        return ExpertForm("blocks", block_rows, CPU_TILE_BYTES)
    reduce = block_rows <= MAX_REDUCE_ROWS
    return ExpertForm("blocks", block_rows, None if reduce else ACCELERATOR_TILE_BYTES, reduce)


class Experts(nnx.Module):
    """A layer's experts: SwiGLU with gate w1, up w3 and down w2.

    Plain, they are three stacked arrays; in the formats of a QuantSpec, one array of blobs.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        quant: QuantSpec | None,
        host: HostKernels | None = None,
    ):
        num_experts = config.router.num_experts
        hidden, width = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.host = host
        self.layout = None
        if quant is not None:
            self.layout = ExpertLayout.of(hidden, width, quant)
            self.blobs = parameter((num_experts, self.layout.num_items), self.layout.dtype)
        else:
            self.w1 = parameter((num_experts, width, hidden), dtype)
            self.w3 = parameter((num_experts, width, hidden), dtype)
            self.w2 = parameter((num_experts, hidden, width), dtype)

    def stacks(self) -> tuple[Stack, Stack, Stack]:
        """Where w1, w3 and w2 of an expert are read from."""
        if self.layout is None:
            w1, w3, w2 = (ArrayStack(w[...]) for w in (self.w1, self.w3, self.w2))
        else:
            blobs, layout = self.blobs[...], self.layout
            w1, w3, w2 = (BlobStack(blobs, layout, matrix) for matrix in MATRICES)
        return w1, w3, w2

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        routing: Routing,
        valid_T: Bool[Array, " T"],
        form: ExpertForm,
    ) -> Float[Array, "T D"]:
        """The weighted sum of every token's experts.

        Args:
          x_TD: normalised residual stream.
          routing: chosen experts and weights.
          valid_T: tokens to compute; the others (padding) come out as rubbish or zero.
          form: how XLA computes it, where no host kernels do.

        Returns:
          Sum over k of weight * expert(x), added up in float32 in the order of k, in the
          dtype of x.
        """
        with jax.named_scope("experts"):
            stacks, ids_TK = self.stacks(), routing.expert_ids_TK
            num_experts = routing.probs_TE.shape[1]
            if self._is_for_host(ids_TK.size // num_experts):
                return self._on_host(x_TD, routing, valid_T)
            activation = ACTIVATIONS[self.activation]
            if form.kind == "reduce":
                y_TKD = _reduce(x_TD, ids_TK, stacks, activation)
            else:
                plan = plan_blocks(ids_TK, valid_T, num_experts, form.block_rows)
                y_TKD = _blocks(x_TD, plan, stacks, activation, form).reshape(*ids_TK.shape, -1)
            return combine(y_TKD, routing.weights_TK).astype(x_TD.dtype)

    def _is_for_host(self, rows_per_expert: int) -> bool:
        if self.layout is not None:
            formats = self.layout.formats
        else:
            formats = (BF16 if self.w1[...].dtype == jnp.bfloat16 else F32,)
        return _kernels_take(self.host, self.activation, formats, rows_per_expert)

    def _on_host(self, x_TD: jax.Array, routing: Routing, valid_T: jax.Array) -> jax.Array:
        assert self.host is not None
        assignments = routing.expert_ids_TK, routing.weights_TK, valid_T
        threads = self.host.num_threads
        if self.layout is None:
            w1, w3, w2 = (w[...] for w in (self.w1, self.w3, self.w2))
            return ops.experts_of_arrays(x_TD, *assignments, w1, w3, w2, threads)
        bits = self.host.activation_bits
        return ops.experts(x_TD, *assignments, self.blobs[...], self.layout, bits, threads)


def expert_form(num_rows: int, platform: str) -> ExpertForm:
    """How XLA takes so many rows through one expert in an array of its own."""
    if platform == "cpu":
        return ExpertForm("blocks", num_rows, CPU_TILE_BYTES)
    reduce = num_rows <= MAX_REDUCE_ROWS
    return ExpertForm("blocks", num_rows, None if reduce else ACCELERATOR_TILE_BYTES, reduce)


def expert_output(
    x_RD: Float[Array, "R D"],
    valid_R: Bool[Array, " R"],
    blob: jax.Array,
    layout: ExpertLayout,
    activation: str,
    form: ExpertForm,
    host: HostKernels | None,
) -> Float[Array, "R D"]:
    """Rows through one expert that lies in an array of its own, in float32.

    Args:
      x_RD: normalised residual stream.
      valid_R: rows to compute; the others come out as rubbish or zero.
      blob: [items], as the layout says.
      layout: of the blob.
      activation: of the gate projection.
      form: how XLA computes it (``expert_form``), where no host kernels do.
      host: kernels to compute with, on the CPU backend.
    """
    with jax.named_scope("expert"):
        stack = blob[None]
        num_rows = x_RD.shape[0]
        if _kernels_take(host, activation, layout.formats, num_rows):
            assert host is not None
            return _by_kernels(x_RD, jnp.where(valid_R, 0, -1), stack, layout, host)
        w1, w3, w2 = (BlobStack(stack, layout, matrix) for matrix in MATRICES)
        stacks, index = (w1, w3, w2), jnp.int32(0)
        return _feed_forward(
            x_RD, index, stacks, ACTIVATIONS[activation], form.tile_bytes, form.reduce
        )


def experts_in_slots(
    x_TD: Float[Array, "T D"],
    slot_TK: Int[Array, "T K"],
    slots_SI: jax.Array,
    layout: ExpertLayout,
    activation: str,
    platform: str,
    host: HostKernels | None,
) -> Float[Array, "T K D"]:
    """Outputs of experts that lie in slots, by token and choice, in float32.

    Args:
      x_TD: normalised residual stream, of few tokens.
      slot_TK: slot of each assignment's expert; -1 leaves zeros.
      slots_SI: blobs.
      layout: of each blob.
      activation: of the gate projection.
      platform: "cpu", "gpu" or "tpu".
      host: kernels to compute with, on the CPU backend.
    """
    num_tokens, top_k = slot_TK.shape
    # As an array of its own: XLA:GPU compiles the kernels of layers once if they are equal, but
    # not with numbers of a layer's slots in them.
    slot_A = lax.optimization_barrier(slot_TK.reshape(-1))
    x_AD = jnp.repeat(x_TD, top_k, axis=0)
    with jax.named_scope("experts"):
        if _kernels_take(host, activation, layout.formats, 1):
            assert host is not None
            y_AD = _by_kernels(x_AD, slot_A, slots_SI, layout, host)
            return y_AD.reshape(num_tokens, top_k, -1)
        w1, w3, w2 = (BlobStack(slots_SI, layout, matrix) for matrix in MATRICES)
        form = expert_form(1, platform)

        def one_assignment(a: jax.Array | int, y_AD: jax.Array) -> jax.Array:
            x = lax.dynamic_slice_in_dim(x_AD, a, 1)
            index = jnp.maximum(slot_A[a], 0)
            out = _feed_forward(
                x, index, (w1, w3, w2), ACTIVATIONS[activation], form.tile_bytes, form.reduce
            )
            return lax.dynamic_update_slice(y_AD, jnp.where(slot_A[a] >= 0, out, 0), (a, 0))

        y_AD = jnp.zeros(x_AD.shape, jnp.float32)
        unroll = len(x_AD) <= MAX_UNROLLED_ASSIGNMENTS
        y_AD = lax.fori_loop(0, len(x_AD), one_assignment, y_AD, unroll=unroll)
        return y_AD.reshape(num_tokens, top_k, -1)


def experts_by_row(
    x_RD: Float[Array, "R D"],
    ids_R: Int[Array, " R"],
    blobs_EI: jax.Array,
    layout: ExpertLayout,
    activation: str,
    host: HostKernels | None,
) -> Float[Array, "R D"]:
    """Rows through an expert each, on a CPU that has all of a layer's, in float32.

    Args:
      x_RD: normalised residual stream; a token has a row for each of its experts.
      ids_R: the expert of each row; the rows of -1 come out as zeros.
      blobs_EI: experts.
      layout: of each blob.
      activation: of the gate projection.
      host: kernels to compute with.
    """
    num_rows, num_experts = x_RD.shape[0], blobs_EI.shape[0]
    with jax.named_scope("experts"):
        if _kernels_take(host, activation, layout.formats, -(-num_rows // num_experts)):
            assert host is not None
            return _by_kernels(x_RD, ids_R, blobs_EI, layout, host)
        w1, w3, w2 = (BlobStack(blobs_EI, layout, matrix) for matrix in MATRICES)
        block_rows = min(1 << (-(-num_rows // num_experts) - 1).bit_length(), 128)
        form = ExpertForm("blocks", block_rows, CPU_TILE_BYTES)
        plan = plan_blocks(ids_R[:, None], ids_R >= 0, num_experts, block_rows)
        return _blocks(x_RD, plan, (w1, w3, w2), ACTIVATIONS[activation], form)


def combine(y_TKD: Float[Array, "T K D"], weights_TK: Float[Array, "T K"]) -> Float[Array, "T D"]:
    """Adds up expert outputs, weighted, in float32 and in the order of k."""
    total_TD = y_TKD[:, 0] * weights_TK[:, 0, None]
    for k in range(1, y_TKD.shape[1]):
        total_TD += y_TKD[:, k] * weights_TK[:, k, None]
    return total_TD


def _kernels_take(
    host: HostKernels | None, activation: str, formats: Sequence[Format], rows_per_expert: int
) -> bool:
    """Whether host kernels compute these experts."""
    return (
        host is not None and activation == "silu" and host.takes_experts(formats, rows_per_expert)
    )


def _by_kernels(
    x_AD: jax.Array, ids_A: jax.Array, blobs: jax.Array, layout: ExpertLayout, host: HostKernels
) -> jax.Array:
    """Rows through an expert each, in float32; those of -1 come out as zeros."""
    ones_A1 = jnp.ones((len(x_AD), 1), jnp.float32)
    bits, threads = host.activation_bits, host.num_threads
    x_AD, ids_A1 = x_AD.astype(jnp.float32), ids_A[:, None]
    return ops.experts(x_AD, ids_A1, ones_A1, ids_A >= 0, blobs, layout, bits, threads)


def _reduce(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    stacks: tuple[Stack, Stack, Stack],
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Outputs by token and expert, [T, K, D]."""
    num_tokens, top_k = ids_TK.shape
    num_assignments = num_tokens * top_k
    ids_A = ids_TK.reshape(-1)

    def one_assignment(a: jax.Array | int, y_AD: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x_TD, a // top_k, 1)
        out = _feed_forward(x, ids_A[a], stacks, activation, reduce=True)
        return lax.dynamic_update_slice(y_AD, out, (a, 0))

    y_AD = jnp.zeros((num_assignments, x_TD.shape[1]), jnp.float32)
    # Unrolled, kernels of several assignments are one; but each assignment is compiled anew.
    unroll = num_assignments <= MAX_UNROLLED_ASSIGNMENTS
    y_AD = lax.fori_loop(0, num_assignments, one_assignment, y_AD, unroll=unroll)
    return y_AD.reshape(num_tokens, top_k, -1)


def _feed_forward(
    x: jax.Array,
    e: jax.Array,
    stacks: tuple[Stack, Stack, Stack],
    activation: Callable[[jax.Array], jax.Array],
    tile_bytes: int | None = None,
    reduce: bool = False,
) -> jax.Array:
    """Rows of x through expert e, float32."""
    w1, w3, w2 = stacks
    gate, up = (linear_of_stack(x, w, e, tile_bytes, reduce) for w in (w1, w3))
    hidden = (activation(gate) * up).astype(x.dtype)
    return linear_of_stack(hidden, w2, e, tile_bytes, reduce)


def _blocks(
    x_TD: jax.Array,
    plan: "BlockPlan",
    stacks: tuple[Stack, Stack, Stack],
    activation: Callable[[jax.Array], jax.Array],
    form: ExpertForm,
) -> jax.Array:
    """Outputs by assignment, [A, D]."""
    block_rows = form.block_rows
    hidden_size = x_TD.shape[1]
    # A row of zeros past the end stands for padding within a block.
    x_padded = jnp.concatenate([x_TD, jnp.zeros((1, hidden_size), x_TD.dtype)])

    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        e = plan.expert_of_block[i]
        first_row = i * block_rows
        x = x_padded[lax.dynamic_slice(plan.token_of_row, (first_row,), (block_rows,))]
        out = _feed_forward(x, e, stacks, activation, form.tile_bytes, form.reduce)
        return lax.dynamic_update_slice(y, out, (first_row, 0))

    # The last row stays zero: tokens that are not valid read it.
    y = jnp.zeros((plan.token_of_row.shape[0] + 1, hidden_size), jnp.float32)
    # Else XLA:GPU makes the outputs of all layers at the start of the program.
    y, x_padded = lax.optimization_barrier((y, x_padded))
    y = lax.fori_loop(0, plan.num_blocks, one_block, y)
    return y[plan.row_of_assignment]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Assignments laid out in rows, block by block.

    Attributes:
      num_blocks: blocks in use, at most the length of expert_of_block.
      expert_of_block: expert of each block in use.
      token_of_row: token of each row; the number of tokens where a row is padding.
      row_of_assignment: row of assignment t * K + k; the number of rows if t is not valid.
    """

    num_blocks: Int[Array, ""]
    expert_of_block: Int[Array, " blocks"]
    token_of_row: Int[Array, " rows"]
    row_of_assignment: Int[Array, " A"]


def max_num_blocks(num_assignments: int, num_experts: int, block_rows: int) -> int:
    """Blocks of the worst case: every expert used fills its last block with a single row."""
    max_used = min(num_experts, num_assignments)
    return (num_assignments + max_used * (block_rows - 1)) // block_rows


def plan_blocks(
    ids_TK: Int[Array, "T K"], valid_T: Bool[Array, " T"], num_experts: int, block_rows: int
) -> BlockPlan:
    """Groups assignments by expert into blocks of block_rows rows of one expert each.

    The arrays have room for the worst case.
    """
    num_tokens, top_k = ids_TK.shape
    num_assignments = num_tokens * top_k
    max_blocks = max_num_blocks(num_assignments, num_experts, block_rows)
    num_rows = max_blocks * block_rows

    ids_A = jnp.where(valid_T[:, None], ids_TK, num_experts).reshape(-1)
    order_A = jnp.argsort(ids_A, stable=True)
    sorted_ids_A = ids_A[order_A]
    counts_E = jnp.zeros(num_experts, jnp.int32).at[ids_A].add(1, mode="drop")
    blocks_E = -(-counts_E // block_rows)
    last_block_E = jnp.cumsum(blocks_E)
    first_row_E = (last_block_E - blocks_E) * block_rows
    first_assignment_E = jnp.cumsum(counts_E) - counts_E

    rank_A = jnp.arange(num_assignments) - first_assignment_E.at[sorted_ids_A].get(mode="clip")
    rows_A = first_row_E.at[sorted_ids_A].get(mode="clip") + rank_A
    rows_A = jnp.where(sorted_ids_A < num_experts, rows_A, num_rows)
    return BlockPlan(
        num_blocks=last_block_E[-1],
        expert_of_block=jnp.searchsorted(last_block_E, jnp.arange(max_blocks), side="right"),
        token_of_row=jnp.full(num_rows, num_tokens, jnp.int32)
        .at[rows_A]
        .set(order_A // top_k, mode="drop"),
        row_of_assignment=jnp.zeros(num_assignments, jnp.int32).at[order_A].set(rows_A),
    )
