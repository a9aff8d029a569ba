"""Programs of a layer or less, for engines whose experts come and go.

A token goes through the first program, one program per layer, and the last one. Each takes the
experts of its layer as arguments, an array each, adds their outputs in top-k order, and goes on to
the attention and the router of the next layer, because what the host needs to know then are the ids
of that layer: the only thing that it reads back. With a few tokens at once a layer may use more
experts than a program takes; ``some_experts`` applies the others before.

Which program runs, with which shapes, depends on the routing alone and never on where experts were.
So the results do not either.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jmoe.config import ModelConfig
from jmoe.engines.programs import next_tokens
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models.decoder import DecoderLayer, Ends, rebuild_ends, rebuild_layer, rotation_at
from jmoe.models.experts import combine, expert_form, expert_output
from jmoe.models.kv_cache import LayerCache
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatic:
    """What these programs are specialised to.

    Attributes:
      config: the model.
      dtype: of activations and plain parameters.
      quant: formats of the parameters; experts are blobs.
      host: kernels to compute with, on the CPU backend.
      platform: "cpu", "gpu" or "tpu".
      window: sliding window of the layer whose attention is computed.
      num_predicted: experts per token that are predicted for each later layer.
    """

    config: ModelConfig
    dtype: str
    quant: QuantSpec
    host: HostKernels | None
    platform: str
    window: int | None
    num_predicted: int

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.config.hidden_size, self.config.intermediate_size, self.quant)

    @property
    def choice_width(self) -> int:
        """Ids of a token and layer in the array that the host reads."""
        return max(self.config.router.top_k, self.num_predicted)


# Ids of experts, an int32 each; -1 counts as none. They are on the device already: what is copied
# there waits for copies of experts that have begun.
Group = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """A layer between its router and its experts.

    Attributes:
      x_BLD: residual stream behind attention.
      normed_TD: what experts read.
      weights_TK: of the chosen experts.
      ids_TK: the chosen experts; -1 for tokens that are not computed.
    """

    x_BLD: Float[Array, "B L D"]
    normed_TD: Float[Array, "T D"]
    weights_TK: Float[Array, "T K"]
    ids_TK: Int[Array, "T K"]


_donating = functools.partial(jax.jit, static_argnames=("static",))


@functools.partial(_donating, donate_argnames=("cache",))
def first_layer(
    ends: tuple[jax.Array, ...],
    layer: tuple[jax.Array, ...],
    ahead: tuple[tuple[jax.Array, ...], ...],
    cache: LayerCache,
    token_ids_BL: Int[Array, "B ..."],
    start_B: Int[Array, " B"],
    valid_BL: Bool[Array, "B ..."],
    *,
    static: LayerStatic,
) -> tuple[Routed, LayerCache, Int[Array, "N T W"]]:
    """Embeds tokens and takes them to the experts of the first layer.

    Args:
      ends: parameters of ``decoder.Ends``.
      layer: parameters of the layer, without experts.
      ahead: likewise of the layers after it, whose experts are predicted.
      cache: of this layer.
      token_ids_BL: the tokens; in a decode step [B].
      start_B: their first position, by sequence.
      valid_BL: which of them are computed, of the same shape.

    Donates: cache.

    Returns:
      The layer's state, its cache, and for the host the ids of the chosen experts, then those
      predicted for each later layer; -1 where there is none.
    """
    token_ids_BL = token_ids_BL.reshape(start_B.shape[0], -1)
    x_BLD = _ends(ends, static).embed(token_ids_BL)
    return _attend_and_route(layer, ahead, cache, x_BLD, start_B, valid_BL, static)


@functools.partial(_donating, donate_argnames=("cache",))
def next_layer(
    blobs: tuple[jax.Array, ...],
    group: Group | None,
    routed: Routed,
    y_TKD: Float[Array, "T K D"] | None,
    y_host_TKD: Float[Array, "T K D"] | None,
    layer: tuple[jax.Array, ...],
    ahead: tuple[tuple[jax.Array, ...], ...],
    cache: LayerCache,
    start_B: Int[Array, " B"],
    valid_BL: Bool[Array, "B ..."],
    *,
    static: LayerStatic,
) -> tuple[Routed, LayerCache, Int[Array, "N T W"]]:
    """Applies the experts of a layer, and goes on to those of the next one.

    Args:
      blobs: experts, an array each.
      group: which ones these are. None: those that the only token chose,
        in its order, or no experts.
      routed: state of the layer.
      y_TKD: outputs of its other experts (``some_experts``), if there are any.
      y_host_TKD: outputs of experts that the host computed; zeros for all others. It may be in
        the host's memory.
      layer: parameters of the next layer; and so on, as in ``first_layer``.

    Donates: cache.
    """
    y_TKD = _apply(blobs, group, routed, y_TKD, static, y_host_TKD)
    x_BLD = _add_experts(routed, y_TKD)
    return _attend_and_route(layer, ahead, cache, x_BLD, start_B, valid_BL, static)


@functools.partial(_donating, donate_argnames=("y_TKD",))
def some_experts(
    blobs: tuple[jax.Array, ...],
    group: Group,
    routed: Routed,
    y_TKD: Float[Array, "T K D"],
    *,
    static: LayerStatic,
) -> Float[Array, "T K D"]:
    """Enters the outputs of a group of experts. Donates: y_TKD."""
    return _apply(blobs, group, routed, y_TKD, static)


@functools.partial(jax.jit, static_argnames=("static", "kind"), donate_argnames=("seen_BV",))
def last_experts(
    blobs: tuple[jax.Array, ...],
    group: Group | None,
    routed: Routed,
    y_TKD: Float[Array, "T K D"] | None,
    y_host_TKD: Float[Array, "T K D"] | None,
    ends: tuple[jax.Array, ...],
    lengths_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    *,
    static: LayerStatic,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Int[Array, " B"], Bool[Array, "B V"] | None]:
    """Applies the experts of the last layer and chooses the next tokens.

    Donates: seen_BV.

    Returns:
      Token ids, new lengths, tokens seen.
    """
    model, hidden_BLD = _finish(blobs, group, routed, y_TKD, y_host_TKD, ends, static)
    lengths_B = lengths_B + active_B
    logits_BV = model.logits(hidden_BLD[:, 0])
    token_ids_B, seen_BV = next_tokens(logits_BV, lengths_B, seen_BV, key_data, values, kind)
    return token_ids_B, lengths_B, seen_BV


@_donating
def last_logits(
    blobs: tuple[jax.Array, ...],
    group: Group | None,
    routed: Routed,
    y_TKD: Float[Array, "T K D"] | None,
    y_host_TKD: Float[Array, "T K D"] | None,
    ends: tuple[jax.Array, ...],
    *,
    static: LayerStatic,
) -> Float[Array, "B L V"]:
    """Like ``last_experts``, but returns the logits."""
    model, hidden_BLD = _finish(blobs, group, routed, y_TKD, y_host_TKD, ends, static)
    return model.logits(hidden_BLD)


@functools.partial(_donating, donate_argnames=("y_AD",))
def expert_rows(
    blob: jax.Array,
    rows_R: Int[Array, " R"],
    routed: Routed,
    y_AD: Float[Array, "A1 D"],
    *,
    static: LayerStatic,
) -> Float[Array, "A1 D"]:
    """Takes the tokens that chose one expert through it, for prompts.

    Args:
      blob: the expert.
      rows_R: assignments t * K + k; A for rows of padding.
      routed: state of the layer.
      y_AD: outputs by assignment, and a last row for padding.

    Donates: y_AD.
    """
    top_k = static.config.router.top_k
    num_assignments = y_AD.shape[0] - 1
    valid_R = rows_R < num_assignments
    x_RD = routed.normed_TD[jnp.minimum(rows_R // top_k, routed.normed_TD.shape[0] - 1)]
    return y_AD.at[rows_R].set(_expert(x_RD, valid_R, blob, static))


@functools.partial(_donating, donate_argnames=("y_AD",))
def enter_rows(
    out_RD: Float[Array, "R D"],
    rows_R: Int[Array, " R"],
    y_AD: Float[Array, "A1 D"],
    *,
    static: LayerStatic,
) -> Float[Array, "A1 D"]:
    """Enters what the host computed; rows as for ``expert_rows``. Donates: y_AD."""
    return y_AD.at[rows_R].set(out_RD)


@functools.partial(_donating, donate_argnames=("cache",))
def next_prompt_layer(
    routed: Routed,
    y_AD: Float[Array, "A1 D"],
    layer: tuple[jax.Array, ...],
    ahead: tuple[tuple[jax.Array, ...], ...],
    cache: LayerCache,
    start_B: Int[Array, " B"],
    valid_BL: Bool[Array, "B L"],
    *,
    static: LayerStatic,
) -> tuple[Routed, LayerCache, Int[Array, "N T W"]]:
    """Like ``next_layer``, from outputs by assignment. Donates: cache."""
    x_BLD = _add_experts(routed, _by_token(y_AD, static))
    return _attend_and_route(layer, ahead, cache, x_BLD, start_B, valid_BL, static)


@functools.partial(_donating, donate_argnames=("hidden_BD",))
def prompt_hidden(
    routed: Routed,
    y_AD: Float[Array, "A1 D"],
    ends: tuple[jax.Array, ...],
    last_B: Int[Array, " B"],
    hidden_BD: Float[Array, "B D"],
    *,
    static: LayerStatic,
) -> Float[Array, "B D"]:
    """Final hidden states of the last tokens of the prompts that end in this chunk.

    Args:
      last_B: index of that token in the chunk; outside of it for other prompts.
      hidden_BD: of the prompts that ended before.

    Donates: hidden_BD.
    """
    model = _ends(ends, static)
    hidden_BLD = model.final_norm(_add_experts(routed, _by_token(y_AD, static)))
    index_B11 = jnp.clip(last_B, 0, hidden_BLD.shape[1] - 1)[:, None, None]
    last_hidden_BD = jnp.take_along_axis(hidden_BLD, index_B11, axis=1)[:, 0]
    ends_here_B = (last_B >= 0) & (last_B < hidden_BLD.shape[1])
    return jnp.where(ends_here_B[:, None], last_hidden_BD, hidden_BD)


@_donating
def prompt_logits(
    routed: Routed,
    y_AD: Float[Array, "A1 D"],
    ends: tuple[jax.Array, ...],
    *,
    static: LayerStatic,
) -> Float[Array, "B L V"]:
    """Logits of every position of a chunk."""
    model = _ends(ends, static)
    return model.logits(model.final_norm(_add_experts(routed, _by_token(y_AD, static))))


@functools.partial(jax.jit, static_argnames=("static", "kind"))
def first_tokens(
    ends: tuple[jax.Array, ...],
    hidden_BD: Float[Array, "B D"],
    lengths_B: Int[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    key_data: UInt32[Array, "2"],
    values: SamplingValues,
    *,
    static: LayerStatic,
    kind: SamplingKind,
) -> tuple[Int[Array, " B"], Bool[Array, "B V"] | None]:
    """Chooses every sequence's first new token, as ``programs.first_tokens``."""
    logits_BV = _ends(ends, static).logits(hidden_BD)
    return next_tokens(logits_BV, lengths_B, seen_BV, key_data, values, kind)


def _ends(parameters: tuple[jax.Array, ...], static: LayerStatic) -> Ends:
    return rebuild_ends(static.config, static.dtype, parameters, static.quant, static.host)


def _expert(x_RD: jax.Array, valid_R: jax.Array, blob: jax.Array, static: LayerStatic) -> jax.Array:
    form = expert_form(x_RD.shape[0], static.platform)
    activation = static.config.hidden_act
    return expert_output(x_RD, valid_R, blob, static.layout, activation, form, static.host)


def _apply(
    blobs: tuple[jax.Array, ...],
    group: Group | None,
    routed: Routed,
    y_TKD: jax.Array | None,
    static: LayerStatic,
    y_host_TKD: jax.Array | None = None,
) -> jax.Array:
    """Outputs of experts by token and choice, [T, K, D] in float32."""
    if y_host_TKD is not None:
        assert y_TKD is not None and not blobs
        return y_TKD + jax.device_put(y_host_TKD, jax.memory.Space.Device)
    if group is None:
        assert routed.ids_TK.shape == (1, len(blobs)) and y_TKD is None
        valid_R = jnp.ones(1, bool)
        outputs = [_expert(routed.normed_TD, valid_R, blob, static) for blob in blobs]
        return jnp.stack(outputs, axis=1)
    if y_TKD is None:
        y_TKD = jnp.zeros((*routed.ids_TK.shape, routed.normed_TD.shape[1]), jnp.float32)
    for g, blob in enumerate(blobs):
        uses_TK = (routed.ids_TK == group[g]) & (group[g] >= 0)
        output_TD = _expert(routed.normed_TD, jnp.any(uses_TK, axis=1), blob, static)
        y_TKD = jnp.where(uses_TK[..., None], output_TD[:, None], y_TKD)
    return y_TKD


def _add_experts(routed: Routed, y_TKD: jax.Array) -> jax.Array:
    out_TD = combine(y_TKD, routed.weights_TK).astype(routed.x_BLD.dtype)
    return routed.x_BLD + out_TD.reshape(routed.x_BLD.shape)


def _by_token(y_AD: jax.Array, static: LayerStatic) -> jax.Array:
    return y_AD[:-1].reshape(-1, static.config.router.top_k, y_AD.shape[1])


def _finish(
    blobs, group, routed, y_TKD, y_host_TKD, ends, static: LayerStatic
) -> tuple[Ends, jax.Array]:
    model = _ends(ends, static)
    y_TKD = _apply(blobs, group, routed, y_TKD, static, y_host_TKD)
    return model, model.final_norm(_add_experts(routed, y_TKD))


def _attend_and_route(
    parameters: tuple[jax.Array, ...],
    ahead: tuple[tuple[jax.Array, ...], ...],
    cache: LayerCache,
    x_BLD: jax.Array,
    start_B: jax.Array,
    valid_BL: jax.Array,
    static: LayerStatic,
) -> tuple[Routed, LayerCache, jax.Array]:
    def rebuild(parameters: tuple[jax.Array, ...]) -> DecoderLayer:
        return rebuild_layer(
            static.config, static.window, static.dtype, parameters, static.quant, static.host
        )

    layer = rebuild(parameters)
    rotation = rotation_at(start_B, x_BLD.shape[1], static.config)
    x_BLD, cache = layer.attend(x_BLD, start_B, rotation, cache)
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    normed_TD, routing = layer.route(x_TD)
    valid_T1 = valid_BL.reshape(-1, 1)
    ids_TK = jnp.where(valid_T1, routing.expert_ids_TK, -1)
    with jax.named_scope("look_ahead"):
        predicted = [rebuild(later).predict(x_TD, static.num_predicted) for later in ahead]
    choices_NTW = jnp.full((1 + len(ahead), len(x_TD), static.choice_width), -1, jnp.int32)
    for n, ids in enumerate([ids_TK, *predicted]):
        choices_NTW = choices_NTW.at[n, :, : ids.shape[1]].set(jnp.where(valid_T1, ids, -1))
    return Routed(x_BLD, normed_TD, routing.weights_TK, ids_TK), cache, choices_NTW
