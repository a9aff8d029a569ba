"""Rules of eviction: which expert goes."""

import itertools
import math
import random

import pytest

from jmoe.errors import RequestError
from jmoe.residency.cache import ExpertKey, SlotCache
from jmoe.residency.eviction import (
    EVICTIONS,
    LFU,
    LRU,
    Belady,
    Eviction,
    Likely,
    Random,
    StaticPopularity,
    make_eviction,
)

A, B, C = (ExpertKey(0, expert) for expert in range(3))


def test_the_least_recently_used_goes():
    rule = LRU()
    rule.touch([A, B, C])
    rule.touch([A])
    assert rule.victim([A, B, C]) == B
    rule.forget(C)
    assert rule.victim([A, B, C]) == C
    assert rule.victim([A]) == A


def test_frequency_decays_with_the_steps_of_a_layer():
    rule = LFU(decay=0.9)
    counts = {key: 0.0 for key in (A, B, C)}
    generator = random.Random(0)
    for _ in range(20_000):  # 0.9 ** -20000 is no float
        used = generator.sample([A, B, C], generator.randint(1, 2))
        rule.touch(used)
        rule.touch([ExpertKey(1, 0)])  # another layer
        counts = {key: 0.9 * count + (key in used) for key, count in counts.items()}
        low, second = sorted(counts.values())[:2]
        if not math.isclose(low, second):
            assert counts[rule.victim([A, B, C])] == low


def test_without_decay_frequency_is_a_count():
    rule = LFU(decay=1)
    for keys in ([A], [A], [B], [C, B], [B]):
        rule.touch(keys)
    assert rule.victim([A, B]) == A and rule.victim([A, B, C]) == C


@pytest.mark.parametrize("decay", [0, -1, 1.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float):
    with pytest.raises(RequestError, match="decay"):
        LFU(decay=decay)


def test_likely_is_what_followed_the_experts_used_last():
    rule = Likely()
    for _ in range(50):
        for keys in ([A], [B], [A], [C], [A], [B]):  # B comes after A twice as often as C
            rule.touch(keys)
    rule.touch([A])
    assert rule.victim([B, C]) == C and rule.victim([A, B]) == A
    assert rule.admits(B, C) and not rule.admits(C, B) and not rule.admits(C, C)
    rule.touch([B])
    assert rule.victim([A, C]) == C


def test_likely_counts_by_definition():
    rule, layer_uses = Likely(decay=0.9), []
    generator = random.Random(0)
    for _ in range(200):
        layer_uses.append(generator.sample(range(3), generator.randint(1, 2)))
        rule.touch([ExpertKey(0, expert) for expert in layer_uses[-1]])
        rule.touch([ExpertKey(1, generator.randrange(3))])  # another layer

    def likelihood(expert: int) -> float:
        ages = [age for age, used in enumerate(reversed(layer_uses)) if expert in used]
        share = sum(0.1 * 0.9**age for age in ages)
        following = []
        for last in layer_uses[-1]:
            after = [uses for before, uses in itertools.pairwise(layer_uses) if last in before]
            following.append(sum(expert in uses for uses in after) / (len(after) + 1))
        return 0.5 * share + sum(following) / len(following)

    expected = sorted((A, B, C), key=lambda key: likelihood(key.expert))
    assert rule.victim([A, B, C]) == expected[0]
    assert rule.victim(expected[1:]) == expected[1]


def test_popularity_admits_what_is_more_popular():
    rule = StaticPopularity([[3, 1, 2]])
    assert rule.victim([A, B, C]) == B
    assert rule.admits(C, B) and not rule.admits(B, C) and not rule.admits(B, B)


def test_random_repeats_itself():
    choices = [
        [rule.victim([A, B, C]) for _ in range(50)]
        for rule in (Random(1), make_eviction("random", seed=1), Random(2))
    ]
    assert choices[0] == choices[1] != choices[2]
    assert set(choices[0]) == {A, B, C}


def run(rule: Eviction, uses: list[list[int]]) -> int:
    cache = SlotCache([2], num_layers=1, num_experts=4, num_staging=0, eviction=rule)
    for experts in uses:
        cache.use(0, experts)
        cache.unpin()
    return cache.counters.hits


def best_hits(uses: list[list[int]], held: frozenset[int] = frozenset()) -> int:
    """The most hits of all that two slots could hold."""
    if not uses:
        return 0
    (expert,), rest = uses[0], uses[1:]
    if expert in held:
        return 1 + best_hits(rest, held)
    kept = [held] if len(held) < 2 else [held - {other} for other in held]
    return max(best_hits(rest, some | {expert}) for some in kept)


def test_belady_is_the_optimum():
    generator = random.Random(0)
    for _ in range(50):
        uses = [[generator.randrange(4)] for _ in range(12)]
        keys = [[ExpertKey(0, expert) for expert in experts] for experts in uses]
        assert run(Belady(keys), uses) == best_hits(uses) >= run(LRU(), uses)


def test_names_make_rules():
    assert [type(make_eviction(name)) for name in EVICTIONS] == [LRU, LFU, Likely, Random]
    with pytest.raises(RequestError, match="lru or lfu or likely or random"):
        make_eviction("mru")
