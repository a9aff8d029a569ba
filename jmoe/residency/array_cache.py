"""The expert cache as arrays, for programs that find and fetch experts by themselves.

A twin of ``cache.SlotCache`` without staging, with the rules LRU and LFU: the same experts hit and
miss on the same trace, which a property test holds. An expert's slot, its recency or frequency and
the counters are arrays in one tree, which every program donates and hands back.

All experts that a layer needs are found or fetched first, in one loop over those that are missing,
and only then read. That order, and a loop rather than a branch, keep XLA from copying the slots.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jmoe.residency.eviction import LFU_DECAY

Rule = Literal["lru", "lfu"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatic:
    """The shape of a cache.

    Attributes:
      num_experts: per layer.
      slots: of each layer's pool; 0 for layers that share one.
      num_shared: slots of the pool that these share.
      rule: which expert leaves a full pool.
    """

    num_experts: int
    slots: tuple[int, ...]
    num_shared: int
    rule: Rule

    @property
    def num_layers(self) -> int:
        return len(self.slots)

    @property
    def num_slots(self) -> int:
        """Of all pools."""
        return sum(self.slots) + self.num_shared

    def pool(self, layer: int) -> tuple[int, int]:
        """The first slot of a layer's pool, and how many there are."""
        if self.slots[layer]:
            return sum(self.slots[:layer]), self.slots[layer]
        return sum(self.slots), self.num_shared


def make_pools(
    slots: Sequence[int], num_shared: int, num_needed: int
) -> tuple[tuple[int, ...], int] | None:
    """Pools out of so many slots, each of them at least as large as one program needs.

    Args:
      slots: by layer, as they should be.
      num_shared: that are there besides, for layers with fewer than are needed.
      num_needed: at once in any layer, above 0.

    Returns:
      Slots by layer, and shared ones. If some layer has too few, the first layers have just
      enough, as many of them as there are slots for, and the others share the rest. None if that
      is too little even for one pool.
    """
    if min(slots) >= num_needed:
        return tuple(slots), 0
    total = sum(slots) + num_shared
    if total < num_needed:
        return None
    num_own = min((total - num_needed) // num_needed, len(slots) - 1)
    own = (num_needed,) * num_own + (0,) * (len(slots) - num_own)
    return own, total - sum(own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
    """What is where; donated to every program that uses it, as the KV cache is.

    Attributes:
      slots_SI: a blob in each slot, pool after pool, the shared one last.
      key_S: layer * num_experts + expert of what is in each slot; -1 where there is nothing.
      unused_S: whether it was fetched ahead and not used yet.
      value_LE: what the rule goes by, of every expert. LRU, int32: when it was used last. LFU,
        float32: the logarithm of the decayed number of uses.
      clock: uses so far, for LRU.
      counts_LC: events so far, by layer, in the order of ``COUNTS``; int32, of one batch.
    """

    slots_SI: Array
    key_S: Int[Array, " S"]
    unused_S: Bool[Array, " S"]
    value_LE: jax.Array
    clock: Int[Array, ""]
    counts_LC: Int[Array, "L C"]


# Needed and there; needed and fetched; fetched ahead; of those, used before they were evicted;
# and evicted unused.
COUNTS = ("hits", "misses", "fetched_ahead", "useful", "useless")


def init_cache(
    static: CacheStatic, num_items: int, dtype: str, device: jax.Device | None = None
) -> CacheState:
    """An empty cache for blobs of so many items."""

    def full(shape: tuple[int, ...], value: float, kind: str) -> jax.Array:
        return jnp.full(shape, value, kind, device=device)

    shape = (static.num_layers, static.num_experts)
    is_lru = static.rule == "lru"
    return CacheState(
        slots_SI=full((static.num_slots, num_items), 0, dtype),
        key_S=full((static.num_slots,), -1, "int32"),
        unused_S=full((static.num_slots,), False, "bool"),
        value_LE=full(shape, 0, "int32") if is_lru else full(shape, -math.inf, "float32"),
        clock=full((), 0, "int32"),
        counts_LC=full((static.num_layers, len(COUNTS)), 0, "int32"),
    )


def abstract_cache(static: CacheStatic, num_items: int, dtype: str) -> CacheState:
    """Its shapes."""
    return jax.eval_shape(functools.partial(init_cache, static, num_items, dtype))


def hold(
    state: CacheState,
    static: CacheStatic,
    layer: int,
    needed_U: Int[Array, " U"],
    host_EI: Array,
) -> tuple[CacheState, Int[Array, " U"]]:
    """Makes sure that experts of a layer are in slots, and says in which.

    Args:
      state: donated with the program.
      static: its shape.
      layer: of the experts.
      needed_U: distinct, at most as many as the layer has slots; -1 is none. They become the most
        recent ones in this order.
      host_EI: blobs of the layer, in host memory or wherever.
    """
    pool = _pool(static, layer)
    state = _touch(state, pool.layer, needed_U, static.rule)
    found = _find(state, pool, needed_U)
    num_useful = jnp.sum(found.is_asked_P & found.unused_P)
    unused_P = found.unused_P & ~found.is_asked_P & ~found.is_taken_P
    state = _fetch(state, pool, found, host_EI, unused_P)
    num_hits, num_misses = jnp.sum(found.is_here_U), jnp.sum(found.is_missing_U)
    counts = (num_hits, num_misses, 0, num_useful, found.num_useless)
    return _count(state, pool, counts), found.slot_U


def fetch_ahead(
    state: CacheState,
    static: CacheStatic,
    layer: int,
    predicted_U: Int[Array, " U"],
    host_EI: Array,
) -> CacheState:
    """Fetches experts that a layer will probably need. They take the slots of the least valued.

    Arguments as of ``hold``; the layer must have a pool of its own. Nothing counts as used: what is
    predicted wrongly goes first.
    """
    pool = _pool(static, layer)
    found = _find(state, pool, predicted_U)
    unused_P = found.unused_P | found.is_taken_P
    state = _fetch(state, pool, found, host_EI, unused_P)
    return _count(state, pool, (0, 0, jnp.sum(found.is_missing_U), 0, found.num_useless))


# Comparisons of all with all, not scatters and sorts: a GPU does many of them in one kernel.


@dataclasses.dataclass(frozen=True)
class _Pool:
    """A layer's pool of slots.

    Attributes:
      layer: its number.
      first_key: of its experts: layer * num_experts.
      first_slot: of the pool.
      num_slots: of the pool.
    """

    layer: jax.Array
    first_key: jax.Array
    first_slot: jax.Array
    num_slots: int


def _pool(static: CacheStatic, layer: int) -> _Pool:
    first_slot, num_slots = static.pool(layer)
    # Numbers that XLA does not know: so kernels of layers are equal, and are compiled once.
    numbers = jnp.array([layer, layer * static.num_experts, first_slot], jnp.int32)
    numbers = lax.optimization_barrier(numbers)
    return _Pool(numbers[0], numbers[1], numbers[2], num_slots)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where experts are or will be, in a pool of P slots.

    Attributes:
      keys_U: layer * num_experts + expert of each.
      slot_U: of each, among those of all pools.
      is_here_U: which are in slots.
      is_missing_U: which have to be fetched.
      takes_UP: the slot that each of those will take.
      is_asked_P: slots of those that are here.
      key_P: as in ``CacheState``, so far.
      unused_P: likewise.
    """

    keys_U: jax.Array
    slot_U: jax.Array
    is_here_U: jax.Array
    is_missing_U: jax.Array
    takes_UP: jax.Array
    is_asked_P: jax.Array
    key_P: jax.Array
    unused_P: jax.Array

    @property
    def is_taken_P(self) -> jax.Array:
        return jnp.any(self.takes_UP, axis=0)

    @property
    def num_useless(self) -> jax.Array:
        """Experts that were fetched ahead and leave unused."""
        return jnp.sum(self.is_taken_P & self.unused_P)


def _find(state: CacheState, pool: _Pool, experts_U: jax.Array) -> _Found:
    is_any_U = experts_U >= 0
    key_P = lax.dynamic_slice_in_dim(state.key_S, pool.first_slot, pool.num_slots)
    keys_U = experts_U + pool.first_key
    matches_UP = (keys_U[:, None] == key_P) & is_any_U[:, None]
    is_here_U, is_asked_P = jnp.any(matches_UP, axis=1), jnp.any(matches_UP, axis=0)
    is_missing_U = is_any_U & ~is_here_U
    # Empty slots go first, then the least valued; what is needed now stays.
    order_P = jnp.where(is_asked_P, 2, key_P >= 0)
    victims_P = jnp.lexsort((state.value_LE.reshape(-1)[key_P], order_P))
    place_U = jnp.where(is_here_U, jnp.argmax(matches_UP, axis=1), victims_P[_rank(is_missing_U)])
    return _Found(
        keys_U=keys_U,
        slot_U=pool.first_slot + place_U,
        is_here_U=is_here_U,
        is_missing_U=is_missing_U,
        takes_UP=(place_U[:, None] == jnp.arange(pool.num_slots)) & is_missing_U[:, None],
        is_asked_P=is_asked_P,
        key_P=key_P,
        unused_P=lax.dynamic_slice_in_dim(state.unused_S, pool.first_slot, pool.num_slots),
    )


def _rank(is_missing_U: jax.Array) -> jax.Array:
    """How many that are missing come before each."""
    return jnp.cumsum(is_missing_U) - is_missing_U


def _fetch(
    state: CacheState,
    pool: _Pool,
    found: _Found,
    host_EI: Array,
    unused_P: jax.Array,
) -> CacheState:
    """Copies missing experts into their slots; unused_P is to be the pool's part of unused_S."""
    experts_U = found.keys_U - pool.first_key
    turns_U = jnp.arange(len(experts_U))
    is_turn_UN = (_rank(found.is_missing_U)[:, None] == turns_U) & found.is_missing_U[:, None]
    expert_N, slot_N = (
        jnp.sum(jnp.where(is_turn_UN, of_U[:, None], 0), axis=0)
        for of_U in (experts_U, found.slot_U)
    )

    def fetch_one(n: jax.Array, slots_SI: jax.Array) -> jax.Array:
        blob = lax.dynamic_index_in_dim(host_EI, expert_N[n], 0)
        blob = jax.device_put(blob, jax.memory.Space.Device)
        return lax.dynamic_update_slice(slots_SI, blob, (slot_N[n], 0))

    with jax.named_scope("fetch"):
        num_missing = jnp.sum(found.is_missing_U)
        slots_SI = lax.fori_loop(0, num_missing, fetch_one, state.slots_SI)
    new_P = jnp.max(jnp.where(found.takes_UP, found.keys_U[:, None], -1), axis=0)
    key_P = jnp.where(new_P >= 0, new_P, found.key_P)
    return dataclasses.replace(
        state,
        slots_SI=slots_SI,
        key_S=lax.dynamic_update_slice(state.key_S, key_P, (pool.first_slot,)),
        unused_S=lax.dynamic_update_slice(state.unused_S, unused_P, (pool.first_slot,)),
    )


def _count(state: CacheState, pool: _Pool, counts: Sequence[jax.Array | int]) -> CacheState:
    counts_C = jnp.stack([jnp.int32(count) for count in counts])
    return dataclasses.replace(state, counts_LC=state.counts_LC.at[pool.layer].add(counts_C))


def _touch(state: CacheState, layer: jax.Array | int, used_U: jax.Array, rule: Rule) -> CacheState:
    """Takes note that a layer uses experts, in this order; -1 is none."""
    num_used, num_experts = used_U.shape[0], state.value_LE.shape[1]
    value_E, clock = state.value_LE[layer], state.clock
    is_used_UE = used_U[:, None] == jnp.arange(num_experts)
    if rule == "lru":
        new_U = clock + 1 + jnp.arange(num_used)
        new_E = jnp.max(jnp.where(is_used_UE, new_U[:, None], 0), axis=0)
        clock = clock + num_used
    else:
        # As eviction.LFU, but as of now and not as of step 0: float32 is exact enough near 0.
        value_E = value_E + jnp.float32(math.log(LFU_DECAY))
        new_E = jnp.logaddexp(value_E, 0.0)
    value_E = jnp.where(jnp.any(is_used_UE, axis=0), new_E, value_E)
    return dataclasses.replace(state, value_LE=state.value_LE.at[layer].set(value_E), clock=clock)


# What the host does between batches: it puts experts of a prompt into slots.


@functools.partial(jax.jit, donate_argnames=("state",))
def put_expert(
    state: CacheState, slot: Int[Array, ""], key: Int[Array, ""], blob_I: Array
) -> CacheState:
    """Puts an expert into a slot. Donates: state."""
    return dataclasses.replace(
        state,
        slots_SI=lax.dynamic_update_slice(state.slots_SI, blob_I[None], (slot, 0)),
        key_S=state.key_S.at[slot].set(key),
        unused_S=state.unused_S.at[slot].set(False),
    )


@functools.partial(jax.jit, static_argnames=("rule",), donate_argnames=("state",))
def touch(
    state: CacheState, layer: Int[Array, ""], used_U: Int[Array, " U"], *, rule: Rule
) -> CacheState:
    """Takes note that a layer used experts, in this order; -1 is none. Donates: state."""
    return _touch(state, layer, used_U, rule)


@functools.partial(jax.jit, static_argnames=("rule",), donate_argnames=("state",))
def begin_batch(state: CacheState, *, rule: Rule) -> CacheState:
    """Starts to count anew, and turns the clock back. Donates: state."""
    value_LE, clock = state.value_LE, state.clock
    if rule == "lru":
        # What was used before is older than anything to come; int32 is not exceeded before
        # millions of tokens of one batch.
        value_LE, clock = jnp.maximum(value_LE - clock, -(2**30)), jnp.int32(0)
    return dataclasses.replace(
        state, value_LE=value_LE, clock=clock, counts_LC=jnp.zeros_like(state.counts_LC)
    )


@jax.jit
def read_expert(slots_SI: Array, slot: Int[Array, ""]) -> Array:
    """A copy of the expert in a slot."""
    return lax.dynamic_index_in_dim(slots_SI, slot, 0, keepdims=False)
