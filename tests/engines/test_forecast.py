"""What decode steps are predicted to take, from what a prompt's tokens chose."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.engines.contest import MISSES, Way
from jmoe.engines.forecast import rehearsals, step_times_s
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.policy import Policy
from jmoe.planning.simulate import simulate
from jmoe.planning.traces import RoutingTrace
from tests.planning.traces import random_trace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 6, 2
COSTS = ExpertCosts(copy_s=2e-3, host=lambda n: 1e-3 * n, device=lambda n: 1e-4)
STEP_S = 3e-3


def some_steps(num_steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Choices of one sequence, without predictions."""
    ids_TLK = some_trace(num_steps, seed).decode_expert_ids.astype(np.int32)
    return [list(ids_LK[:, None, None]) for ids_LK in ids_TLK]


def some_trace(num_steps: int, seed: int = 0) -> RoutingTrace:
    """Experts in ascending order, as engines take them."""
    trace = random_trace(num_steps, NUM_LAYERS, NUM_EXPERTS, TOP_K, seed)
    return dataclasses.replace(trace, decode_expert_ids=np.sort(trace.decode_expert_ids))


def times_s(ways: list[Way], steps, costs: ExpertCosts = COSTS) -> list[float]:
    policy = Policy(
        mode="offload", misses="auto", slots=(2,) * NUM_LAYERS, num_staging=4, eviction="lru"
    )
    return step_times_s(
        ways,
        steps,
        dict.fromkeys(range(NUM_LAYERS), (0, 1)),
        policy,
        costs,
        step_s=dict.fromkeys((*MISSES, "compiled"), STEP_S),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
    )


@pytest.mark.parametrize(
    ("way", "misses"), [("thread", "load"), ("host", "host"), ("split", "split")]
)
def test_a_forecast_is_what_the_simulator_says_of_the_same_routing(way, misses):
    steps = some_steps(20)
    result = simulate(
        some_trace(20),
        slots=(2,) * NUM_LAYERS,
        num_staging=4,
        eviction="lru",
        blob_bytes=1,
        bytes_per_s=1 / COSTS.copy_s,
        layer_s=STEP_S / NUM_LAYERS,
        misses=misses,
        host_s=COSTS.host(1),
        device_s=COSTS.device(1),
    )
    assert sum(times_s([way] * 20, steps)) == pytest.approx(result.seconds)


def test_ways_may_change_between_steps_and_find_what_the_one_before_left():
    steps = some_steps(1) * 2  # the same twice
    alone_s, again_s = times_s(["host", "host"], steps)
    assert alone_s == pytest.approx(again_s)  # the host copies nothing
    assert times_s(["thread", "host"], steps)[1] == pytest.approx(STEP_S)
    assert times_s(["compiled", "compiled"], steps)[1] == pytest.approx(STEP_S)


def test_the_loop_is_held_up_by_each_copy_and_the_compiled_engine_is_not():
    steps = some_steps(1)
    num_missing = sum(int(np.sum(choices > 1)) for choices in steps[0])
    slow = dataclasses.replace(COSTS, fetch_s=1e-3)
    assert num_missing > 0
    fetched: dict[Way, int] = {"thread": num_missing, "compiled": 0}
    for way, num_fetched in fetched.items():
        (before_s,), (after_s,) = (times_s([way], steps, costs) for costs in (COSTS, slow))
        assert after_s - before_s == pytest.approx(1e-3 * num_fetched)


@pytest.mark.parametrize("way", ["thread", "split", "host"])
def test_steps_of_many_sequences_whose_experts_have_no_room_at_once(way):
    one = some_steps(8, seed=1)
    many = [
        [
            np.concatenate([some_steps(8, seed)[t][layer] for seed in range(5)], axis=1)
            for layer in range(NUM_LAYERS)
        ]
        for t in range(8)
    ]
    num_used = [sum(len(np.unique(choices)) for choices in step) for step in many]
    assert max(num_used) > 5 * NUM_LAYERS  # more than a layer has places
    times = times_s([way] * 8, many)
    assert all(after > before for before, after in zip(times_s([way] * 8, one), times, strict=True))


@given(num_steps=st.integers(1, 20), num_held=st.integers(0, NUM_EXPERTS), seed=st.integers(0, 9))
def test_each_half_of_the_steps_begins_with_favourites_of_the_other(num_steps, num_held, seed):
    steps = some_steps(num_steps, seed)
    rng = np.random.default_rng(seed)
    held = {layer: rng.permutation(NUM_EXPERTS)[:num_held].tolist() for layer in range(NUM_LAYERS)}
    halves = rehearsals(steps, held, TOP_K)
    assert [step for _, part in halves for step in part] == steps
    if len(halves) == 1:  # too short to be divided
        assert halves[0][0] == held and num_steps < 8
        return
    for (favourites, _), (_, other) in zip(halves, reversed(halves), strict=True):
        for layer, experts in favourites.items():
            assert len(set(experts)) == len(experts) == num_held
            chosen = np.concatenate([step[layer].ravel() for step in other])
            uses = np.bincount(chosen, minlength=NUM_EXPERTS)
            by_use = uses[experts].tolist()
            assert by_use == sorted(by_use)  # the most used last
            assert sum(by_use) == sum(sorted(uses)[NUM_EXPERTS - num_held :])
