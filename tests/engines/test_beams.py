"""Beams in all engines: one prefill a prompt, one batch of rows, and caches that follow parents."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.engines import beam_programs, memory
from jmoe.engines.beam_programs import COPIED_POSITIONS
from jmoe.engines.beam_run import BeamRun
from jmoe.engines.forecast import last_steps
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import CapacityError, RequestError
from jmoe.generation.beams import Hypothesis, place
from jmoe.generation.options import GenerationOptions
from jmoe.models.kv_cache import KVCache, LayerCache
from tests.engines.offload_engines import Model, random_model, some_tokens

NUM_BEAMS = 3
# More new tokens than are copied in one piece.
NEW_TOKENS = COPIED_POSITIONS + 8
OPTIONS = GenerationOptions(
    max_new_tokens=NEW_TOKENS, num_beams=NUM_BEAMS, num_return_sequences=NUM_BEAMS
)
# Of sums of log-probabilities, between engines that add in another order.
TOLERANCE = 1e-5

Engine = ResidentEngine | OffloadEngine


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "f32")


@pytest.fixture(scope="module")
def expected(model) -> list[list[Hypothesis]]:
    """What the resident engine finds."""
    return run_beams(model.resident, prompts_of(model))


@pytest.fixture
def thread(model) -> Iterator[OffloadEngine]:
    engine = model.engine((3,) * model.num_layers)
    yield engine
    engine.close()


def prompts_of(model: Model) -> list[list[int]]:
    return [some_tokens(model, n, seed=n).tolist() for n in (7, 14)]


def run_beams(
    engine: Engine, prompts: Sequence[Sequence[int]], options: GenerationOptions = OPTIONS
) -> list[list[Hypothesis]]:
    return [found.hypotheses for found in sorted(engine.start_beams(prompts, options))]


def assert_equal(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for some, others in zip(found, expected, strict=True):
        assert [h.token_ids for h in some] == [h.token_ids for h in others]
        scores = [h.score for h in others]
        np.testing.assert_allclose([h.score for h in some], scores, TOLERANCE)


def test_scores_are_those_of_the_sequences_read_at_once(model, expected):
    """So the KV cache of every beam was that of its own tokens."""
    for prompt, hypotheses in zip(prompts_of(model), expected, strict=True):
        assert len({h.token_ids for h in hypotheses}) == NUM_BEAMS
        for hypothesis in hypotheses:
            new_tokens = list(hypothesis.token_ids)
            logits_LV = model.resident.logits(prompt + new_tokens[:-1])[len(prompt) - 1 :]
            log_probs_LV = np.asarray(jax.nn.log_softmax(logits_LV))
            log_probs = log_probs_LV[range(NEW_TOKENS), new_tokens]
            assert hypothesis.score == pytest.approx(log_probs.mean(), rel=TOLERANCE)


@pytest.mark.parametrize("slots", [0, 3, 8])
def test_the_thread_engine_finds_the_same_with_any_number_of_slots(model, expected, slots):
    engine = model.engine((slots,) * model.num_layers)
    assert_equal(run_beams(engine, prompts_of(model)), expected)
    engine.close()


def test_experts_that_the_host_computes_change_nothing(model):
    """Which those are depends on how many tokens of all beams chose each."""
    options = GenerationOptions(max_new_tokens=10, num_beams=NUM_BEAMS, num_return_sequences=2)
    expected = run_beams(model.resident, prompts_of(model), options)
    engine = model.engine((2,) * model.num_layers, misses="split")
    assert_equal(run_beams(engine, prompts_of(model), options), expected)
    assert engine.hybrid is not None and engine.hybrid.host.counters.experts
    engine.close()


@pytest.mark.parametrize("policy", [{"engine": "compiled"}, {"engine": "auto"}], ids=str)
def test_steps_that_are_one_program_find_the_same(model, expected, policy):
    engine = model.engine((4,) * model.num_layers, tokens_per_call=3, **policy)
    run = engine.start_beams(prompts_of(model), OPTIONS)
    assert_equal([found.hypotheses for found in sorted(run)], expected)
    residency = run.stats().residency
    assert residency is not None
    if policy["engine"] == "auto":  # which has tried both by now
        assert "ms a token" in (residency.engine_reason or "")
    else:
        assert residency.engine == "compiled" and residency.decode.demand_loads
    engine.close()


def test_a_batch_finds_what_its_prompts_find_alone(model, expected):
    assert_equal(run_beams(model.resident, prompts_of(model)[:1]), expected[:1])


def test_searches_that_are_over_come_first_and_are_not_computed_any_more(model):
    longest = model.config.max_position_embeddings
    prompts = [[9, 8], [5] * (longest - 4)]
    options = GenerationOptions(max_new_tokens=9, num_beams=NUM_BEAMS)
    run = model.resident.start_beams(prompts, options)
    found = list(run)
    assert [len(f.hypotheses[0].token_ids) for f in found] == [4, 9]
    assert [f.prompt for f in found] == [1, 0]
    # The first tokens come out of the prefill.
    assert run.stats().decode_tokens == NUM_BEAMS * (3 + 8)


def test_what_is_counted(model, thread):
    prompts = prompts_of(model)
    options = GenerationOptions(max_new_tokens=6, num_beams=NUM_BEAMS)
    run = thread.start_beams(prompts, options)
    list(run)
    stats = run.stats()
    assert (stats.num_sequences, stats.num_beams) == (2 * NUM_BEAMS, NUM_BEAMS)
    assert stats.prefill_tokens == sum(map(len, prompts))  # each prompt once
    assert stats.new_tokens == 2 * NUM_BEAMS * 6
    assert stats.decode_tokens == 2 * NUM_BEAMS * 5
    # All tokens of a step have each layer's experts once, however many of them choose one.
    assert stats.residency is not None
    decode = stats.residency.decode
    needed = decode.hits + decode.demand_loads
    assert needed <= 5 * model.num_layers * model.num_experts
    again = thread.start_beams(prompts, options)
    assert again.stats().compiled_programs == 0


def test_what_beams_choose_is_recorded(model, thread):
    thread.recorder = model.recorder()
    prompts = prompts_of(model)
    list(thread.start_beams(prompts, GenerationOptions(max_new_tokens=4, num_beams=NUM_BEAMS)))
    trace = thread.recorder.trace()
    assert len(trace.prompt_expert_ids) == sum(map(len, prompts))
    assert len(trace.decode_expert_ids) == 2 * NUM_BEAMS * 3


def test_a_repetition_penalty_is_over_the_prompt_and_the_tokens_of_each_beam(model):
    prompt = [4, 8, 15, 16, 23, 42]
    options = GenerationOptions(
        max_new_tokens=20, num_beams=NUM_BEAMS, num_return_sequences=2, repetition_penalty=1e3
    )
    (hypotheses,) = run_beams(model.resident, [prompt], options)
    for hypothesis in hypotheses:
        assert len(set(hypothesis.token_ids) | set(prompt)) == 20 + len(prompt)


def test_one_token_needs_no_decode_step(model):
    run = model.resident.start_beams(
        [[1, 2]], GenerationOptions(max_new_tokens=1, num_beams=NUM_BEAMS)
    )
    (found,) = run
    best = model.resident.logits([1, 2])[-1]
    assert found.hypotheses[0].token_ids == (int(best.argmax()),)
    assert run.stats().decode_tokens == 0


def test_plans_have_room_for_the_kv_cache_of_all_beams(model):
    prompts = prompts_of(model)
    options = GenerationOptions(max_new_tokens=6, num_beams=NUM_BEAMS)
    budget = model.smallest_budget(2 * NUM_BEAMS, 24)
    engine = model.engine_within(budget)
    run = engine.start_beams(prompts, options)
    assert "6 x 128 positions" in str(engine.plan)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(run._state.cache))
    assert {item.name: item.num_bytes for item in engine.plan.items}["KV cache"] == cache_bytes
    list(run)
    residency = run.stats().residency
    assert residency is not None and residency.peak_device_bytes <= engine.plan.device_bytes
    engine.close()
    engine = model.engine_within(model.smallest_budget(2, 24))
    with pytest.raises(CapacityError, match="fewer sequences than 6 at once"):
        engine.start_beams(prompts, options)
    engine.close()


def test_beams_that_do_not_fit_are_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(memory.memory, "available_host_bytes", lambda: 1000)
    compiled = model.resident.programs.num_compiled
    with pytest.raises(CapacityError, match="KV cache of 5 x 128 positions") as caught:
        model.resident.start_beams([[1]], GenerationOptions(num_beams=5, max_new_tokens=9))
    assert "fewer prompts or beams" in str(caught.value)
    assert model.resident.programs.num_compiled == compiled


def test_another_generation_ends_the_beams_before(model, thread):
    first = thread.start_beams(prompts_of(model), OPTIONS)
    arrays = jax.tree.leaves(first._state.cache)
    options = GenerationOptions(max_new_tokens=4, num_beams=NUM_BEAMS)
    assert len(run_beams(thread, prompts_of(model), options)) == 2
    assert all(array.is_deleted() for array in arrays)
    with pytest.raises(RequestError, match="has ended"):
        list(first)


def test_the_cache_is_followed_in_place(model):
    run = model.resident.start_beams(prompts_of(model), OPTIONS)
    before = pointers(run)
    list(run)
    assert pointers(run) == before


def pointers(run: BeamRun) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(run._state.cache)]


CAPACITY = 3 * COPIED_POSITIONS


@settings(max_examples=40, deadline=None)
@given(
    parents=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    first=st.integers(0, CAPACITY),
    num_new=st.integers(1, CAPACITY),
)
def test_rows_get_the_positions_of_those_that_they_continue(parents, first, num_new):
    num_new = min(num_new, CAPACITY - first)
    if num_new < 1:
        return
    # Up to `first` all rows are equal: the prompt's.
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 2, CAPACITY, 3)).astype(np.float32)
    values[:, :, :first] = values[:1, :, :first]
    rows = place(parents, 4)
    moves = [(p, row, first) for p, row in zip(parents, rows, strict=True) if p != row]
    copies = np.zeros((5, 3), np.int32)
    copies[0, :2] = len(moves), -(-num_new // COPIED_POSITIONS)
    copies[1 : 1 + len(moves)] = moves or np.zeros((0, 3))
    cache = KVCache((LayerCache(k=jnp.asarray(values), v=jnp.asarray(-values)),))
    (layer,) = beam_programs.follow_parents(cache, jnp.asarray(copies)).layers
    end = first + num_new
    for parent, row in zip(parents, rows, strict=True):
        np.testing.assert_array_equal(layer.k[row, :, :end], values[parent, :, :end])
        np.testing.assert_array_equal(layer.v[row, :, :end], -values[parent, :, :end])


def test_the_time_of_a_step_is_forecast_from_as_many_tokens_of_a_prompt_as_it_has_beams():
    # Tokens 0 to 4 of one prompt and 10 to 12 of another, in a chunk of six each.
    choices = np.array([[[10 * b + t] for b in range(2) for t in range(6)]])
    steps = last_steps([choices, choices], [5, 3], 2, num_beams=2)
    tokens = [[sorted(layer[0, :, 0].tolist()) for layer in step] for step in steps]
    assert tokens == [[[0, 1]] * 2, [[2, 3, 10, 11]] * 2, [[4, 12]] * 2]
