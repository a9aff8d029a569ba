"""What the suite kernels measures: operations and their weights, as calls to make in turn.

Weights are random and far larger than any cache: there are several of everything, and every call
takes the next. The XLA program beside a kernel is the one that a model without kernels runs; a
model with them may leave to XLA what that does better.
"""

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.engines.memory import check_fits
from jmoe.engines.programs import ProgramCache
from jmoe.errors import RequestError
from jmoe.models import attention
from jmoe.models.experts import Experts, choose_form
from jmoe.models.linear import Weight, linear
from jmoe.models.random_weights import fill_blobs
from jmoe.models.router import Routing
from jmoe.native import ops
from jmoe.native.choice import ActivationBits, HostKernels, supports
from jmoe.quant.formats import DenseFormat, Format
from jmoe.quant.layout import ExpertLayout, MatrixName, aligned_empty
from jmoe.quant.quant_array import from_parts
from jmoe.quant.spec import QuantSpec

XLA = "xla"
FLOATS = "float"  # a kernel for weights in float types, which have no bits of activations

_STEP_BYTES = 200e6  # of projections in one call for one token
_MAX_PAIRS = 16
_NUM_CACHES = 4
_MAX_POSITIONS = 32768


class Call(Protocol):
    """Computes on the weights whose turn it is, and returns the result when it is there."""

    def __call__(self, turn: int) -> Any: ...


class KernelTest(NamedTuple):
    """One operation on so many tokens.

    Attributes:
      what: the operation.
      form: of its weights, or of the KV cache.
      num_tokens: rows of activations.
      num_bytes: of weights or of a cache that one operation must read.
      flop: of one operation.
      operations: in one call.
      calls: by contestant: bits of activations or FLOATS, and XLA.
    """

    what: str
    form: str
    num_tokens: int
    num_bytes: int
    flop: int
    operations: int
    calls: dict[str, Call]


class Kernels(NamedTuple):
    """Who computes what is measured."""

    device: jax.Device
    activation_bits: tuple[ActivationBits, ...]
    num_threads: int

    def contestants(self, fmt: Format) -> Mapping[str, HostKernels | None]:
        """Kernels for weights in a format, and XLA (RequestError if there are none)."""
        if not supports(fmt):
            raise RequestError("there is no host kernel for this format", got=fmt)
        if isinstance(fmt, DenseFormat):
            return {FLOATS: HostKernels(num_threads=self.num_threads), XLA: None}
        hosts: dict[str, HostKernels | None] = {
            str(bits): HostKernels(activation_bits=bits, num_threads=self.num_threads)
            for bits in self.activation_bits
        }
        return hosts | {XLA: None}


def expert_tests(
    config: ModelConfig, fmt: Format, tokens: Sequence[int], kernels: Kernels
) -> Iterator[KernelTest]:
    """A layer's experts, from their blobs."""
    contestants = kernels.contestants(fmt)
    quant = QuantSpec(experts=fmt)
    layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
    num_experts, top_k = config.router.num_experts, config.router.top_k
    blobs = jax.device_put(_expert_blobs(layout, num_experts, kernels.device), kernels.device)
    for num_tokens in tokens:
        x_TD = _activations(num_tokens, config.hidden_size, fmt)
        inputs = [(blobs, x_TD, routing) for routing in _routings(num_tokens, num_experts, top_k)]
        form = choose_form(num_tokens, config, "cpu")
        num_used = min(num_experts, top_k * num_tokens)
        yield KernelTest(
            what="experts",
            form=str(fmt),
            num_tokens=num_tokens,
            num_bytes=num_used * layout.num_bytes,
            flop=2 * 3 * config.hidden_size * config.intermediate_size * top_k * num_tokens,
            operations=1,
            calls={
                name: _compile(_experts, inputs, config=config, quant=quant, host=host, form=form)
                for name, host in contestants.items()
            },
        )


def linear_tests(
    config: ModelConfig, quant: QuantSpec, tokens: Sequence[int], kernels: Kernels
) -> Iterator[KernelTest]:
    """Attention's projections of queries and of its output; and the head, for one token."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    layout = _square_layout(hidden, queries, quant.attention)
    num_pairs = min(max(1, round(_STEP_BYTES / (layout.num_bytes * 2 / 3))), _MAX_PAIRS)
    weights = _matrices(layout, num_pairs, ("w1", "w2"), kernels.device)
    for num_tokens in tokens:
        # In many rows arithmetic takes its time, wherever the weights lie.
        ws = weights if num_tokens == 1 else weights[:2]
        what = f"projection {queries}x{hidden}"
        yield _linear_test(what, quant.attention, [tuple(ws)], num_tokens, kernels)
    # Random blobs also hold the transposed matrix, whose rows are to divide into groups.
    vocabulary = -(-config.vocab_size // 256) * 256
    layout = _square_layout(hidden, vocabulary, quant.head)
    heads = [(w,) for w in _matrices(layout, 2, ("w1", "w3"), kernels.device)]
    yield _linear_test(f"head {vocabulary}x{hidden}", quant.head, heads, 1, kernels)


def attend_tests(config: ModelConfig, kernels: Kernels) -> Iterator[KernelTest]:
    """A step's attention to a long KV cache."""
    num_positions = min(_MAX_POSITIONS, config.max_position_embeddings)
    num_heads, head_dim = config.num_attention_heads, config.head_dim
    start_B = jnp.array([num_positions - 1], jnp.int32)
    rng = np.random.default_rng(0)
    for dtype in ("bfloat16", "float32"):
        rows = rng.standard_normal((num_positions, head_dim), np.float32)
        shape = (1, config.num_key_value_heads, num_positions, head_dim)
        q = jnp.asarray(rng.standard_normal((1, 1, num_heads, head_dim)), dtype)
        caches = aligned_empty((_NUM_CACHES, 2, *shape), dtype)
        caches[:, 0], caches[:, 1] = rows, rows[::-1]
        inputs = [
            (q, jax.device_put(k, kernels.device), jax.device_put(v, kernels.device), start_B)
            for k, v in caches
        ]
        hosts = {FLOATS: HostKernels(num_threads=kernels.num_threads), XLA: None}
        yield KernelTest(
            what=f"attend {num_positions} positions",
            form={"bfloat16": "bf16", "float32": "f32"}[dtype],
            num_tokens=1,
            num_bytes=caches[0].nbytes,
            flop=4 * num_heads * head_dim * num_positions,
            operations=1,
            calls={name: _compile(_attend, inputs, host=host) for name, host in hosts.items()},
        )


def _linear_test(
    what: str,
    fmt: Format,
    inputs: Sequence[tuple[Weight, ...]],
    num_tokens: int,
    kernels: Kernels,
) -> KernelTest:
    """Products one after another, each with the result of the one before."""
    first = inputs[0][0]
    x_TI = _activations(num_tokens, first.shape[1], fmt)
    arguments = [(x_TI, weights) for weights in inputs]
    return KernelTest(
        what=what,
        form=str(fmt),
        num_tokens=num_tokens,
        num_bytes=first.nbytes,
        flop=2 * num_tokens * first.shape[0] * first.shape[1],
        operations=len(inputs[0]),
        calls={
            name: _compile(_products, arguments, host=host)
            for name, host in kernels.contestants(fmt).items()
        },
    )


def _compile(program: Any, inputs: Sequence[Any], **static: Any) -> Call:
    """Compiles a program as an engine does.

    Args:
      program: made by jax.jit.
      inputs: its arguments, turn by turn, alike in shape.
      **static: its static arguments.
    """
    (device,) = jax.tree.leaves(inputs[0])[0].devices()
    run = ProgramCache(device).get(program, *inputs[0], **static)

    def call(turn: int) -> jax.Array:
        return jax.block_until_ready(run(*inputs[turn % len(inputs)]))

    return call


@functools.partial(jax.jit, static_argnames=("config", "quant", "host", "form"))
def _experts(blobs, x_TD, routing, *, config, quant, host, form) -> jax.Array:
    valid_T = jnp.ones(x_TD.shape[0], bool)
    if host is not None:
        layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        bits, threads = host.activation_bits, host.num_threads
        return ops.experts(x_TD, ids_TK, weights_TK, valid_T, blobs, layout, bits, threads)
    graph, state = nnx.split(Experts(config, str(x_TD.dtype), quant))
    experts = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), [blobs]))
    return experts(x_TD, routing, valid_T, form)


@functools.partial(jax.jit, static_argnames=("host",))
def _products(x, weights, *, host) -> jax.Array:
    dtype = x.dtype
    for w in weights:
        x = x.astype(dtype)
        x = (
            ops.linear(x, w, host.activation_bits, host.num_threads)
            if host is not None
            else linear(x, w)
        )
    return x


@functools.partial(jax.jit, static_argnames=("host",))
def _attend(q, k, v, start_B, *, host) -> jax.Array:
    if host is not None:
        return ops.attend(q, k, v, start_B, None, host.num_threads)
    return attention.attend(q, k, v, attention.visible_keys(start_B[:, None], k.shape[2], None))


def _routings(num_tokens: int, num_experts: int, top_k: int) -> list[Routing]:
    """For one token all experts, top_k a turn; for more tokens random ones."""
    rng = np.random.default_rng(0)
    order = rng.permutation(num_experts)
    routings = []
    for turn in range(max(2, num_experts // top_k)):
        if num_tokens == 1:
            ids_TK = np.take(order, turn * top_k + np.arange(top_k), mode="wrap")[None]
        else:
            ids_TK = rng.permuted(np.tile(order, (num_tokens, 1)), axis=1)[:, :top_k]
        routing = Routing(
            weights_TK=jnp.full((num_tokens, top_k), 1 / top_k, jnp.float32),
            expert_ids_TK=jnp.asarray(ids_TK, jnp.int32),
            probs_TE=jnp.zeros((num_tokens, num_experts), jnp.float32),
        )
        routings.append(routing)
    return routings


def _activations(num_tokens: int, num_columns: int, fmt: Format) -> jax.Array:
    """In the dtype that a model with such weights computes in by default."""
    x = np.random.default_rng(0).standard_normal((num_tokens, num_columns))
    return jnp.asarray(x, fmt.dtype if isinstance(fmt, DenseFormat) else jnp.float32)


def _expert_blobs(layout: ExpertLayout, num_experts: int, device: jax.Device) -> np.ndarray:
    """Experts that are all equal: making up random ones takes longer than measuring them."""
    gc.collect()  # JAX keeps what it compiled, and its arguments, in circles
    check_fits(
        num_experts * layout.num_bytes,
        device,
        what=f"{num_experts} experts in {layout.formats[0]}",
        do="leave this format out of --formats",
    )
    blobs = aligned_empty((num_experts, layout.num_items), layout.dtype)
    fill_blobs(layout, blobs)
    return blobs


def _matrices(
    layout: ExpertLayout, num_blobs: int, names: Sequence[MatrixName], device: jax.Device
) -> list[Weight]:
    """These matrices of random blobs, blob by blob."""
    weights: list[Weight] = []
    blobs = aligned_empty((num_blobs, layout.num_bytes), np.uint8)
    fill_blobs(layout, blobs)
    for blob in blobs:
        views = layout.host_views(blob)
        for name in names:
            fmt = layout.format(name)
            parts = {part: jax.device_put(view, device) for part, view in views[name].items()}
            weights.append(
                parts["values"] if isinstance(fmt, DenseFormat) else from_parts(parts, fmt)
            )
    return weights


def _square_layout(hidden_size: int, intermediate_size: int, fmt: Format) -> ExpertLayout:
    """Matrices [intermediate, hidden] and back, as if they were an expert's."""
    return ExpertLayout(
        hidden_size=hidden_size, intermediate_size=intermediate_size, formats=(fmt, fmt, fmt)
    )
