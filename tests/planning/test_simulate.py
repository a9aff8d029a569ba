"""Simulation: the modelled link, what experts cost, and Mixtral's published statistics."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from jmoe.errors import RequestError
from jmoe.planning import predictors
from jmoe.planning.modelled_link import ModelledLink
from jmoe.planning.simulate import SIMULATED_EVICTIONS, SimulationResult, simulate
from jmoe.planning.traces import RoutingTrace
from jmoe.residency.cache import ExpertKey
from jmoe.residency.eviction import StaticPopularity
from tests.planning.traces import MIXTRAL_TRACE, needs_mixtral_trace, random_trace

A, B, C = (ExpertKey(0, expert) for expert in range(3))
LINK = {"blob_bytes": 1000, "bytes_per_s": 1000.0}  # one second for a copy


def trace_of(*tokens: list[list[int]], num_experts: int = 6) -> RoutingTrace:
    """A trace of tokens, each a list of experts by layer."""
    ids = np.array(tokens, np.uint8)
    return RoutingTrace(
        decode_expert_ids=ids,
        decode_offsets=np.array([0, len(ids)]),
        prompt_expert_ids=ids[:0],
        prompt_offsets=np.array([0, 0]),
        num_experts=num_experts,
    )


def test_needed_copies_overtake_predicted_ones_but_not_what_has_begun():
    link = ModelledLink(1.0)
    for key in (A, B):
        link.prefetch(key, 0.0)
    assert link.advance(0.0) == (A,)
    link.demand(C, 0.5)
    assert (link.arrival(C), link.arrival(A)) == (2.0, 1.0)
    assert link.advance(2.5) == (B,) and link.copies == 3
    assert link.advance(3.5) == ()


def test_copies_that_are_not_wanted_any_more_are_not_made():
    link = ModelledLink(1.0)
    for key in (A, B, C):
        link.prefetch(key, 0.0)
    link.advance(0.0)
    link.drop(B)
    link.demand(C, 0.0)
    assert not link.waits(B) and link.arrival(C) == 2.0 and link.copies == 2
    assert link.advance(5.0) == ()


def test_without_prediction_copies_and_layers_take_turns():
    trace = trace_of([[2, 3], [0, 1]], [[2, 3], [4, 5]])
    result = simulate(trace, slots=[2, 2], layer_s=0.25, **LINK)
    assert (result.hits, result.misses, result.full_hits, result.copies) == (4, 4, 2, 4)
    assert result.seconds == 4 * 1.0 + 4 * 0.25 and result.stall_s == 4.0
    assert (result.compute_s, result.link_s, result.link_bytes) == (1.0, 4.0, 4000)
    assert result.bound_share == 0.8 and result.tokens_per_s == 0.4


def test_right_predictions_hide_copies_behind_layers():
    trace = trace_of([[0, 1], [2, 3]])
    result = simulate(trace, slots=[2, 2], predictor="oracle", layer_s=3.0, **LINK)
    assert (result.seconds, result.stall_s, result.copies) == (6.0, 0.0, 2)
    assert (result.hits, result.speculated, result.useful, result.useless) == (4, 2, 2, 0)
    assert result.recall == ((0.5, 1.0),)
    # Too slow a link is waited for.
    result = simulate(trace, slots=[2, 2], predictor="oracle", layer_s=0.5, **LINK)
    assert (result.seconds, result.stall_s) == (0.5 + 1.5 + 0.5, 1.5)


def test_wrong_predictions_cost_the_copy_under_way_and_no_more():
    predictions = np.full((1, 2, 1, 2), -1, np.int16)
    predictions[0, 1, 0] = [4, 5]
    trace = dataclasses.replace(trace_of([[0, 1], [2, 3]]), predictions=predictions)
    result = simulate(trace, slots=[2, 2], predictor="recorded", layer_s=0.5, **LINK)
    # Expert 4 is on its way for half a second more; 5 is never copied.
    assert result.copies == 3 and result.stall_s == 0.5 + 2.0
    assert (result.speculated, result.useful, result.useless) == (2, 0, 1)
    assert result.recall == ((0.0, 0.0),)


def test_a_copy_that_was_predicted_and_not_begun_is_needed_now():
    trace = trace_of([[0, 1], [2, 3], [0, 1]])
    result = simulate(trace, slots=[2, 2, 0], predictor="oracle", lookahead=2, layer_s=0.5, **LINK)
    # In this order: 2 and 3 of layer 1, then 0 and 1 of layer 2.
    assert result.seconds == 0.5 + 1.5 + 0.5 + 1.5 + 0.5
    assert result.hits == 6 and result.misses == 0


@pytest.mark.parametrize("predictor", ["none", "oracle", "popularity", "markov"])
@pytest.mark.parametrize("slots", [[0, 0, 0], [2, 2, 2], [0, 6, 1], 7, 0])
@pytest.mark.parametrize("eviction", SIMULATED_EVICTIONS)
def test_every_policy_adds_up(eviction: str, slots: list[int] | int, predictor: str):
    trace = random_trace()
    result = simulate(
        trace, slots=slots, eviction=eviction, predictor=predictor, lookahead=2, layer_s=0.7, **LINK
    )
    assert result.hits + result.misses == trace.num_tokens * trace.num_layers * trace.top_k
    assert result.seconds == pytest.approx(result.compute_s + result.stall_s)
    assert result.misses <= result.copies <= result.misses + result.speculated
    assert result.useful + result.useless <= result.speculated
    # The last copy may be one that nobody waits for.
    assert result.bound_s <= result.seconds + 1.0
    assert json.loads(json.dumps(result.to_json()))["hit_rate"] == result.hit_rate
    if predictor == "none":
        untimed = simulate(trace, slots=slots, eviction=eviction)
        same = ("hits", "misses", "full_hits", "copies")
        assert all(getattr(untimed, name) == getattr(result, name) for name in same)
        assert untimed.tokens_per_s == math.inf and untimed.to_json()["tokens_per_s"] is None


def test_an_empty_trace_is_simulated():
    result = simulate(random_trace(num_tokens=0), slots=[2, 2, 2], predictor="markov")
    assert (result.hit_rate, result.loads_per_token, result.bound_share) == (0, 0, 0)


def test_noisy_predictions_have_their_recall_and_never_the_same_expert_twice():
    trace = random_trace(num_tokens=2000)
    predicted = predictors.predict(trace, "noisy", 2, 3, recall=(0.8, 0.5))
    rates = predictors.recall(trace, predicted)
    assert rates[:, 1].tolist() == pytest.approx([0.8, 0.5], abs=0.03)
    assert (predicted[:, 1:, 0, 2] == -1).all()  # no more than top_k
    named = np.sort(predicted[:, 1:, 0, :2], axis=-1)
    assert (named[..., 0] != named[..., 1]).all() and (named >= 0).all()
    right = predicted[:, 2:] == trace.decode_expert_ids[:, 2:, None, [0, 1, 0]]
    assert not (right[:, :, 1] & ~right[:, :, 0])[..., :2].any()
    with pytest.raises(RequestError, match="every distance"):
        predictors.predict(trace, "noisy", 2, 2, recall=(0.8, 1.2))


def test_where_all_experts_are_used_a_noisy_prediction_leaves_some_out():
    trace = random_trace(num_experts=3)
    predicted = predictors.predict(trace, "noisy", 1, 2, recall=(0.0,))
    assert (predicted[:, 1:, 0, 0] >= 0).all() and (predicted[:, 1:, 0, 1] == -1).all()


def test_popularity_and_pairs_predict_what_they_learnt():
    # The pair 0, 1 is followed by 2, 3; the pair 0, 2, seen less often, by 4, 5.
    train = trace_of(*[[[1, 0], [2, 3]]] * 3, *[[[0, 2], [4, 5]]] * 2)
    trace = trace_of([[0, 1], [0, 1]], [[2, 0], [0, 1]], [[4, 5], [0, 1]])
    popularity = predictors.predict(trace, "popularity", 1, 2, train)
    assert popularity[:, 1, 0].tolist() == [[2, 3]] * 3
    markov = predictors.predict(trace, "markov", 1, 2, train)
    assert markov[:, 1, 0].tolist() == [[2, 3], [4, 5], [2, 3]]
    assert (popularity[:, 0] == -1).all() and (markov[:, 0] == -1).all()


def test_recall_counts_by_distance_and_number():
    trace = trace_of([[0, 1], [2, 3], [4, 5]])
    predictions = np.full((1, 3, 3, 2), -1, np.int16)
    predictions[0, 1, 0] = [2, 0]
    predictions[0, 2, 0] = [5, 4]
    predictions[0, 2, 1] = [0, 4]
    rates = predictors.recall(trace, predictions)
    assert rates.tolist() == [[0.5, 0.75], [0.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slots": [2, 2]}, "for 3 layers"),
        ({"slots": [2, 2, 7]}, "0 to 6"),
        ({"slots": 19}, "0 to 6"),
        ({"slots": [2, 2, -1]}, "0 to 6"),
        ({"num_staging": -1}, "num_staging"),
        ({"slots": [1, 1, 1], "num_staging": 0}, "too few places"),
        ({"eviction": "mru"}, "belady"),
        ({"predictor": "gates"}, "markov"),
        ({"predictor": "recorded"}, "no predictions"),
        ({"predictor": "oracle", "lookahead": -1}, "lookahead"),
        ({"fetch": -1}, "fetch"),
        ({"bytes_per_s": 0}, "bytes_per_s"),
        ({"latency_s": -1}, "latency_s"),
        ({"layer_s": math.nan}, "layer_s"),
        ({"predictor": "markov", "train": random_trace(num_experts=8)}, "8 experts"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], words: str):
    arguments = {"slots": [2, 2, 2]} | arguments
    with pytest.raises(RequestError) as raised:
        simulate(random_trace(), **arguments)
    assert words in str(raised.value)


def test_more_predictions_than_were_recorded_are_refused():
    trace = random_trace()
    predictions = np.full((40, 3, 1, 2), -1, np.int16)
    trace = dataclasses.replace(trace, predictions=predictions)
    assert simulate(trace, slots=[2] * 3, predictor="recorded").speculated == 0
    for lookahead, fetch in ((2, 2), (1, 3)):
        with pytest.raises(RequestError, match="fewer predictions"):
            simulate(trace, slots=[2] * 3, predictor="recorded", lookahead=lookahead, fetch=fetch)


def replay(trace: RoutingTrace, num_slots: int, eviction, **arguments) -> SimulationResult:
    """The same number of slots in every layer, and no more staging than needed."""
    slots = [num_slots] * trace.num_layers
    return simulate(trace, slots=slots, eviction=eviction, num_staging=trace.top_k, **arguments)


@pytest.mark.slow
@needs_mixtral_trace
def test_lru_has_the_hit_rates_of_the_traces_readme():
    trace = RoutingTrace.load(MIXTRAL_TRACE)
    assert (trace.num_experts, trace.num_tokens) == (8, 13_881)
    expected = {2: 0.3498, 3: 0.4717, 4: 0.5953, 5: 0.7111, 6: 0.8190}
    rates = {k: replay(trace, k, "lru").hit_rate for k in expected}
    assert rates == pytest.approx(expected, abs=0.002)


@needs_mixtral_trace
def test_other_rules_have_the_published_hit_rates_and_likely_beats_lru():
    """Counted independently on twice as many conversations, hence the tolerance."""
    whole = RoutingTrace.load(MIXTRAL_TRACE)
    train, test = whole.select(range(0, 69, 2)), whole.select(range(1, 69, 2))
    part = whole.select(range(0, 69, 4))
    assert replay(part, 4, "belady").hit_rate == pytest.approx(0.738, abs=0.01)
    assert replay(part, 4, "lfu").hit_rate == pytest.approx(0.617, abs=0.015)
    static = replay(test.select(range(0, 34, 2)), 4, "popularity", train=train)
    assert static.hit_rate == pytest.approx(0.533, abs=0.015)
    anything = StaticPopularity(np.random.default_rng(0).random((32, 8)).tolist())
    assert replay(part, 4, anything).hit_rate == pytest.approx(0.5, abs=0.015)
    for num_slots in (2, 4):
        gain = replay(part, num_slots, "likely").hit_rate - replay(part, num_slots, "lru").hit_rate
        assert gain > 0.01
    few = whole.select(range(0, 69, 12))
    one_pool = simulate(few, slots=4 * 32, num_staging=2)
    assert one_pool.hit_rate == pytest.approx(0.534, abs=0.015)


@needs_mixtral_trace
def test_ids_alone_predict_as_well_as_published():
    whole = RoutingTrace.load(MIXTRAL_TRACE)
    train, test = whole.select(range(0, 69, 2)), whole.select(range(1, 69, 2))
    published = {
        "popularity": [0.141, 0.274, 0.403, 0.530],
        "markov": [0.263, 0.464, 0.612, 0.728],
    }
    for name, expected in published.items():
        predictions = predictors.predict(test, name, 1, 4, train)
        rates = predictors.recall(test, predictions)[0]
        assert rates.tolist() == pytest.approx(expected, abs=0.01)
