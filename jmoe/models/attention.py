"""Grouped-query attention over a KV cache, for prompts and for single steps alike.

Source: https://arxiv.org/abs/2305.13245; sliding windows as in Mistral 7B,
https://arxiv.org/abs/2310.06825.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.models import kv_cache, rope
from jmoe.models.linear import einsum, linear
from jmoe.models.weights import matrix
from jmoe.native import ops
from jmoe.native.choice import HostKernels
from jmoe.quant.spec import QuantSpec


def visible_keys(
    positions_BL: Int[Array, "B L"], num_keys: int, window: int | None
) -> Bool[Array, "B L M"]:
    """Which keys each query may see: those up to its own position, within the window."""
    keys_M = jnp.arange(num_keys)
    distance_BLM = positions_BL[..., None] - keys_M
    visible = distance_BLM >= 0
    return visible if window is None else visible & (distance_BLM < window)


def attend(
    q_BLHP: Float[Array, "B L H P"],
    k_BGMP: Float[Array, "B G M P"],
    v_BGMP: Float[Array, "B G M P"],
    visible_BLM: Bool[Array, "B L M"],
) -> Float[Array, "B L H P"]:
    """Softmax attention; scores and softmax in float32, result in the dtype of q.

    Query head h reads key-value head h // (H / G). Every query must see at least one key.
    """
    q_BGRLP = einops.rearrange(q_BLHP, "B L (G R) P -> B G R L P", G=k_BGMP.shape[1])
    scores = einsum("BGRLP,BGMP->BGRLM", q_BGRLP, k_BGMP) * q_BLHP.shape[-1] ** -0.5
    scores = jnp.where(visible_BLM[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(q_BLHP.dtype)
    out = einsum("BGRLM,BGMP->BGRLP", probs, v_BGMP).astype(q_BLHP.dtype)
    return einops.rearrange(out, "B G R L P -> B L (G R) P")


class Attention(nnx.Module):
    """Projections, rotary embedding and attention of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        dtype: str,
        quant: QuantSpec | None,
        host: HostKernels | None = None,
    ):
        fmt = quant and quant.attention
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.window = window
        self.host = host
        self.q_proj = matrix((query_size, config.hidden_size), fmt, dtype)
        self.k_proj = matrix((kv_size, config.hidden_size), fmt, dtype)
        self.v_proj = matrix((kv_size, config.hidden_size), fmt, dtype)
        self.o_proj = matrix((config.hidden_size, query_size), fmt, dtype)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        start_B: Int[Array, " B"],
        rotation: tuple[jax.Array, jax.Array],
        cache: kv_cache.LayerCache,
    ) -> tuple[Float[Array, "B L D"], kv_cache.LayerCache]:
        """Attends from L new positions of every sequence to all its positions so far.

        Args:
          x_BLD: normalised residual stream of the new positions.
          start_B: position of the first new token of each sequence.
          rotation: cosines and sines of the new positions, from ``rope.rotation``.
          cache: this layer's cache, holding the positions before start_B.

        Returns:
          What attention adds to the residual stream, and the cache with the new positions.
        """
        with jax.named_scope("attention"):
            q, k, v = (
                einops.rearrange(
                    linear(x_BLD, w[...], self.host).astype(x_BLD.dtype),
                    "B L (N P) -> B L N P",
                    P=self.head_dim,
                )
                for w in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
            cache = kv_cache.append(cache, k, v, start_B)
            if self.host is not None:
                threads = self.host.num_threads
                out = ops.attend(q, cache.k, cache.v, start_B, self.window, threads)
            else:
                positions_BL = start_B[:, None] + jnp.arange(x_BLD.shape[1])
                visible = visible_keys(positions_BL, cache.k.shape[2], self.window)
                out = attend(q, cache.k, cache.v, visible)
            out = einops.rearrange(out, "B L H P -> B L (H P)")
            return linear(out, self.o_proj[...], self.host).astype(x_BLD.dtype), cache
