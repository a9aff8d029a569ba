"""The decoder: one flow for every family, its parts chosen by ModelConfig.

Modules define names and shapes and run functionally: ``abstract_decoder`` gives the structure
without weights, programs rebuild the module from a flat tuple of arrays while they
are traced, and compiled code sees arrays only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.models import rope
from jmoe.models.attention import Attention
from jmoe.models.experts import ExpertForm, Experts
from jmoe.models.kv_cache import KVCache, LayerCache
from jmoe.models.linear import embed, linear
from jmoe.models.norms import NORMS
from jmoe.models.router import Routing, route
from jmoe.models.weights import matrix, parameter
from jmoe.native.choice import HostKernels
from jmoe.quant.spec import QuantSpec

Abstract = tuple[nnx.GraphDef, nnx.State]
Parameters = tuple[jax.Array | np.ndarray, ...]


def rotation_at(
    start_B: Int[Array, " B"], num_positions: int, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of positions start_B to start_B + num_positions - 1."""
    positions_BL = start_B[:, None] + jnp.arange(num_positions)
    return rope.rotation(positions_BL, config.rope, config.head_dim)


class DecoderLayer(nnx.Module):
    """Attention, router and experts, each behind a norm and added to the residual stream.

    Without experts it is what an engine runs that keeps those elsewhere (``rebuild_layer``).
    """

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        dtype: str,
        quant: QuantSpec | None,
        host: HostKernels | None,
        with_experts: bool = True,
    ):
        make_norm = NORMS[config.norm.kind]
        self.router_config = config.router
        self.input_norm = make_norm(config.norm, config.hidden_size, dtype)
        self.attention = Attention(config, window, dtype, quant, host)
        self.post_norm = make_norm(config.norm, config.hidden_size, dtype)
        self.router = parameter((config.router.num_experts, config.hidden_size), dtype)
        if with_experts:
            self.experts = Experts(config, dtype, quant, host)

    def attend(self, x_BLD, start_B, rotation, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Adds attention to the residual stream."""
        out_BLD, cache = self.attention(self.input_norm(x_BLD), start_B, rotation, cache)
        return x_BLD + out_BLD, cache

    def route(self, x_TD: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], Routing]:
        """The normalised tokens that experts read, and the experts that they go to."""
        normed_TD = self.post_norm(x_TD)
        return normed_TD, route(normed_TD, self.router[...], self.router_config)

    def predict(self, x_TD: Float[Array, "T D"], num_experts: int) -> Int[Array, "T N"]:
        """Experts that the router would choose for the residual stream of an earlier layer.

        The stream changes little from layer to layer: https://arxiv.org/abs/2312.17238, 3.2.
        """
        config = dataclasses.replace(self.router_config, top_k=num_experts)
        return route(self.post_norm(x_TD), self.router[...], config).expert_ids_TK

    def __call__(
        self, x_BLD, start_B, valid_BL, rotation, cache: LayerCache, form: ExpertForm
    ) -> tuple[jax.Array, LayerCache, Routing]:
        x_BLD, cache = self.attend(x_BLD, start_B, rotation, cache)
        normed_TD, routing = self.route(x_BLD.reshape(-1, x_BLD.shape[-1]))
        out_TD = self.experts(normed_TD, routing, valid_BL.reshape(-1), form)
        return x_BLD + out_TD.reshape(x_BLD.shape), cache, routing


class Ends(nnx.Module):
    """What comes before the first layer of a decoder and after the last one."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        quant: QuantSpec | None = None,
        host: HostKernels | None = None,
    ):
        vocabulary_shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.dtype = dtype
        self.host = host
        self.embed_tokens = matrix(vocabulary_shape, quant and quant.embeddings, dtype)
        self.final_norm = NORMS[config.norm.kind](config.norm, config.hidden_size, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = matrix(vocabulary_shape, quant and quant.head, dtype)

    def embed(self, token_ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """The residual stream before the first layer."""
        return embed(token_ids, self.embed_tokens[...]).astype(self.dtype)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Scores of every token of the vocabulary, float32, from normalised hidden states."""
        with jax.named_scope("lm_head"):
            tied = self.config.tie_word_embeddings
            head = self.embed_tokens if tied else self.lm_head
            return linear(hidden, head[...], self.host)


class Decoder(Ends):
    """A Mixture-of-Experts decoder.

    Made without weights: see ``rebuild``.

    Args:
      config: the model.
      dtype: of activations and of parameters that are not quantized.
      quant: formats of the others; experts are blobs then (quant.layout). None: all
        parameters are plain arrays of dtype.
      host: kernels that compute instead of XLA where there are some, for the CPU backend.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        quant: QuantSpec | None = None,
        host: HostKernels | None = None,
    ):
        super().__init__(config, dtype, quant, host)
        self.layers = nnx.List(
            [DecoderLayer(config, window, dtype, quant, host) for window in config.sliding_windows]
        )

    def __call__(
        self,
        token_ids_BL: Int[Array, "B L"],
        start_B: Int[Array, " B"],
        valid_BL: Bool[Array, "B L"],
        cache: KVCache,
        form: ExpertForm,
    ) -> tuple[Float[Array, "B L D"], KVCache, tuple[Routing, ...]]:
        """Takes L new tokens of every sequence through all layers.

        Args:
          token_ids_BL: the tokens, at positions start_B to start_B + L - 1.
          start_B: how many positions of each sequence the cache holds already.
          valid_BL: which tokens are real; the others are padding, at the end of a sequence.
          cache: with room for start_B + L positions.
          form: how the experts are computed (``experts.choose_form``).

        Returns:
          The normalised hidden states, for ``logits``; the cache with the new positions; and
          each layer's routing, which costs nothing in a program that does not return it.
        """
        rotation = rotation_at(start_B, token_ids_BL.shape[1], self.config)
        x_BLD = self.embed(token_ids_BL)
        layer_caches, routings = [], []
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x_BLD, layer_cache, routing = layer(
                    x_BLD, start_B, valid_BL, rotation, layer_cache, form
                )
            layer_caches.append(layer_cache)
            routings.append(routing)
        return self.final_norm(x_BLD), KVCache(tuple(layer_caches)), tuple(routings)


@functools.lru_cache(maxsize=8)
def abstract_decoder(
    config: ModelConfig,
    dtype: str = "bfloat16",
    quant: QuantSpec | None = None,
    host: HostKernels | None = None,
) -> Abstract:
    """Structure and shapes of a decoder, without allocating anything."""
    return nnx.split(Decoder(config, dtype, quant, host))


@functools.lru_cache(maxsize=8)
def abstract_ends(
    config: ModelConfig, dtype: str, quant: QuantSpec | None, host: HostKernels | None
) -> Abstract:
    """Likewise of what comes before and after the layers."""
    return nnx.split(Ends(config, dtype, quant, host))


@functools.lru_cache(maxsize=8)
def abstract_layer(
    config: ModelConfig,
    window: int | None,
    dtype: str,
    quant: QuantSpec | None,
    host: HostKernels | None,
) -> Abstract:
    """Likewise of a layer without its experts."""
    return nnx.split(DecoderLayer(config, window, dtype, quant, host, with_experts=False))


def abstract_parameters(
    config: ModelConfig, dtype: str = "bfloat16", quant: QuantSpec | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter's shape by dotted path, in the order of ``rebuild``'s arrays."""
    _, state = abstract_decoder(config, dtype, quant)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    # The last key of a path is the value inside nnx.Param.
    return {".".join(str(key.key) for key in path[:-1]): leaf for path, leaf in leaves}


def rebuild(
    config: ModelConfig,
    dtype: str,
    parameters: Parameters,
    quant: QuantSpec | None = None,
    host: HostKernels | None = None,
) -> Decoder:
    """A decoder that holds the given arrays, for use while a program is traced.

    Args:
      config: the model.
      dtype: of activations and plain parameters.
      parameters: arrays in the order of ``abstract_parameters``.
      quant: formats of the quantized parameters.
      host: kernels to compute with, on the CPU backend.
    """
    return _merge(abstract_decoder(config, dtype, quant, host), parameters)


def rebuild_ends(
    config: ModelConfig,
    dtype: str,
    parameters: Parameters,
    quant: QuantSpec | None,
    host: HostKernels | None,
) -> Ends:
    """Like ``rebuild``: from those of its arrays that belong to no layer."""
    return _merge(abstract_ends(config, dtype, quant, host), parameters)


def rebuild_layer(
    config: ModelConfig,
    window: int | None,
    dtype: str,
    parameters: Parameters,
    quant: QuantSpec | None,
    host: HostKernels | None,
) -> DecoderLayer:
    """Like ``rebuild``: from those of its arrays that belong to one layer, but for its experts."""
    return _merge(abstract_layer(config, window, dtype, quant, host), parameters)


def _merge(abstract: Abstract, parameters: Parameters) -> Any:
    graphdef, state = abstract
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), parameters))
