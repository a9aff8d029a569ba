"""A whole decode step, the expert cache and its misses included, as one program.

No Python runs between the layers of a token, and several tokens can be made in one call. Layers are
unrolled: so a layer's weights are arrays of their own, which are read in place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jmoe.config import ModelConfig
from jmoe.engines.programs import DecodeState, next_tokens
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models.decoder import DecoderLayer, rebuild_ends, rebuild_layer, rotation_at
from jmoe.models.experts import combine, experts_in_slots
from jmoe.models.kv_cache import KVCache
from jmoe.models.router import Routing
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import QuantSpec
from jmoe.residency.array_cache import CacheState, CacheStatic, fetch_ahead, hold


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepStatic:
    """What the program is specialised to.

    Attributes:
      config: the model.
      dtype: of activations and plain parameters.
      quant: formats of the parameters; experts are blobs.
      host: kernels to compute with, on the CPU backend.
      platform: "cpu", "gpu" or "tpu".
      cache: shape of the expert cache.
      kind: how tokens are chosen.
      num_tokens: made in one call at most.
      num_ahead: experts that are fetched ahead for the next layer; 0 is none.
    """

    config: ModelConfig
    dtype: str
    quant: QuantSpec
    host: HostKernels | None
    platform: str
    cache: CacheStatic
    kind: SamplingKind
    num_tokens: int = 1
    num_ahead: int = 0

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.config.hidden_size, self.config.intermediate_size, self.quant)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Where sequences end within a call.

    Attributes:
      stop_ids: tokens that end a sequence; -1 for none.
      lengths_B: tokens of each sequence, prompt and new ones, at which it ends.
    """

    stop_ids: Int[Array, " stops"]
    lengths_B: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """What a call made. Entries of sequences that had ended are rubbish.

    Attributes:
      token_ids_NB: by step and sequence.
      num_steps: that were taken: fewer than N if all sequences ended.
      chosen_NLBK: experts; -1 for sequences that are not computed.
      logits_NBV: if tokens were given; else None.
    """

    token_ids_NB: Int[Array, "N B"]
    num_steps: Int[Array, ""]
    chosen_NLBK: Int[Array, "N L B K"]
    logits_NBV: Float[Array, "N B V"] | None


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("state", "experts"))
def decode_tokens(
    ends: tuple[jax.Array, ...],
    layers: tuple[tuple[jax.Array, ...], ...],
    host: tuple[jax.Array, ...],
    state: DecodeState,
    experts: CacheState,
    active_B: Bool[Array, " B"],
    limits: Limits,
    given_NB: Int[Array, "N B"] | None,
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    *,
    static: StepStatic,
) -> tuple[DecodeState, CacheState, Made]:
    """Makes up to static.num_tokens tokens of every active sequence.

    Args:
      ends: parameters of ``decoder.Ends``.
      layers: by layer its parameters, without experts.
      host: by layer the blobs of all its experts [E, items], in host memory.
      state: of the sequences.
      experts: the expert cache.
      active_B: sequences that are computed.
      limits: where they end.
      given_NB: tokens to take instead of those that are chosen, to score them; or None.
      key_data: and values: see ``programs.next_tokens``.

    Donates: state, experts.
    """
    num_tokens, batch_size = static.num_tokens, active_B.shape[0]
    config = static.config
    chosen_shape = (config.num_hidden_layers, batch_size, config.router.top_k)
    made = Made(
        token_ids_NB=jnp.zeros((num_tokens, batch_size), jnp.int32),
        num_steps=jnp.int32(0),
        chosen_NLBK=jnp.full((num_tokens, *chosen_shape), -1, jnp.int32),
        logits_NBV=None
        if given_NB is None
        else jnp.zeros((num_tokens, batch_size, config.vocab_size), jnp.float32),
    )

    def goes_on(carry: tuple) -> jax.Array:
        _, _, active_B, made = carry
        return (made.num_steps < num_tokens) & jnp.any(active_B)

    def one_token(carry: tuple) -> tuple:
        state, experts, active_B, made = carry
        n = made.num_steps
        logits_BV, cache, experts, chosen_LBK = take_token(
            ends, layers, host, state, experts, active_B, static
        )
        lengths_B = state.lengths_B + active_B
        token_ids_B, seen_BV = next_tokens(
            logits_BV, lengths_B, state.seen_BV, key_data, values, static.kind
        )
        logits_NBV = made.logits_NBV
        if given_NB is not None:
            token_ids_B = given_NB[n]
            logits_NBV = logits_NBV.at[n].set(logits_BV)
        stops_B = jnp.any(token_ids_B[:, None] == limits.stop_ids, axis=1)
        ends_B = stops_B | (lengths_B + 1 >= limits.lengths_B)
        made = Made(
            token_ids_NB=made.token_ids_NB.at[n].set(token_ids_B),
            num_steps=n + 1,
            chosen_NLBK=made.chosen_NLBK.at[n].set(chosen_LBK),
            logits_NBV=logits_NBV,
        )
        state = DecodeState(cache, lengths_B, token_ids_B, seen_BV)
        return state, experts, active_B & ~ends_B, made

    carry = (state, experts, active_B, made)
    if num_tokens == 1:
        state, experts, _, made = one_token(carry)
    else:
        state, experts, _, made = lax.while_loop(goes_on, one_token, carry)
    return state, experts, made


def take_token(
    ends: tuple[jax.Array, ...],
    layers: tuple[tuple[jax.Array, ...], ...],
    host: tuple[jax.Array, ...],
    state: DecodeState,
    experts: CacheState,
    active_B: jax.Array,
    static: StepStatic,
) -> tuple[jax.Array, KVCache, CacheState, jax.Array]:
    """Takes the last token of every sequence through the model.

    Returns:
      Logits [B, V], the KV cache, the expert cache, and the chosen experts [L, B, K].
    """
    config = static.config
    model = rebuild_ends(config, static.dtype, ends, static.quant, static.host)

    def rebuild(i: int) -> DecoderLayer:
        window = config.sliding_windows[i]
        return rebuild_layer(config, window, static.dtype, layers[i], static.quant, static.host)

    rotation = rotation_at(state.lengths_B, 1, config)
    x_BLD = model.embed(state.token_ids_B[:, None])
    caches, chosen = [], []
    for i in range(config.num_hidden_layers):
        with jax.named_scope(f"layer_{i}"):
            layer = rebuild(i)
            x_BLD, cache = layer.attend(x_BLD, state.lengths_B, rotation, state.cache.layers[i])
            normed_TD, routing = layer.route(x_BLD[:, 0])
            ids_TK = jnp.where(active_B[:, None], routing.expert_ids_TK, -1)
            predicted_TN = None
            # A shared pool holds what is needed now.
            if static.num_ahead and any(static.cache.slots[i + 1 : i + 2]):
                predicted_TN = rebuild(i + 1).predict(x_BLD[:, 0], static.num_ahead)
                predicted_TN = jnp.where(active_B[:, None], predicted_TN, -1)
            experts, out_TD = _experts(
                experts, i, normed_TD, ids_TK, routing, predicted_TN, host, static
            )
            x_BLD = x_BLD + out_TD[:, None]
        caches.append(cache)
        chosen.append(ids_TK)
    logits_BV = model.logits(model.final_norm(x_BLD)[:, 0])
    return logits_BV, KVCache(tuple(caches)), experts, jnp.stack(chosen)


def _experts(
    cache: CacheState,
    layer: int,
    x_TD: Float[Array, "T D"],
    ids_TK: Int[Array, "T K"],
    routing: Routing,
    predicted_TN: Int[Array, "T N"] | None,
    host: tuple[jax.Array, ...],
    static: StepStatic,
) -> tuple[CacheState, Float[Array, "T D"]]:
    """Fetches what a layer needs and applies it: in rounds, if that is more than its slots."""
    num_tokens = len(ids_TK)
    _, num_slots = static.cache.pool(layer)
    needed_U = ids_TK[0] if num_tokens == 1 else _union(ids_TK, static.cache.num_experts)

    def one_round(
        cache: CacheState, round_U: jax.Array, predicted_TN: jax.Array | None
    ) -> tuple[CacheState, jax.Array]:
        cache, slot_U = hold(cache, static.cache, layer, round_U, host[layer])
        if predicted_TN is not None:
            # Before the experts are read, or XLA would copy the slots.
            slots_ahead = static.cache.slots[layer + 1]
            predicted_U = _most_named(predicted_TN, static.cache.num_experts, slots_ahead)
            cache = fetch_ahead(cache, static.cache, layer + 1, predicted_U, host[layer + 1])
        if num_tokens == 1:
            slot_TK = jnp.where(round_U >= 0, slot_U, -1)[None]
        else:
            is_here_TKU = (ids_TK[..., None] == round_U) & (round_U >= 0)
            slot_TK = jnp.max(jnp.where(is_here_TKU, slot_U, -1), axis=-1)
        return cache, experts_in_slots(
            x_TD,
            slot_TK,
            cache.slots_SI,
            static.layout,
            static.config.hidden_act,
            static.platform,
            static.host,
        )

    num_rounds = -(-len(needed_U) // num_slots)
    if num_rounds == 1:
        cache, y_TKD = one_round(cache, needed_U, predicted_TN)
    else:
        # A loop, in whose state the slots are: else XLA would copy them for every round. What is
        # predicted has to wait for its own layer then.
        padding = (0, num_rounds * num_slots - len(needed_U))
        rounds_NU = jnp.pad(needed_U, padding, constant_values=-1).reshape(num_rounds, num_slots)

        def add_round(n: jax.Array, carry: tuple) -> tuple:
            cache, y_TKD = carry
            cache, round_y_TKD = one_round(cache, rounds_NU[n], None)
            return cache, y_TKD + round_y_TKD

        y_TKD = jnp.zeros((*ids_TK.shape, x_TD.shape[1]), jnp.float32)
        cache, y_TKD = lax.fori_loop(0, num_rounds, add_round, (cache, y_TKD))
    return cache, combine(y_TKD, routing.weights_TK).astype(x_TD.dtype)


def _union(ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """Experts that occur, ascending, and then -1."""
    # -1 is the last one, which is dropped.
    used_E = jnp.zeros(num_experts + 1, bool).at[ids_TK].set(True)[:num_experts]
    (used_U,) = jnp.nonzero(used_E, size=min(ids_TK.size, num_experts), fill_value=-1)
    return used_U.astype(jnp.int32)


def _most_named(ids_TN: jax.Array, num_experts: int, limit: int) -> jax.Array:
    """Experts that occur, those that most tokens name first, at most as many as a token names."""
    num_named = min(ids_TN.shape[1], limit)
    if len(ids_TN) == 1:
        return ids_TN[0, :num_named]
    votes_E = jnp.zeros(num_experts + 1, jnp.int32).at[ids_TN].add(1)[:num_experts]
    votes_N, ids_N = lax.top_k(votes_E, num_named)
    return jnp.where(votes_N > 0, ids_N, -1)
