"""The compiled programs of the resident engine, and a cache that compiles each one once.

Every program takes the parameters as one flat tuple of arrays: with a nested tree, looking
at its leaves would cost more than dispatching the program.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jmoe.config import ModelConfig
from jmoe.generation.sampling import SamplingKind, SamplingValues, sample
from jmoe.models.decoder import rebuild
from jmoe.models.experts import ExpertForm
from jmoe.models.kv_cache import KVCache
from jmoe.native.choice import HostKernels
from jmoe.quant.spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one decode step hands to the next; donated to every step.

    Attributes:
      cache: keys and values of the first lengths_B positions.
      lengths_B: positions in the cache, by sequence.
      token_ids_B: the last token chosen, at position lengths_B, not in the cache yet.
      seen_BV: tokens of each sequence so far; None unless there is a repetition penalty.
    """

    cache: KVCache
    lengths_B: Int[Array, " B"]
    token_ids_B: Int[Array, " B"]
    seen_BV: Bool[Array, "B V"] | None


def next_tokens(
    logits_BV: Float[Array, "B V"],
    lengths_B: Int[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """Chooses the token at position lengths_B of every sequence, and enters it into seen_BV."""
    keys_B = _step_keys(key_data, lengths_B)
    token_ids_B = sample(logits_BV, seen_BV, keys_B, values, kind)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_ids_B.shape[0]), token_ids_B].set(True)
    return token_ids_B, seen_BV


def _step_keys(key_data: UInt32[Array, "2"], lengths_B: Int[Array, " B"]) -> jax.Array:
    """Random keys for the token at position lengths_B: by seed, sequence and position only."""
    key = jax.random.wrap_key_data(key_data)
    sequences_B = jnp.arange(lengths_B.shape[0])
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, sequences_B)
    return jax.vmap(jax.random.fold_in)(keys_B, lengths_B)


@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype", "quant", "host", "form"),
    donate_argnames=("cache", "hidden_BD"),
)
def prefill_chunk(
    parameters: tuple[jax.Array, ...],
    cache: KVCache,
    hidden_BD: Float[Array, "B D"],
    token_ids_BL: Int[Array, "B L"],
    start: Int[Array, ""],
    lengths_B: Int[Array, " B"],
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
    form: ExpertForm,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Takes positions start to start + L - 1 of every prompt through the model.

    Donates: cache, hidden_BD.

    Returns:
      The cache with these positions; and hidden_BD with the final hidden state of the last
      token of every prompt that ends in this chunk.
    """
    _, hidden_BLD, cache = _run_chunk(
        parameters, cache, token_ids_BL, start, lengths_B, config, dtype, quant, host, form
    )
    last_B = lengths_B - 1 - start
    last_hidden_BD = jnp.take_along_axis(
        hidden_BLD, jnp.maximum(last_B, 0)[:, None, None], axis=1, mode="clip"
    )[:, 0]
    ends_here_B = (last_B >= 0) & (last_B < token_ids_BL.shape[1])
    return cache, jnp.where(ends_here_B[:, None], last_hidden_BD, hidden_BD)


@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype", "quant", "host", "form"),
    donate_argnames=("cache",),
)
def score_chunk(
    parameters: tuple[jax.Array, ...],
    cache: KVCache,
    token_ids_BL: Int[Array, "B L"],
    start: Int[Array, ""],
    lengths_B: Int[Array, " B"],
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
    form: ExpertForm,
) -> tuple[KVCache, Float[Array, "B L V"]]:
    """Like prefill_chunk, but returns the logits of every position. Donates: cache."""
    model, hidden_BLD, cache = _run_chunk(
        parameters, cache, token_ids_BL, start, lengths_B, config, dtype, quant, host, form
    )
    return cache, model.logits(hidden_BLD)


def _run_chunk(parameters, cache, token_ids_BL, start, lengths_B, config, dtype, quant, host, form):
    batch_size, num_positions = token_ids_BL.shape
    valid_BL = start + jnp.arange(num_positions) < lengths_B[:, None]
    model = rebuild(config, dtype, parameters, quant, host)
    hidden_BLD, cache, _ = model(token_ids_BL, jnp.full(batch_size, start), valid_BL, cache, form)
    return model, hidden_BLD, cache


@functools.partial(jax.jit, static_argnames=("config", "dtype", "quant", "host", "kind"))
def first_tokens(
    parameters: tuple[jax.Array, ...],
    hidden_BD: Float[Array, "B D"],
    lengths_B: Int[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """Chooses every sequence's first new token, from the hidden states of the prefill."""
    model = rebuild(config, dtype, parameters, quant, host)
    return next_tokens(model.logits(hidden_BD), lengths_B, seen_BV, key_data, values, kind)


@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype", "quant", "host", "form", "kind"),
    donate_argnames=("state",),
)
def decode_step(
    parameters: tuple[jax.Array, ...],
    state: DecodeState,
    active_B: Bool[Array, " B"],
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
    form: ExpertForm,
    kind: SamplingKind,
) -> tuple[DecodeState, Int[Array, " B"]]:
    """One token of every active sequence: the whole step is this one executable.

    Donates: state.

    Returns:
      The next state; and its token ids once more, in an array of their own, which outlives
      the donation of the state to the next step.
    """
    model = rebuild(config, dtype, parameters, quant, host)
    hidden_BLD, cache, _ = model(
        state.token_ids_B[:, None], state.lengths_B, active_B[:, None], state.cache, form
    )
    lengths_B = state.lengths_B + active_B
    token_ids_B, seen_BV = next_tokens(
        model.logits(hidden_BLD[:, 0]), lengths_B, state.seen_BV, key_data, values, kind
    )
    return DecodeState(cache, lengths_B, token_ids_B, seen_BV), token_ids_B


# XLA:CPU of jaxlib 0.10.2 converts bfloat16 weights to float32, and this pass moves the
# conversion of all experts in front of the loop that reads two of them: 20 times slower.
CPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@functools.lru_cache(maxsize=256)  # asking takes milliseconds
def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a program takes beside arguments and results, as XLA says; 0 if it does not."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


class ProgramCache:
    """Compiles each program once per set of shapes and static arguments.

    Compilation happens only in ``get``, never when a program is called: a compiled program
    refuses other shapes instead of compiling again.

    Attributes:
      num_compiled: programs compiled so far.
    """

    def __init__(self, device: jax.Device):
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._compiler_options = CPU_COMPILER_OPTIONS if device.platform == "cpu" else None
        self._programs: dict[Any, jax.stages.Compiled] = {}

    @property
    def num_compiled(self) -> int:
        return len(self._programs)

    def get(self, program: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
        """The compiled form of a program.

        Args:
          program: one of this module's functions, made by jax.jit.
          *args: pytrees of jax.ShapeDtypeStruct or of arrays: only shapes are looked at.
          **static: its static arguments.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, str(leaf.dtype), _memory_kind(leaf)) for leaf in leaves)
        key = (program, shapes, structure, *sorted(static.items()))
        if key not in self._programs:
            abstract = jax.tree.map(self._abstract, args)
            lowered = program.lower(*abstract, **static)
            self._programs[key] = lowered.compile(compiler_options=self._compiler_options)
        return self._programs[key]

    def _abstract(self, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding, kind = self._sharding, _memory_kind(leaf)
        if kind is not None:
            sharding = sharding.with_memory_kind(kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _memory_kind(leaf: Any) -> str | None:
    """Of arrays in host memory, which programs are compiled for; None is the device's own."""
    kind = leaf.sharding.memory_kind if isinstance(leaf, jax.Array) else None
    return kind if kind == "pinned_host" else None
