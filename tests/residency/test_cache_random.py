"""SlotCache under random operations: against a reference in lists, and what must always hold."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jmoe.residency.cache import ExpertKey, Load, NoRoom, SlotCache
from jmoe.residency.eviction import LFU, LRU, Likely, Random
from tests.residency.reference_cache import ReferenceCache
from tests.residency.test_cache import (
    EXPERTS,
    KEYS,
    LAYERS,
    POPULARITY,
    check_places,
    small_cache,
)


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
            self.reference.pin(key)
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
@pytest.mark.parametrize("eviction", ["lru", "lfu", "likely", "random", "popularity"])
def test_nothing_is_lost_in_10_5_random_operations(slots, eviction):
    """5,000 operations in each of 20 settings."""
    rules = {
        "lru": LRU(),
        "lfu": LFU(),
        "likely": Likely(),
        "random": Random(),
        "popularity": POPULARITY,
    }
    cache = small_cache(slots, num_staging=4, eviction=rules[eviction], min_free=1)
    driver = Driver(cache, seed=0)
    count = cache.counters
    for _ in range(5_000):
        driver.step()
        check_places(cache)
        entered = count.misses + count.speculated
        assert entered - count.evictions - count.useless - driver.num_left == len(cache)
    assert min(count.hits, count.misses, count.speculated, count.useful, count.useless) > 0
