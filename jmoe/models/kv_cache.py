"""The KV cache: keys and values of past positions, as a pytree that programs donate.

A cache has room for M positions of every sequence; position p of a sequence lies at index p.
Sequences of a batch have different lengths: entries beyond a sequence's length are rubbish
(padding of its prompt) until they are overwritten, and are never attended to, because a
query sees keys up to its own position only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig

MIN_CAPACITY = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys, rotated to their positions, and values of one layer.

    Key-value heads come before positions, so that a head's keys are one contiguous matrix.
    """

    k: Float[Array, "B G M P"]
    v: Float[Array, "B G M P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    # One pair of arrays per layer: an update of one stacked array would stay in place too,
    # but attention reads a layer of it through a dot, and that copies the layer first.
    layers: tuple[LayerCache, ...]


def init_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    dtype: str | jnp.dtype,
    device: jax.Device | None = None,
) -> KVCache:
    """An empty cache (zeros), on a device if one is named."""
    shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype, device=device)

    return KVCache(tuple(LayerCache(k=zeros(), v=zeros()) for _ in range(config.num_hidden_layers)))


def bucket_capacity(num_positions: int) -> int:
    """Room to reserve for so many positions: the next power of two, at least MIN_CAPACITY.

    Buckets bound the number of compiled programs; less than half of a cache is unused.
    """
    return max(MIN_CAPACITY, 1 << (num_positions - 1).bit_length())


def cache_bytes(config: ModelConfig, batch_size: int, capacity: int, dtype: str) -> int:
    """Size of ``init_cache`` with the same arguments, in bytes."""
    per_position = 2 * config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return per_position * config.num_hidden_layers * batch_size * capacity


def append(
    cache: LayerCache,
    k_BLGP: Float[Array, "B L G P"],
    v_BLGP: Float[Array, "B L G P"],
    start_B: Int[Array, " B"],
) -> LayerCache:
    """Writes L positions of every sequence, from index start_B on.

    In place if the cache was donated. start_B + L must not exceed M: XLA would move the
    whole write to an earlier index.
    """

    def write(old_GMP: jax.Array, new_LGP: jax.Array, start: jax.Array) -> jax.Array:
        new_GLP = jnp.swapaxes(new_LGP, 0, 1).astype(old_GMP.dtype)
        return lax.dynamic_update_slice(old_GMP, new_GLP, (0, start, 0))

    write_all = jax.vmap(write)
    return LayerCache(k=write_all(cache.k, k_BLGP, start_B), v=write_all(cache.v, v_BLGP, start_B))
