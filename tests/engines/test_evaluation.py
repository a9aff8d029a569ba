"""Perplexity, divergence and agreement: small cases by hand, and a real model."""

import math

import jax
import numpy as np
import pytest

from jmoe.engines import evaluation
from jmoe.engines.evaluation import Window, cut_windows, evaluate, kl_divergence
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import CheckpointError, RequestError
from jmoe.models import random_weights
from tests.models.configs import small_config


def log(*rows: list[float]) -> np.ndarray:
    """Logits of these probabilities; any constant may be added to a row."""
    shifts = np.arange(len(rows), dtype=np.float32)[:, None] * 5
    return np.log(np.array(rows, np.float32)) + shifts


def constant(logits_LV: np.ndarray):
    return lambda token_ids: logits_LV[: len(token_ids)]


@pytest.fixture(scope="module")
def engine() -> ResidentEngine:
    config = small_config()
    parameters = random_weights.random_parameters(config, "float32", seed=5)
    return ResidentEngine(config, parameters, "float32", jax.local_devices()[0])


def test_windows_begin_with_the_token_that_texts_begin_with():
    windows = cut_windows([1, 10, 11, 12, 13, 14], 2, bos_token_id=1)
    assert windows == [Window([1, 10], [10, 11]), Window([1, 12], [12, 13])]


@pytest.mark.parametrize("bos_token_id", [None, 1])
def test_without_it_a_window_begins_with_the_token_before(bos_token_id: int | None):
    windows = cut_windows([10, 11, 12, 13, 14, 15], 2, bos_token_id=bos_token_id)
    assert windows == [Window([10, 11], [11, 12]), Window([12, 13], [13, 14])]


def test_windows_of_one_token():
    assert cut_windows([1, 10, 11], 1, bos_token_id=1) == [Window([1], [10]), Window([1], [11])]


def test_the_first_windows_only():
    assert len(cut_windows(list(range(100)), 10, max_windows=3)) == 3
    assert len(cut_windows(list(range(100)), 10, max_windows=30)) == 9


@pytest.mark.parametrize(
    ("token_ids", "size", "max_windows", "words"),
    [
        ([], 4, None, "shorter than one window"),
        ([1, 2, 3, 4], 4, None, "shorter than one window"),
        ([1, 2, 3], 0, None, "at least one prediction"),
        ([1, 2, 3], 1, 0, "at least one prediction"),
    ],
)
def test_unusable_windows(token_ids, size, max_windows, words):
    with pytest.raises(RequestError, match=words):
        cut_windows(token_ids, size, max_windows=max_windows)


def test_perplexity_by_hand():
    logits = constant(log([0.5, 0.25, 0.25], [0.2, 0.2, 0.6]))
    result = evaluate(logits, [Window([0, 0], [0, 1]), Window([0], [2])])
    # Probabilities 0.5, 0.2 and 0.25.
    assert result.perplexity == pytest.approx((0.5 * 0.2 * 0.25) ** (-1 / 3), rel=1e-6)
    assert (result.num_windows, result.num_predictions) == (2, 3)
    # Two windows with mean losses a and b: their mean is off by |a - b| / 2.
    a, b = -math.log(0.1) / 2, -math.log(0.25)
    expected = result.perplexity * abs(a - b) / 2
    assert result.perplexity_error == pytest.approx(expected, rel=1e-5)
    assert result.comparison is None


def test_one_window_has_no_standard_error():
    logits = constant(log([0.5, 0.5]))
    result = evaluate(logits, [Window([0], [1])], logits)
    assert result.perplexity_error is None
    assert result.comparison is not None
    assert result.comparison.perplexity_ratio_error is None


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens():
    result = evaluate(constant(np.zeros((3, 64), np.float32)), [Window([1, 2, 3], [4, 5, 6])] * 2)
    assert result.perplexity == pytest.approx(64)
    assert result.perplexity_error == pytest.approx(0)


def test_divergence_by_hand():
    reference, model = log([0.5, 0.5], [0.9, 0.1]), log([0.25, 0.75], [0.9, 0.1])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    np.testing.assert_allclose(kl_divergence(reference, model), [expected, 0], atol=1e-6)
    # It is not symmetric.
    other = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    np.testing.assert_allclose(kl_divergence(model, reference), [other, 0], atol=1e-6)


def test_comparison_by_hand():
    reference = log([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3])
    model = log([0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3])
    window = Window([0] * 4, [0, 0, 2, 1])
    result = evaluate(constant(model), [window], constant(reference)).comparison
    assert result is not None
    # Only the second distribution differs, and there by 0.3 log 2.
    divergence = 0.6 * math.log(2) + 0.3 * math.log(0.5)
    assert result.kl_mean == pytest.approx(divergence / 4, rel=1e-5)
    assert result.kl_median == pytest.approx(0, abs=1e-6)
    assert result.kl_p99 == pytest.approx(divergence * 0.97, rel=1e-5)
    assert result.top1_agreement == 0.75
    assert result.perplexity_ratio == pytest.approx(2 ** (1 / 4), rel=1e-6)
    assert result.reference_perplexity == pytest.approx((0.6 * 0.6 * 0.8 * 0.3) ** -0.25, rel=1e-6)


def test_a_model_does_not_differ_from_itself(engine: ResidentEngine):
    windows = cut_windows(np.random.default_rng(0).integers(64, size=200).tolist(), 32)
    result = evaluate(engine.logits, windows, engine.logits)
    assert result.comparison == evaluation.Comparison(
        reference_perplexity=result.perplexity,
        perplexity_ratio=1.0,
        perplexity_ratio_error=0.0,
        kl_mean=0.0,
        kl_median=0.0,
        kl_p99=0.0,
        top1_agreement=1.0,
    )


def test_pieces_of_the_logits_make_no_difference(monkeypatch):
    rng = np.random.default_rng(1)
    reference, model = rng.normal(size=(2, 17, 50)).astype(np.float32) * 4
    targets = rng.integers(50, size=17).tolist()
    whole = kl_divergence(reference, model), evaluation.log_probabilities(model, targets)
    monkeypatch.setattr(evaluation, "_MAX_ELEMENTS", 150)
    pieces = kl_divergence(reference, model), evaluation.log_probabilities(model, targets)
    np.testing.assert_array_equal(whole, pieces)


def test_logits_far_apart_do_not_overflow():
    reference, model = np.array([[0, 1000]], np.float32), np.array([[1000, 0]], np.float32)
    np.testing.assert_allclose(kl_divergence(reference, model), [1000])
    assert evaluation.log_probabilities(model, [1]) == -1000


def test_one_window_is_held_at_a_time():
    order = []

    def note(name):
        return lambda token_ids: order.append(name) or np.zeros((len(token_ids), 4), np.float32)

    windows = [Window([0], [1])] * 2
    evaluate(note("model"), windows, note("reference"), lambda: order.append("done"))
    assert order == ["model", "reference", "done"] * 2


def test_nan_is_an_error():
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity\n.*position 1"):
        evaluate(constant(logits), [Window([0, 0, 0], [1, 1, 1])])


def test_another_vocabulary_is_refused():
    model, reference = np.zeros((1, 4), np.float32), np.zeros((1, 5), np.float32)
    with pytest.raises(RequestError, match="another vocabulary"):
        evaluate(constant(model), [Window([0], [1])], constant(reference))
