"""The expert cache as arrays: it does what SlotCache does, and holds the bytes that it says."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jmoe.residency import array_cache
from jmoe.residency.array_cache import COUNTS, CacheState, CacheStatic, make_pools
from jmoe.residency.cache import SlotCache
from jmoe.residency.eviction import LFU_DECAY, LRU
from tests.planning.traces import MIXTRAL_TRACE, needs_mixtral_trace

LAYERS, EXPERTS, WIDTH, ITEMS = 4, 6, 3, 2
SLOTS, SHARED = (3, 4, 0, 0), 5  # the last two layers share a pool
# By layer and expert a blob that tells which one it is.
HOST = np.arange(LAYERS * EXPERTS, dtype=np.uint8).reshape(LAYERS, EXPERTS, 1).repeat(ITEMS, 2)

layers = st.integers(0, LAYERS - 1)
some_experts = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=WIDTH, unique=True)
steps = st.lists(st.tuples(layers, some_experts), min_size=1, max_size=40)


def static_of(rule: str) -> CacheStatic:
    return CacheStatic(num_experts=EXPERTS, slots=SLOTS, num_shared=SHARED, rule=rule)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("layer", "rule", "ahead"))
def run(
    state: CacheState, needed_U: jax.Array, layer: int, rule: str, ahead: bool = False
) -> tuple[CacheState, jax.Array]:
    static, host_EI = static_of(rule), jnp.asarray(HOST[layer])
    if ahead:
        state = array_cache.fetch_ahead(state, static, layer, needed_U, host_EI)
        return state, needed_U
    return array_cache.hold(state, static, layer, needed_U, host_EI)


def new_state(rule: str) -> CacheState:
    return array_cache.init_cache(static_of(rule), ITEMS, "uint8")


def padded(experts: Sequence[int]) -> jax.Array:
    return jnp.array([*experts, *[-1] * (WIDTH - len(experts))], jnp.int32)


def held(state: CacheState, layer: int) -> set[int]:
    """Experts of a layer in its pool; checks that their bytes are there."""
    first, num_slots = static_of("lru").pool(layer)
    keys = np.asarray(state.key_S)[first : first + num_slots]
    for slot, key in enumerate(keys.tolist(), first):
        assert key < 0 or (np.asarray(state.slots_SI)[slot] == key).all()
    mine = [key % EXPERTS for key in keys.tolist() if key >= 0 and key // EXPERTS == layer]
    assert len(mine) == len(set(mine))
    return set(mine)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_lru_is_that_of_the_slot_cache(trace):
    """In pools of their own, and in one that layers share."""
    state = new_state("lru")
    own = SlotCache(SLOTS, num_layers=LAYERS, num_experts=EXPERTS, num_staging=0, eviction=LRU())
    shared = SlotCache(
        SHARED, num_layers=LAYERS, num_experts=EXPERTS, num_staging=0, eviction=LRU()
    )
    for layer, experts in trace:
        state, slot_U = run(state, padded(experts), layer, "lru")
        cache = own if SLOTS[layer] else shared
        cache.use(layer, experts)
        cache.unpin()
        assert held(state, layer) == set(cache.resident(layer))
        expected = [layer * EXPERTS + expert for expert in experts]
        assert np.asarray(state.key_S)[np.asarray(slot_U)[: len(experts)]].tolist() == expected
    counts = dict(zip(COUNTS, np.asarray(state.counts_LC).sum(axis=0).tolist(), strict=True))
    assert counts["hits"] == own.counters.hits + shared.counters.hits
    assert counts["misses"] == own.counters.misses + shared.counters.misses


@settings(max_examples=60, deadline=None)
@given(st.lists(some_experts, min_size=1, max_size=40))
def test_lfu_gives_up_what_was_used_least(trace):
    """Counts of SlotCache's rule, in float64; of equal ones any may go."""
    layer, num_slots = 0, SLOTS[0]
    state, count_E, before = new_state("lfu"), np.zeros(EXPERTS), set()
    for experts in trace:
        count_E *= LFU_DECAY
        count_E[experts] += 1
        state, _ = run(state, padded(experts), layer, "lfu")
        after = held(state, layer)
        gone = before - after
        assert after == (before - gone) | set(experts)
        assert len(gone) == max(0, len(before | set(experts)) - num_slots)
        kept = [count_E[expert] for expert in after - set(experts)]
        for expert in gone:
            assert count_E[expert] <= min(kept, default=math.inf) * (1 + 1e-5)
        before = after


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), some_experts), min_size=1, max_size=30))
def test_fetching_ahead_costs_no_hit_that_is_predicted_and_is_counted(trace):
    layer, state = 1, new_state("lru")
    ahead, unused, useful, useless = 0, set(), 0, 0
    for is_ahead, experts in trace:
        before = held(state, layer)
        state, _ = run(state, padded(experts), layer, "lru", is_ahead)
        after = held(state, layer)
        assert set(experts) <= after
        useless += len(unused - after)
        unused &= after
        if is_ahead:
            ahead += len(set(experts) - before)
            unused |= set(experts) - before
        else:
            useful += len(unused & set(experts))
            unused -= set(experts)
    counts = dict(zip(COUNTS, np.asarray(state.counts_LC)[layer].tolist(), strict=True))
    assert counts["fetched_ahead"] == ahead
    assert (counts["useful"], counts["useless"]) == (useful, useless)


def test_nothing_is_needed_of_nobody():
    state = new_state("lru")
    state, _ = run(state, padded([1, 2]), 0, "lru")
    again, _ = run(state, padded([]), 0, "lru")
    assert held(again, 0) == {1, 2}
    assert np.array_equal(again.counts_LC, state.counts_LC)


def test_a_new_batch_counts_anew_and_keeps_the_order():
    state = new_state("lru")
    for experts in ([1, 2], [3], [1]):
        state, _ = run(state, padded(experts), 0, "lru")
    state = array_cache.begin_batch(state, rule="lru")
    assert not np.asarray(state.counts_LC).any() and int(state.clock) == 0
    state, _ = run(state, padded([4]), 0, "lru")
    assert held(state, 0) == {1, 3, 4}


@pytest.mark.parametrize(
    ("slots", "num_shared", "expected"),
    [
        ((3, 2), 0, ((3, 2), 0)),
        ((3, 2), 9, ((3, 2), 0)),
        ((2, 1), 1, ((2, 0), 2)),
        ((1, 1), 0, ((0, 0), 2)),
        ((0, 0, 0), 2, ((0, 0, 0), 2)),
        ((1, 0, 0), 4, ((2, 0, 0), 3)),
        ((9, 0, 0), 0, ((2, 2, 0), 5)),
        ((1, 0), 0, None),
    ],
)
def test_every_layer_has_room_for_a_token(slots, num_shared, expected):
    assert make_pools(slots, num_shared, 2) == expected


@needs_mixtral_trace
def test_hits_on_a_recorded_trace_are_those_of_the_slot_cache():
    num_layers, num_slots, num_experts = 4, 4, 8
    with np.load(MIXTRAL_TRACE) as arrays:
        ids_TLK = arrays["decode_expert_ids"][:2000, :num_layers].astype(np.int32)
    static = CacheStatic(
        num_experts=num_experts, slots=(num_slots,) * num_layers, num_shared=0, rule="lru"
    )
    host_EI = jnp.zeros((num_experts, 1), jnp.uint8)

    @jax.jit
    def replay(state: CacheState, ids_TLK: jax.Array) -> CacheState:
        def one_token(state: CacheState, ids_LK: jax.Array) -> tuple[CacheState, None]:
            for layer in range(num_layers):
                state, _ = array_cache.hold(state, static, layer, ids_LK[layer], host_EI)
            return state, None

        return lax.scan(one_token, state, ids_TLK)[0]

    state = replay(array_cache.init_cache(static, 1, "uint8"), jnp.asarray(ids_TLK))
    cache = SlotCache(
        static.slots,
        num_layers=num_layers,
        num_experts=num_experts,
        num_staging=0,
        eviction=LRU(),
    )
    for ids_LK in ids_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            cache.use(layer, experts)
            cache.unpin()
    hits, misses, *_ = np.asarray(state.counts_LC).sum(axis=0).tolist()
    assert (hits, misses) == (cache.counters.hits, cache.counters.misses)
    assert hits + misses == ids_TLK.size
