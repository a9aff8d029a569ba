"""The compiled programs of beams, of all engines: logits, their best continuations, the KV cache.

The host chooses the beams (``generation.beams``); these programs do not know which ones end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.engines.compiled_programs import StepStatic, take_token
from jmoe.engines.layer_programs import Group, LayerStatic, Routed, last_logits
from jmoe.engines.programs import DecodeState
from jmoe.generation.candidates import best_continuations
from jmoe.models.decoder import rebuild, rebuild_ends
from jmoe.models.experts import ExpertForm
from jmoe.models.kv_cache import KVCache, LayerCache
from jmoe.native.choice import HostKernels
from jmoe.quant.spec import QuantSpec
from jmoe.residency.array_cache import CacheState

# Positions that are copied at once from one beam to another.
COPIED_POSITIONS = 64

_model_arguments = ("config", "dtype", "quant", "host")


@functools.partial(jax.jit, static_argnames=_model_arguments)
def first_logits(
    parameters: tuple[jax.Array, ...],
    hidden_BD: Float[Array, "B D"],
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
) -> Float[Array, "B V"]:
    """Scores every prompt's next token, from the hidden states of the prefill: resident engine."""
    return rebuild(config, dtype, parameters, quant, host).logits(hidden_BD)


@functools.partial(jax.jit, static_argnames=("static",))
def first_offload_logits(
    ends: tuple[jax.Array, ...], hidden_BD: Float[Array, "B D"], *, static: LayerStatic
) -> Float[Array, "B V"]:
    """The same in the offload engine, from parameters of no layer."""
    model = rebuild_ends(static.config, static.dtype, ends, static.quant, static.host)
    return model.logits(hidden_BD)


@functools.partial(jax.jit, static_argnames=(*_model_arguments, "form"), donate_argnames=("cache",))
def step_logits(
    parameters: tuple[jax.Array, ...],
    cache: KVCache,
    lengths_B: Int[Array, " B"],
    token_ids_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    *,
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None = None,
    form: ExpertForm,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Takes the last token of every active beam through a resident model. Donates: cache."""
    model = rebuild(config, dtype, parameters, quant, host)
    hidden_BLD, cache, _ = model(token_ids_B[:, None], lengths_B, active_B[:, None], cache, form)
    return cache, model.logits(hidden_BLD[:, 0])


@functools.partial(jax.jit, static_argnames=("static",))
def last_offload_logits(
    blobs: tuple[jax.Array, ...],
    group: Group | None,
    routed: Routed,
    y_TKD: Float[Array, "T K D"] | None,
    y_host_TKD: Float[Array, "T K D"] | None,
    ends: tuple[jax.Array, ...],
    *,
    static: LayerStatic,
) -> Float[Array, "B V"]:
    """Applies the experts of the last layer: see ``layer_programs.last_logits``."""
    return last_logits(blobs, group, routed, y_TKD, y_host_TKD, ends, static=static)[:, 0]


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("cache", "experts"))
def cached_step_logits(
    ends: tuple[jax.Array, ...],
    layers: tuple[tuple[jax.Array, ...], ...],
    host: tuple[jax.Array, ...],
    cache: KVCache,
    lengths_B: Int[Array, " B"],
    token_ids_B: Int[Array, " B"],
    experts: CacheState,
    active_B: Bool[Array, " B"],
    *,
    static: StepStatic,
) -> tuple[KVCache, CacheState, Float[Array, "B V"], Int[Array, "L B K"]]:
    """Takes the last token of every active beam through a model whose program fetches experts.

    See ``compiled_programs.decode_tokens``. Donates: cache, experts.

    Returns:
      Both caches, the logits, and the experts that were chosen.
    """
    state = DecodeState(cache, lengths_B, token_ids_B, None)
    logits_BV, cache, experts, chosen_LBK = take_token(
        ends, layers, host, state, experts, active_B, static
    )
    return cache, experts, logits_BV, chosen_LBK


@functools.partial(jax.jit, static_argnames=("num_beams", "number"), donate_argnames=("seen_BV",))
def candidates(
    logits_BV: Float[Array, "B V"],
    log_probs_B: Float[Array, " B"],
    lengths_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    chosen_2B: Int[Array, "2 B"] | None,
    penalty: Float[Array, ""],
    *,
    num_beams: int,
    number: int,
) -> tuple[Float[Array, "N C"], Int[Array, "N C"], Int[Array, " B"], Bool[Array, "B V"] | None]:
    """The best continuations, behind a step.

    Args:
      logits_BV: of the step.
      log_probs_B: and seen_BV, penalty, num_beams, number: see ``best_continuations``.
      lengths_B: positions of each beam in the KV cache before the step.
      active_B: beams that were computed.
      seen_BV: tokens of the rows, before chosen_2B.
      chosen_2B: parents of the rows, among all of the batch, and their last tokens: to enter into
        seen_BV, or None.

    Donates: seen_BV.

    Returns:
      Log-probabilities and indices as ``best_continuations``, new lengths, tokens seen.
    """
    if seen_BV is not None and chosen_2B is not None:
        parents_B, token_ids_B = chosen_2B
        rows_B = jnp.arange(seen_BV.shape[0])
        seen_BV = seen_BV[parents_B].at[rows_B, token_ids_B].set(True)
    log_probs_NC, indices_NC = best_continuations(
        logits_BV, log_probs_B, seen_BV, penalty, num_beams=num_beams, number=number
    )
    return log_probs_NC, indices_NC, lengths_B + active_B, seen_BV


@functools.partial(jax.jit, static_argnames=("num_beams",))
def repeat_layer(cache: LayerCache, *, num_beams: int) -> LayerCache:
    """The KV cache of a layer, with every prompt's row num_beams times."""
    return jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), cache)


@functools.partial(jax.jit, donate_argnames=("cache",))
def follow_parents(cache: KVCache, copies: Int[Array, "B1 3"]) -> KVCache:
    """Gives beams that start in another row the new positions of the beam that they continue.

    What a prompt's beams have in common is there already. Nothing but what changes is read or
    written, so this takes hardly any memory.

    Args:
      cache: of all rows.
      copies: in the first row, how many copies there are, and of how many times COPIED_POSITIONS
        positions each; in the others, the row to copy from, the row to copy to, and the first
        position. No row is copied both from and to.

    Donates: cache.
    """
    num_copies, num_blocks = copies[0, 0], copies[0, 1]

    def copy_block(i: jax.Array, cache: KVCache) -> KVCache:
        source, target, first = copies[1 + i // num_blocks]
        position = first + i % num_blocks * COPIED_POSITIONS

        # A block that would end beyond the cache begins earlier, where both rows are equal by now.
        def copy(x: jax.Array) -> jax.Array:
            size = (1, x.shape[1], COPIED_POSITIONS, x.shape[3])
            block = lax.dynamic_slice(x, (source, 0, position, 0), size)
            return lax.dynamic_update_slice(x, block, (target, 0, position, 0))

        return jax.tree.map(copy, cache)

    return lax.fori_loop(0, num_copies * num_blocks, copy_block, cache)
