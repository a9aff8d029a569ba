"""Choosing tokens: limits as in transformers, frequencies as asked for, seeds that repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.generation.options import GenerationOptions
from jmoe.generation.sampling import SamplingKind, SamplingValues, penalize, sample, truncate


def values(options: GenerationOptions, vocab_size: int) -> SamplingValues:
    return SamplingValues(
        temperature=jnp.float32(options.temperature),
        top_k=jnp.int32(options.top_k or vocab_size),
        top_p=jnp.float32(options.top_p),
        min_p=jnp.float32(options.min_p),
        repetition_penalty=jnp.float32(options.repetition_penalty),
    )


@functools.partial(jax.jit, static_argnames=("kind", "num"))
def draw(logits_V, values, kind, num, seed=0):
    logits = jnp.broadcast_to(logits_V, (num, logits_V.size))
    return sample(logits, None, jax.random.split(jax.random.key(seed), num), values, kind)


def kept_by_reference(logits: np.ndarray, options: GenerationOptions) -> set[int]:
    """The tokens that may be chosen, by the definitions, one limit after another."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: options.top_k or len(order)]
    weights = np.exp((logits[order] - logits.max()) / options.temperature)
    probs = weights / weights.sum()
    reached = np.cumsum(probs) - probs
    kept = [i for i, before in zip(order, reached, strict=True) if before < options.top_p]
    best = probs[0]
    return {i for i, p in zip(kept, probs, strict=False) if p >= options.min_p * best}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=12, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.31, 0.77, 1.0]),
    st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_limits_keep_what_their_definitions_keep(scores, top_k, top_p, min_p, temperature):
    logits = np.array(scores, np.float32) / 8
    options = GenerationOptions(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    scaled = jnp.asarray((logits - logits.max()) / temperature)[None]
    sorted_BV, ids = jax.lax.top_k(scaled, 12)
    kept = np.asarray(jnp.isfinite(truncate(sorted_BV, values(options, 12))))[0]
    assert {int(i) for i in np.asarray(ids)[0][kept]} == kept_by_reference(logits, options)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=0.7),
        GenerationOptions(temperature=1.3, top_k=3),
        GenerationOptions(temperature=1.0, top_p=0.8),
        GenerationOptions(temperature=1.0, min_p=0.3),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(options):
    logits = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
    weights = np.exp(logits / options.temperature)
    allowed = kept_by_reference(logits, options)
    expected = np.array([w if i in allowed else 0 for i, w in enumerate(weights)])
    expected /= expected.sum()
    tokens = draw(jnp.asarray(logits), values(options, 5), SamplingKind.of(options), 20_000)
    frequencies = np.bincount(np.asarray(tokens), minlength=5) / 20_000
    np.testing.assert_allclose(frequencies, expected, atol=0.015)


def test_greedy_takes_the_best_and_the_lowest_id_of_equals():
    options = GenerationOptions()
    tokens = draw(jnp.array([0.0, 2.0, 2.0, 1.0]), values(options, 4), SamplingKind.of(options), 3)
    np.testing.assert_array_equal(tokens, [1, 1, 1])


def test_a_tiny_temperature_neither_overflows_nor_wavers():
    options = GenerationOptions(temperature=1e-4)
    logits = jnp.array([3e4, 2.9e4, -3e4])
    tokens = draw(logits, values(options, 3), SamplingKind.of(options), 50)
    np.testing.assert_array_equal(tokens, np.zeros(50))


def test_equal_keys_give_equal_tokens_in_any_batch():
    options = GenerationOptions(temperature=1.0, top_p=0.9)
    logits = jax.random.normal(jax.random.key(1), (3, 100))
    keys = jax.random.split(jax.random.key(0), 3)
    kind, limits = SamplingKind.of(options), values(options, 100)
    together = sample(logits, None, keys, limits, kind)
    alone = [sample(logits[i : i + 1], None, keys[i : i + 1], limits, kind)[0] for i in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_repetition_penalty_lowers_scores_of_either_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(penalize(logits, seen, jnp.float32(2.0)), [[1.0, -4.0, 2.0, -2.0]])


def test_only_options_in_use_make_another_program():
    assert SamplingKind.of(GenerationOptions()) == SamplingKind(True, False, False)
    assert SamplingKind.of(GenerationOptions(top_p=0.5)) == SamplingKind(True, False, False)
    assert SamplingKind.of(GenerationOptions(temperature=1)) == SamplingKind(False, False, False)
    assert SamplingKind.of(GenerationOptions(temperature=1, min_p=0.1)).truncated
    assert SamplingKind.of(GenerationOptions(repetition_penalty=1.1)).penalized


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
        GenerationOptions(temperature=1.5, top_p=0.6),
        GenerationOptions(temperature=0.7, min_p=0.1),
    ],
    ids=str,
)
def test_limits_keep_what_transformers_keeps(options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32) * 3
    warpers = [transformers.TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        warpers.append(transformers.TopKLogitsWarper(options.top_k))
    warpers.append(transformers.TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(transformers.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits)
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores, dim=-1).numpy()

    sorted_BV, ids = jax.lax.top_k(jnp.asarray(logits) / options.temperature, 200)
    probs = jax.nn.softmax(truncate(sorted_BV, values(options, 200)), axis=-1)
    actual = np.zeros_like(expected)
    np.put_along_axis(actual, np.asarray(ids), np.asarray(probs), axis=-1)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
