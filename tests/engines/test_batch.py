"""The resident engine: lengths, limits, and what is refused before any work."""

import jax
import numpy as np
import pytest

from jmoe.engines import memory, prompts
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import CapacityError, RequestError
from jmoe.generation.options import GenerationOptions
from jmoe.models import random_weights
from tests.models.configs import small_config


@pytest.fixture(scope="module")
def engine() -> ResidentEngine:
    config = small_config(max_position_embeddings=40)
    parameters = random_weights.random_parameters(config, "float32", seed=3)
    return ResidentEngine(config, parameters, "float32", jax.local_devices()[0])


def tokens(engine, prompts, options, finish=()):
    """All tokens of every sequence; finish holds (step, sequence) pairs to end early."""
    run = engine.start(prompts, options)
    out = [[] for _ in prompts]
    ended = set()
    for step, token_ids_B in enumerate(run):
        for i in range(len(prompts)):
            if i not in ended:
                out[i].append(int(token_ids_B[i]))
                if len(out[i]) == run.max_new_tokens[i] or (step, i) in finish:
                    ended.add(i)
                    run.finish(i)
    return out, run.stats()


def test_every_sequence_stops_at_its_own_limit(engine):
    prompts = [[1], [2] * 7, [3] * 35]
    out, stats = tokens(engine, prompts, GenerationOptions(max_new_tokens=9))
    assert [len(sequence) for sequence in out] == [9, 9, 5]
    assert stats.prefill_tokens == 43
    assert stats.new_tokens == 23
    assert stats.decode_tokens == 20


def test_a_batch_gives_what_each_prompt_gives_alone(engine):
    prompts = [[1, 5, 9], [2] * 20, [7, 7, 3, 60, 12]]
    options = GenerationOptions(max_new_tokens=12)
    together, _ = tokens(engine, prompts, options)
    alone = [tokens(engine, [prompt], options)[0][0] for prompt in prompts]
    assert together == alone


def test_a_finished_sequence_leaves_the_others_alone(engine):
    prompts = [[1, 5, 9], [2] * 20, [7, 7, 3, 60, 12]]
    options = GenerationOptions(max_new_tokens=12)
    whole, _ = tokens(engine, prompts, options)
    cut, stats = tokens(engine, prompts, options, finish={(2, 1), (5, 0)})
    assert cut == [whole[0][:6], whole[1][:3], whole[2]]
    assert stats.new_tokens == 6 + 3 + 12


def test_a_repetition_penalty_is_over_prompt_and_new_tokens(engine):
    prompt = [4, 8, 15, 16, 23, 42]
    options = GenerationOptions(max_new_tokens=20, repetition_penalty=1e6)
    out, _ = tokens(engine, [prompt], options)
    assert len(set(out[0]) | set(prompt)) == len(out[0]) + len(prompt)


def test_ending_everything_ends_the_run(engine):
    run = engine.start([[1], [2]], GenerationOptions(max_new_tokens=30))
    steps = 0
    for _ in run:
        steps += 1
        if steps == 3:
            run.finish(0)
            run.finish(1)
    assert steps == 3


def test_one_token_needs_no_decode_step(engine):
    out, stats = tokens(engine, [[1, 2]], GenerationOptions(max_new_tokens=1))
    assert len(out[0]) == 1
    assert stats.decode_tokens == 0
    assert stats.decode_tok_per_s == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[1], []], "prompt 2 of 2"),
        ([[1] * 40], "longer than the model's context"),
        ([[64]], "outside the model's vocabulary"),
        ([[-1]], "outside the model's vocabulary"),
    ],
)
def test_an_unusable_prompt_is_refused(engine, prompts, message):
    with pytest.raises(RequestError, match=message):
        engine.start(prompts, GenerationOptions())


def test_logits_take_the_whole_context_and_no_more(engine):
    assert engine.logits([1] * 40).shape == (40, 64)
    with pytest.raises(RequestError, match="longer than the model's context"):
        engine.logits([1] * 41)


def test_a_cache_that_does_not_fit_is_refused_before_any_work(engine, monkeypatch):
    monkeypatch.setattr(memory.memory, "available_host_bytes", lambda: 1000)
    compiled = engine.programs.num_compiled
    with pytest.raises(CapacityError, match="KV cache of 5 x 128 positions"):
        engine.start([[1]] * 5, GenerationOptions())
    assert engine.programs.num_compiled == compiled


def test_prompts_are_padded_at_the_end():
    np.testing.assert_array_equal(prompts.pad_prompts([[1, 2], [3]], 3), [[1, 2, 0], [3, 0, 0]])
