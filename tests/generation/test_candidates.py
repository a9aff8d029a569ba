"""The best continuations on the device, against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.generation.candidates import best_continuations

NUM_PROMPTS, NUM_BEAMS, VOCAB, NUMBER = 2, 3, 11, 6
LOG_PROBS = np.array([-1.0, -0.5, -2.0, 0.0, -np.inf, -np.inf], np.float32)


def find(logits_BV, seen_BV=None, penalty=1.0):
    log_probs, indices = best_continuations(
        jnp.asarray(logits_BV),
        jnp.asarray(LOG_PROBS),
        None if seen_BV is None else jnp.asarray(seen_BV),
        jnp.float32(penalty),
        num_beams=NUM_BEAMS,
        number=NUMBER,
    )
    return np.asarray(log_probs), np.asarray(indices)


@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.5])
def test_they_are_the_best_over_all_beams_of_a_prompt(penalty):
    rng = np.random.default_rng(0)
    logits_BV = (5 * rng.standard_normal((NUM_PROMPTS * NUM_BEAMS, VOCAB))).astype(np.float32)
    seen_BV = rng.random(logits_BV.shape) < 0.3
    exact = logits_BV.astype(np.float64)
    next_BV = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    next_BV = np.where(seen_BV, next_BV * penalty, next_BV)  # below 0 all of them
    together_NV = (LOG_PROBS[:, None] + next_BV).reshape(NUM_PROMPTS, -1)
    expected = np.argsort(-together_NV, kind="stable")[:, :NUMBER]
    log_probs, indices = find(logits_BV, seen_BV, penalty)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(
        log_probs, np.take_along_axis(together_NV, expected, axis=1), rtol=1e-5
    )


def test_a_row_without_a_beam_has_none():
    log_probs, indices = find(np.zeros((NUM_PROMPTS * NUM_BEAMS, VOCAB), np.float32))
    assert np.isfinite(log_probs).all()
    np.testing.assert_array_equal(indices[1], range(NUMBER))  # ties: the lowest first
