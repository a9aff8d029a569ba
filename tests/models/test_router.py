"""Routing: the best experts, in order, with the right weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RouterConfig
from jmoe.models.router import route, softmax_top_k


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_probabilities_best_first(normalise):
    config = RouterConfig(num_experts=4, top_k=2, norm_topk_prob=normalise)
    routing = softmax_top_k(jnp.log(jnp.array([[0.1, 0.2, 0.4, 0.3]])), config)
    np.testing.assert_array_equal(routing.expert_ids_TK, [[2, 3]])
    expected = np.array([[0.4, 0.3]]) / (0.7 if normalise else 1)
    np.testing.assert_allclose(routing.weights_TK, expected, rtol=1e-6)


def test_ties_go_to_the_lowest_id():
    config = RouterConfig(num_experts=8, top_k=3, norm_topk_prob=True)
    routing = softmax_top_k(jnp.zeros((5, 8)), config)
    np.testing.assert_array_equal(routing.expert_ids_TK, [[0, 1, 2]] * 5)


def test_the_choice_is_made_in_float32():
    # Two experts whose scores differ by less than bfloat16 can hold at this size.
    config = RouterConfig(num_experts=2, top_k=1, norm_topk_prob=True)
    hidden = jnp.ones((1, 257), jnp.bfloat16)
    w_router = jnp.ones((2, 257), jnp.bfloat16).at[0, 0].set(0.5)
    routing = route(hidden, w_router, config)
    assert routing.expert_ids_TK.item() == 1
    assert routing.weights_TK.dtype == routing.probs_TE.dtype == jnp.float32
