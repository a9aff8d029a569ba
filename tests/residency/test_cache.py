"""SlotCache: what each operation promises."""

import pytest

from jmoe.residency.cache import ExpertKey, Load, NoRoom, SlotCache
from jmoe.residency.eviction import LRU, StaticPopularity

LAYERS, EXPERTS = 3, 5
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
A, B, C, D, E = KEYS[:EXPERTS]  # of layer 0
POPULARITY = StaticPopularity([[3, 1, 4, 1, 5]] * LAYERS)


def small_cache(slots: int | list[int] | None = None, num_staging: int = 3, **changes) -> SlotCache:
    """Three layers of five experts, two slots each; LRU."""
    settings = {"num_layers": LAYERS, "num_experts": EXPERTS, "eviction": LRU()} | changes
    return SlotCache([2] * LAYERS if slots is None else slots, num_staging=num_staging, **settings)


def check_places(cache: SlotCache) -> None:
    """Every key has at most one place, every place at most one key, and pools their size."""
    places = [cache.place_of(key) for key in KEYS if key in cache]
    assert len(set(places)) == len(places) == len(cache) <= cache.num_places
    assert all(place is not None and 0 <= place < cache.num_places for place in places)
    residents = [len(cache.resident(layer)) for layer in range(LAYERS)]
    if isinstance(cache.slots, int):
        assert sum(residents) <= cache.slots
    else:
        assert all(held <= size for held, size in zip(residents, cache.slots, strict=True))
    assert len(cache) - sum(residents) <= cache.num_staging


def test_hits_are_counted_before_anything_is_loaded():
    cache = small_cache()
    cache.fill([A, B])  # A is the older one
    loads = cache.use(0, [2, 0])
    assert loads == [Load(C, 1, (B,))]  # A is needed too
    assert (cache.counters.hits, cache.counters.misses, cache.counters.evictions) == (1, 1, 1)
    assert cache.resident(0) == (0, 2)


def test_layers_of_one_pool_compete():
    cache = small_cache(3)
    cache.use(0, [0, 1])
    cache.unpin()
    assert [load.evicted for load in cache.use(1, [0, 1])] == [(), (A,)]
    assert cache.resident(0) == (1,) and cache.resident(1) == (0, 1)


def test_a_prediction_evicts_nothing_until_it_is_used():
    cache = small_cache(num_staging=1)
    cache.fill([A, B])
    load = cache.speculate(C)
    assert load == Load(C, 6, ()) and cache.resident(0) == (0, 1)
    assert cache.use(0, [2]) == []
    assert cache.resident(0) == (1, 2) and cache.place_of(C) == 6
    # The slot of A has become the place of staging, where A can still be hit.
    assert cache.place_of(A) == 0 and cache.counters.evictions == 0
    cache.unpin()
    assert cache.speculate(D) == Load(D, 0, (A,))
    assert (cache.counters.useful, cache.counters.evictions) == (1, 1)


def test_live_predictions_give_way_to_needed_experts_only():
    cache = small_cache(0, num_staging=2)
    assert cache.speculate(A) and cache.speculate(B)
    assert cache.speculate(C) is None
    assert cache.use(1, [0]) == [Load(ExpertKey(1, 0), 1, (B,))]  # the last one predicted
    with pytest.raises(NoRoom, match="layer 1, expert 1"):
        cache.use(1, [1], busy={A})
    assert cache.counters.useless == 1


def test_stale_predictions_can_be_hit_or_recycled_oldest_first():
    cache = small_cache(num_staging=3)
    for key in (A, B, C):
        cache.speculate(key)
    cache.use(0, [3, 1])
    assert cache.pass_layer(0) == [A, C] and cache.pass_layer(0) == []
    assert cache.speculate(C) is None  # predicted again: protected again
    load = cache.speculate(ExpertKey(1, 0))
    assert load and load.evicted == ()  # the place that B gave for its slot
    load = cache.speculate(ExpertKey(1, 1))
    assert load and load.evicted == (A,)
    assert cache.speculate(ExpertKey(1, 2)) is None
    cache.unpin()
    assert cache.use(0, [2]) == []
    assert (cache.counters.useful, cache.counters.useless) == (2, 1)


def test_speculation_leaves_room_for_needed_experts():
    cache = small_cache(0, num_staging=3, min_free=2)
    assert cache.speculate(A)
    assert cache.speculate(B) is None
    assert len(cache.use(1, [0, 1])) == 2


def test_without_slots_staging_is_the_cache():
    cache = small_cache(0, num_staging=2)
    assert [load.place for load in cache.use(0, [0, 1])] == [0, 1]
    cache.unpin()
    assert cache.use(0, [0]) == []
    cache.unpin()
    assert cache.use(0, [2]) == [Load(C, 1, (B,))]  # not A, which was used later


def test_what_a_rule_does_not_admit_is_used_without_a_slot():
    cache = small_cache(num_staging=1, eviction=POPULARITY)
    cache.fill([C, E])
    assert cache.use(0, [0]) == [Load(A, 6, ())]
    cache.unpin()
    assert cache.resident(0) == (2, 4)
    # Both at once need more than staging has: then popularity has to give in.
    assert cache.use(0, [0, 1]) == [Load(B, 0, (C,))]


def test_copies_under_way_keep_their_place():
    cache = small_cache(num_staging=1)
    loads = cache.use(0, [0, 1])
    cache.unpin()
    assert cache.use(0, [2], busy={A, B}) == [Load(C, 6, ())]
    assert cache.use(0, [0], busy={A, B}) == [] and len(loads) == 2


def test_what_failed_is_gone():
    cache = small_cache(num_staging=1)
    cache.speculate(A)
    cache.use(0, [1])
    for key in (A, B, C):
        cache.forget(key)
    assert len(cache) == 0 and cache.counters.useless == 1
    assert cache.use(0, [0, 1]) and cache.speculate(C)


def test_a_prompt_leaves_its_best_experts_and_no_more_evictions_than_needed():
    cache = small_cache(num_staging=3)
    cache.fill([A, B])
    assert cache.pin_key(A) and not cache.pin_key(C)
    for key in (C, D):
        assert cache.stream(key)
    assert cache.resident(0) == (0, 1)
    cache.unpin_key(A)
    assert cache.warm(0, [2, 0, 3]) == [B]
    assert cache.adopt(C) and not cache.adopt(D) and cache.adopt(A)
    assert cache.resident(0) == (0, 2)
    cache.unpin()
    assert cache.use(0, [4]) == [Load(E, 0, (A,))]  # C was the best
    assert (cache.counters.hits, cache.counters.misses) == (1, 3)


def test_a_prompt_gets_its_share_of_a_global_pool():
    cache = small_cache(6, num_staging=2)
    cache.fill(KEYS[:6])  # five of layer 0, one of layer 1
    assert cache.warm(2, [0, 1, 2]) == [A, B]
    assert cache.warm(1, [3, 0]) == []  # two free slots
    assert cache.stream(ExpertKey(1, 3)) and cache.adopt(ExpertKey(1, 3))
    assert cache.resident(1) == (0, 3)


def test_resizing_keeps_what_fits():
    cache = small_cache(num_staging=2)
    cache.use(0, [0, 1])
    cache.use(1, [0])
    cache.speculate(ExpertKey(2, 0))
    cache.unpin()
    assert cache.resize([1, 1, 0], 0) == [ExpertKey(2, 0), A]
    assert (cache.slots, cache.num_staging, cache.num_places) == ((1, 1, 0), 0, 2)
    assert cache.resident(0) == (1,) and cache.resident(1) == (0,)
    check_places(cache)
    assert cache.resize(3, 1) == []
    assert len(cache.use(2, [0, 1])) == 2
    check_places(cache)
    assert cache.counters.evictions + cache.counters.useless == 3


def test_counters_can_be_subtracted():
    cache = small_cache()
    cache.use(0, [0, 1])
    before = cache.counters.snapshot()
    cache.use(0, [0, 1, 2])
    run = cache.counters - before
    assert (run.hits, run.misses) == (2, 1)
    assert run.to_json()["hit_rate"] == pytest.approx(2 / 3)
