"""SlotCache: against a reference in lists, and what must hold whatever happens."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jmoe.residency.cache import ExpertKey, Load, NoRoom, SlotCache
from jmoe.residency.eviction import LFU, LRU, Random, StaticPopularity
from tests.residency.reference_cache import ReferenceCache

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


def shown(load: Load | None) -> tuple[ExpertKey, tuple[ExpertKey, ...]] | None:
    return None if load is None else (load.key, load.evicted)


class AgainstReference(RuleBasedStateMachine):
    """Every operation does what the reference does, and returns the same."""

    keys = st.sampled_from(KEYS)
    some_keys = st.sets(keys, max_size=3)

    @initialize(
        slots=st.one_of(st.integers(0, 9), st.lists(st.integers(0, 5), min_size=3, max_size=3)),
        num_staging=st.integers(0, 5),
        min_free=st.integers(0, 3),
    )
    def start(self, slots: int | list[int], num_staging: int, min_free: int):
        self.cache = small_cache(slots, num_staging, min_free=min_free)
        sizes, pool_of = ([slots], [0] * 3) if isinstance(slots, int) else (slots, [0, 1, 2])
        self.reference = ReferenceCache(sizes, pool_of, num_staging, min_free)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True),
        busy=some_keys,
        unpin=st.booleans(),
    )
    def use(self, layer: int, experts: list[int], busy: set[ExpertKey], unpin: bool):
        try:
            expected = self.reference.use([ExpertKey(layer, e) for e in experts], busy)
        except NoRoom:
            with pytest.raises(NoRoom):
                self.cache.use(layer, experts, busy)
        else:
            loads = self.cache.use(layer, experts, busy)
            assert [shown(load) for load in loads] == expected
            assert all(self.cache.place_of(load.key) == load.place for load in loads)
        if unpin:
            self.cache.unpin()
            self.reference.pinned.clear()

    @rule(key=keys, busy=some_keys)
    def speculate(self, key: ExpertKey, busy: set[ExpertKey]):
        assert shown(self.cache.speculate(key, busy)) == self.reference.speculate(key, busy)

    @rule(key=keys, busy=some_keys)
    def stream(self, key: ExpertKey, busy: set[ExpertKey]):
        here = key in self.reference.keys
        assert self.cache.pin_key(key) is here
        if here:
            self.reference.pinned.add(key)
            self.reference.counters.hits += 1
        else:
            assert shown(self.cache.stream(key, busy)) == self.reference.stream(key, busy)

    @rule(layer=st.integers(0, LAYERS - 1))
    def pass_layer(self, layer: int):
        assert self.cache.pass_layer(layer) == self.reference.pass_layer(layer)

    @rule(key=keys)
    def forget(self, key: ExpertKey):
        self.cache.forget(key)
        self.reference.forget(key)

    @rule(key=keys)
    def unpin_key(self, key: ExpertKey):
        self.cache.unpin_key(key)
        self.reference.pinned.discard(key)

    @invariant()
    def the_same_is_here(self):
        if hasattr(self, "cache"):
            assert {key for key in KEYS if key in self.cache} == self.reference.keys
            for layer in range(LAYERS):
                pool = self.reference.pools[self.reference.pool_of[layer]]
                residents = tuple(sorted(key.expert for key in pool if key.layer == layer))
                assert self.cache.resident(layer) == residents
            assert self.cache.counters == self.reference.counters
            check_places(self.cache)


AgainstReference.TestCase.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=40
)
TestAgainstReference = AgainstReference.TestCase


class Driver:
    """Does to a cache what an engine would, at random, and remembers what may not move."""

    def __init__(self, cache: SlotCache, seed: int):
        self.cache = cache
        self.random = random.Random(seed)
        self.pinned: set[ExpertKey] = set()
        self.busy: set[ExpertKey] = set()
        self.num_left = 0  # that left the cache without being counted as evicted

    def step(self) -> None:
        before = {key: self.cache.place_of(key) for key in self.pinned | self.busy}
        before = {key: place for key, place in before.items() if place is not None}
        operations = [self.use] * 4 + [self.speculate] * 4 + [self.arrive] * 2
        operations += [self.pass_layer, self.unpin, self.unpin, self.stream, self.forget, self.warm]
        gone = self.random.choice(operations)()
        for key, place in before.items():
            assert key in gone or self.cache.place_of(key) == place

    def loaded(self, loads: list[Load]) -> None:
        for load in loads:
            assert self.cache.place_of(load.key) == load.place
            assert not set(load.evicted) & (self.pinned | self.busy)
            self.busy.add(load.key)

    def use(self):
        layer = self.random.randrange(LAYERS)
        experts = self.random.sample(range(EXPERTS), self.random.randint(1, 2))
        self.pinned |= {ExpertKey(layer, expert) for expert in experts}
        try:
            self.loaded(self.cache.use(layer, experts, self.busy))
        except NoRoom:  # those without a place are not here, but their misses are counted
            self.num_left += sum(key not in self.cache for key in self.pinned)
            self.busy -= {key for key in self.busy if key not in self.cache}
            self.unpin()
        return ()

    def speculate(self):
        load = self.cache.speculate(self.random.choice(KEYS), self.busy)
        self.loaded([load] if load else [])
        return ()

    def stream(self):
        key = self.random.choice(KEYS)
        if not self.cache.pin_key(key):
            load = self.cache.stream(key, self.busy)
            self.loaded([load] if load else [])
        if key in self.cache:
            self.pinned.add(key)
        return ()

    def pass_layer(self):
        self.cache.pass_layer(self.random.randrange(LAYERS))
        return ()

    def arrive(self):
        if self.busy:
            self.busy.discard(self.random.choice(sorted(self.busy)))
        return ()

    def unpin(self):
        self.cache.unpin()
        self.pinned.clear()
        return ()

    def forget(self):
        key = self.random.choice(KEYS)
        useless = self.cache.counters.useless
        here = key in self.cache
        self.cache.forget(key)
        self.num_left += here and useless == self.cache.counters.useless
        self.pinned.discard(key)
        self.busy.discard(key)
        return (key,)

    def warm(self):
        layer = self.random.randrange(LAYERS)
        ranked = self.random.sample(range(EXPERTS), EXPERTS)
        evicted = self.cache.warm(layer, ranked, self.busy)
        assert not set(evicted) & (self.pinned | self.busy)
        assert not any(key in self.cache for key in evicted)
        for expert in ranked:
            if ExpertKey(layer, expert) in self.cache:
                self.cache.adopt(ExpertKey(layer, expert))
        return ()


@pytest.mark.parametrize("slots", [[2, 2, 2], [0, 5, 1], 7, 0])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "random", "popularity"])
def test_nothing_is_lost_in_10_5_random_operations(slots, eviction):
    """6,250 operations in each of 16 settings."""
    rules = {"lru": LRU(), "lfu": LFU(), "random": Random(), "popularity": POPULARITY}
    cache = small_cache(slots, num_staging=4, eviction=rules[eviction], min_free=1)
    driver = Driver(cache, seed=0)
    count = cache.counters
    for _ in range(6_250):
        driver.step()
        check_places(cache)
        entered = count.misses + count.speculated
        assert entered - count.evictions - count.useless - driver.num_left == len(cache)
    assert min(count.hits, count.misses, count.speculated, count.useful, count.useless) > 0


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
