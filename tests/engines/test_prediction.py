"""Which experts are said to come, and how often that was right, against counting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.engines.prediction import GatePredictor, Recall, by_votes


def test_routers_say_which_experts_the_next_layers_need():
    predictor = GatePredictor(num_layers=4)
    predicted_NTW = np.array([[[5, 2]], [[1, 7]]])
    assert list(predictor.predict(0, predicted_NTW)) == [(1, [5, 2]), (2, [1, 7])]
    assert list(predictor.predict(2, predicted_NTW)) == [(3, [5, 2])]
    assert list(predictor.predict(3, predicted_NTW)) == []
    assert list(predictor.predict(0, predicted_NTW[:0])) == []


def test_what_most_tokens_name_comes_first_then_what_they_name_first():
    assert by_votes(np.array([[4, 0, 6]])) == [4, 0, 6]
    assert by_votes(np.array([[4, 0], [3, 0], [1, 2]])) == [0, 4, 3, 1, 2]
    assert by_votes(np.array([[4, 0, -1], [-1, -1, -1]])) == [4, 0]
    assert by_votes(np.array([[-1, -1]])) == []


@st.composite
def steps(draw):
    """Chosen [L, T, K] and predicted [L, N, T, W] of some steps; -1 for tokens that ended."""
    num_layers, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    max_distance, num_predicted = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    num_tokens, width = draw(st.integers(1, 3)), max(num_predicted, top_k)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(draw(st.integers(0, 4))):
        chosen = rng.permuted(np.broadcast_to(np.arange(6), (num_layers, num_tokens, 6)), axis=-1)
        shape = (num_layers, max_distance, num_tokens, 6)
        predicted = rng.permuted(np.broadcast_to(np.arange(6), shape), axis=-1)
        chosen, predicted = chosen[..., :top_k], predicted[..., :width]
        predicted[..., num_predicted:] = -1
        ended = rng.random(num_tokens) < 0.3
        chosen[:, ended] = predicted[:, :, ended] = -1
        made.append((chosen, predicted))
    return max_distance, num_predicted, made


@settings(max_examples=200, deadline=None)
@given(steps())
def test_recall_is_what_counting_one_by_one_gives(case):
    max_distance, num_predicted, made = case
    recall = Recall(max_distance, num_predicted)
    for chosen, predicted in made:
        recall.add(chosen, predicted)

    expected = []
    for distance in range(1, max_distance + 1):
        found, all_chosen = [0] * num_predicted, 0
        for chosen_LTK, predicted_LNTW in made:
            for layer in range(distance, len(chosen_LTK)):
                for token, experts in enumerate(chosen_LTK[layer]):
                    named = predicted_LNTW[layer - distance, distance - 1, token].tolist()
                    for expert in experts[experts >= 0].tolist():
                        all_chosen += 1
                        for n in range(num_predicted):
                            found[n] += expert in named[: n + 1]
        if all_chosen:
            expected.append(tuple(f / all_chosen for f in found))
    assert recall.rates() == tuple(pytest.approx(rates) for rates in expected)


def test_no_look_ahead_has_no_recall():
    recall = Recall(0, 2)
    recall.add(np.zeros((3, 1, 2), np.int32), np.zeros((3, 0, 1, 2), np.int32))
    assert recall.rates() == ()
