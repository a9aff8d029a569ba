"""The offload engine: batches of all kinds, what it holds, what it compiles, and what it counts."""

import gc
import time
import weakref
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jmoe.engines.offload import OffloadEngine
from jmoe.engines.offload_steps import OffloadSteps
from jmoe.errors import TransferError
from jmoe.generation.options import GenerationOptions
from jmoe.metrics import Traffic
from jmoe.residency.entries import ExpertKey
from jmoe.residency.link import ThrottledLink
from tests.engines.offload_engines import Model, greedy, random_model, some_tokens
from tests.residency.counting_link import CountingLink
from tests.residency.faulty_link import FaultyLink

CHUNK = 16
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture
def engine(model) -> Iterator[OffloadEngine]:
    """With slots for three of eight experts in each layer."""
    engine = model.engine((3,) * model.num_layers, prefill_chunk=CHUNK)
    yield engine
    engine.close()


@pytest.fixture
def compilations():
    """Compilations since the test cleared it; eager operations compile too."""
    events: list[str] = []

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    yield events
    jax.monitoring.unregister_event_duration_listener(on_event)


def prompts_of(model: Model, *lengths: int) -> list[list[int]]:
    return [some_tokens(model, n, seed=n).tolist() for n in lengths]


# Batches


def test_prompts_of_unequal_lengths_give_what_the_resident_model_gives(model, engine):
    prompts = prompts_of(model, 3, 30, 17)  # of one chunk and of two
    texts, run = greedy(engine, prompts, NEW_TOKENS)
    expected, resident_run = greedy(model.resident, prompts, NEW_TOKENS)
    assert texts == expected
    assert run.stats().prefill_tokens == resident_run.stats().prefill_tokens == 50
    assert run.stats().decode_tokens == 3 * (NEW_TOKENS - 1)


def test_a_batch_gives_what_each_prompt_gives_alone(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    texts, _ = greedy(engine, prompts, NEW_TOKENS)
    assert texts == [greedy(engine, [prompt], NEW_TOKENS)[0][0] for prompt in prompts]


def test_sequences_that_end_leave_the_others_alone(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    whole, _ = greedy(engine, prompts, NEW_TOKENS)
    for limits in ((2, 7, 10), (10, 1, 1), (1, 1, 1)):
        texts, run = greedy(engine, prompts, limits)
        assert texts == [text[:limit] for text, limit in zip(whole, limits, strict=True)]
        assert run.stats().decode_tokens == sum(limits) - 3


def test_sampling_and_penalties_are_those_of_the_resident_model(model, engine):
    options = GenerationOptions(
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=(),
        temperature=0.9,
        top_p=0.9,
        repetition_penalty=1.2,
        seed=3,
    )
    prompts = prompts_of(model, 3, 30, 17)
    expected = np.stack(list(model.resident.start(prompts, options)))
    np.testing.assert_array_equal(np.stack(list(engine.start(prompts, options))), expected)


def test_batches_of_all_sizes_one_after_another_are_planned_anew(model):
    """Within one budget: a larger batch leaves fewer slots, a smaller one more again."""
    budget_bytes = model.smallest_budget(batch_size=3, num_positions=128) + 8 * model.blob_bytes
    engine = model.engine_within(budget_bytes)
    resident = model.resident
    slots = []
    for lengths in ((3,), (30, 90, 17), (5,), (9, 9, 9)):
        prompts = prompts_of(model, *lengths)
        texts, run = greedy(engine, prompts, NEW_TOKENS)
        assert texts == greedy(resident, prompts, NEW_TOKENS)[0]
        residency = run.stats().residency
        assert residency is not None
        slots.append(engine.plan.policy.num_slots)
        assert slots[-1] == residency.num_slots
        assert residency.peak_places <= residency.num_slots + residency.num_staging
        assert residency.peak_device_bytes <= engine.plan.device_bytes <= budget_bytes
    assert slots[1] <= slots[3] < slots[0] == slots[2]
    engine.close()


def test_a_run_that_is_left_and_one_that_is_begun_instead(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    expected, _ = greedy(engine, prompts, NEW_TOKENS)
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=())
    left = iter(engine.start(prompts, options))
    for _ in range(3):
        next(left)
    assert greedy(engine, prompts, NEW_TOKENS)[0] == expected
    left.close()
    assert greedy(engine, prompts, NEW_TOKENS)[0] == expected


def test_a_slow_and_irregular_link_changes_nothing(model):
    """Copies that come late, in any order of events, and so find the cache in other states."""
    prompts = prompts_of(model, 3, 30, 17)
    plain = model.engine(prefill_chunk=CHUNK)
    expected, logits = greedy(plain, prompts, NEW_TOKENS)[0], plain.logits(prompts[1])
    decoded = plain.decode_logits(some_tokens(model, 3, 8))
    plain.close()
    links = [
        ThrottledLink(model.link(), 1e8, 1e-4),
        FaultyLink(model.link(), slow_rate=0.5, slow_s=2e-3, seed=1),
        FaultyLink(model.link(), slow_rate=0.1, slow_s=1e-2, seed=2),
        FaultyLink(ThrottledLink(model.link(), 3e8), slow_rate=0.3, slow_s=1e-3, seed=3),
    ]
    for link, slots in zip(links, (0, 2, 3, 5), strict=True):
        engine = model.engine((slots,) * model.num_layers, link=link, prefill_chunk=CHUNK)
        assert greedy(engine, prompts, NEW_TOKENS)[0] == expected
        np.testing.assert_array_equal(engine.logits(prompts[1]), logits)
        np.testing.assert_array_equal(engine.decode_logits(some_tokens(model, 3, 8)), decoded)
        engine.close()


@pytest.mark.parametrize("num_good", [0, 1, 5, 11, 30, 60])
def test_after_a_failed_copy_the_engine_goes_on(model, num_good):
    prompts, tokens = prompts_of(model, 3, 30, 17), some_tokens(model, 1, 8)
    plain = model.engine(prefill_chunk=CHUNK)
    link = FaultyLink(model.link(), script=["ok"] * num_good + ["finish", "start"])
    engine = model.engine((0,) * model.num_layers, link=link, prefill_chunk=CHUNK)
    for work in (
        lambda e: e.decode_logits(tokens),
        lambda e: e.logits(prompts[1]),
        lambda e: np.array(greedy(e, prompts, NEW_TOKENS)[0]),
    ):
        expected = work(plain)
        for _ in range(3):  # each failure is told once
            try:
                np.testing.assert_array_equal(work(engine), expected)
            except TransferError as error:
                assert "layer" in str(error) and "expert" in str(error)
    assert link.num_failed == 2
    np.testing.assert_array_equal(engine.decode_logits(tokens), plain.decode_logits(tokens))
    engine.close()
    plain.close()


# What is compiled


def test_after_warm_up_nothing_is_compiled(model, engine, compilations, monkeypatch):
    """Not even in the first batch of its sizes, of which compilation is timed apart."""
    prefill = OffloadSteps.prefill

    def from_here_on(*args):
        compilations.clear()
        return prefill(*args)

    monkeypatch.setattr(OffloadSteps, "prefill", from_here_on)
    for lengths in ((3,), (30, 17, 5)):
        _, run = greedy(engine, prompts_of(model, *lengths), NEW_TOKENS)
        assert compilations == []
    compilations.clear()
    for lengths in ((7,), (31, 4, 18)):
        _, run = greedy(engine, prompts_of(model, *lengths), NEW_TOKENS)
        assert run.stats().compiled_programs == 0
    assert compilations == []


def test_other_caches_and_policies_need_no_other_programs(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    greedy(engine, prompts, NEW_TOKENS)
    for slots in model.slots_of_every_kind().values():
        other = model.engine(slots, eviction="random", prefill_chunk=CHUNK)
        _, run = greedy(other, prompts, NEW_TOKENS)
        assert run.stats().compiled_programs == 0
        other.close()


def test_the_listener_notices_compilations(compilations):
    """Otherwise the test of compilations would pass for nothing."""
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert compilations


# What is on the device


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("slots", ["staging only", "top_k", "uneven", "one pool"])
def test_there_are_never_more_experts_in_memory_than_places(model, slots, lookahead):
    link = CountingLink(model.device, model.layout.dtype)
    engine = model.engine(
        model.slots_of_every_kind()[slots], link=link, lookahead=lookahead, prefill_chunk=CHUNK
    )
    places = link.limit = engine.experts.cache.num_places
    for lengths in ((30,), (3, 30, 17)):
        prompts = prompts_of(model, *lengths)
        greedy(engine, prompts, NEW_TOKENS)
        engine.logits(prompts[0])
        engine.decode_logits(some_tokens(model, len(lengths), 8))
    assert 0 < link.peak <= places
    assert engine.experts.peak_places <= places
    engine.close()
    for _ in range(200):  # a copy may be under way on the thread
        if not link.num_alive:
            break
        time.sleep(0.05)
    assert link.num_alive == 0


def test_arrays_of_experts_are_those_of_the_cache(model, engine):
    """And none is held by a program's arguments, a finished run, or an error."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=())
    blob = model.layout.num_items, np.dtype(model.layout.dtype)
    gc.collect()
    before = count_arrays(*blob)
    for _ in engine.start(prompts_of(model, 3, 30, 17), options):
        alive = count_arrays(*blob) - before
        assert 0 < alive <= engine.experts.cache.num_places
    assert count_arrays(*blob) - before == len(engine.experts.cache)
    engine.close()
    assert count_arrays(*blob) == before


@pytest.mark.parametrize("policy", [{"misses": "split"}, {"engine": "auto"}, {"lookahead": 2}])
def test_nothing_keeps_an_engine_that_nobody_uses(model, policy):
    engine = model.engine((3,) * model.num_layers, prefill_chunk=CHUNK, **policy)
    _, run = greedy(engine, prompts_of(model, 5), NEW_TOKENS)
    watched = weakref.ref(engine)
    engine.close()
    del engine, run
    gc.collect()
    assert watched() is None


def count_arrays(num_items: int, dtype: np.dtype) -> int:
    return sum(array.shape == (num_items,) and array.dtype == dtype for array in jax.live_arrays())


def test_a_prompt_leaves_the_cache_warm(model):
    """With what its tokens used most, in each layer."""
    engine = model.engine((3,) * model.num_layers, prefill_chunk=32)
    _, trace = recorded(model, engine, prompts_of(model, 30), 1)
    for layer, counts_E in enumerate(trace.popularity(prompts=True)):
        kept = engine.experts.cache.resident(layer)
        assert len(kept) == 3
        left_out = np.delete(counts_E, kept)
        assert counts_E[list(kept)].min() >= left_out.max()
    engine.close()


# What is counted


class Recount:
    """Experts that an engine needed, by phase, and copies that its fetcher made or called off."""

    def __init__(self, engine: OffloadEngine, monkeypatch):
        experts, fetcher = engine.experts, engine.experts._fetcher
        self.needed, self.cancelled = 0, 0
        self.fetcher = fetcher
        need, stream, cancel = experts.need, experts.stream, fetcher.cancel

        def noting_need(layer, ids):
            self.needed += len(ids)
            need(layer, ids)

        def noting_stream(layer, ids, *rest):
            self.needed += len(ids)
            return stream(layer, ids, *rest)

        def noting_cancel(key: ExpertKey) -> bool:
            happened = cancel(key)
            self.cancelled += happened
            return happened

        monkeypatch.setattr(experts, "need", noting_need)
        monkeypatch.setattr(experts, "stream", noting_stream)
        monkeypatch.setattr(fetcher, "cancel", noting_cancel)
        fetcher.set_recording(True)


def add(a: Traffic, b: Traffic) -> dict[str, float]:
    """Of both phases."""
    b_json = b.to_json()
    return {name: value + b_json[name] for name, value in a.to_json().items()}


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
@pytest.mark.parametrize("slots", ["staging only", "top_k", "half", "all", "one pool"])
def test_statistics_add_up(model, slots, slow, monkeypatch):
    link = ThrottledLink(model.link(), 1e8, 2e-4) if slow else None
    sizes = model.slots_of_every_kind()[slots]
    engine = model.engine(sizes, link=link, num_staging=7, prefill_chunk=CHUNK)
    counted = Recount(engine, monkeypatch)
    _, run = greedy(engine, prompts_of(model, 3, 30, 17), NEW_TOKENS)
    residency = run.stats().residency
    assert residency is not None
    both = add(residency.prefill, residency.decode)
    assert both["hits"] + both["demand_loads"] == counted.needed
    assert both["copies"] == len(counted.fetcher.transfers)
    # Copies that the end of the run called off are no longer counted by anybody.
    assert both["copies"] <= both["demand_loads"] + both["prefetches"] - counted.cancelled
    if slots == "all":
        assert both["copies"] == both["demand_loads"] + both["prefetches"] - counted.cancelled
    assert both["copied_bytes"] == both["copies"] * residency.expert_bytes
    assert residency.expert_bytes == model.blob_bytes
    assert both["useful_prefetches"] + both["useless_prefetches"] <= both["prefetches"]
    assert residency.num_slots == (sizes if isinstance(sizes, int) else sum(sizes))
    assert residency.num_staging == 7
    assert 0 < residency.peak_places <= residency.num_slots + residency.num_staging
    assert both["link_busy_s"] > 0
    if slow:  # an experiment's link keeps its speed
        seconds = both["copies"] * 2e-4 + both["copied_bytes"] / 1e8
        assert both["link_busy_s"] == pytest.approx(seconds)
    engine.close()


def test_with_a_slot_for_every_expert_nothing_moves_while_decoding(model):
    engine = model.engine(prefill_chunk=CHUNK)
    prompts = prompts_of(model, 30, 17, 3)
    greedy(engine, prompts, 40)
    _, run = greedy(engine, prompts, 40)
    residency = run.stats().residency
    assert residency is not None
    for traffic in (residency.prefill, residency.decode):
        assert traffic.hits > 0 == traffic.demand_loads == traffic.copies == traffic.prefetches
        assert traffic.hit_rate == 1
        assert traffic.stalled_s is not None and traffic.stalled_s < 0.1
    engine.close()


def test_waiting_for_a_slow_link_is_reported(model):
    """All of the link's time is waited for when nothing is kept and nothing is predicted."""
    link = ThrottledLink(model.link(), 1e9, 5e-3)
    engine = model.engine((0,) * model.num_layers, link=link, lookahead=0, prefill_chunk=CHUNK)
    prompts = prompts_of(model, 5)
    greedy(engine, prompts, NEW_TOKENS)
    _, run = greedy(engine, prompts, NEW_TOKENS)
    stats = run.stats()
    assert stats.residency is not None
    decode, prefill = stats.residency.decode, stats.residency.prefill
    assert decode.link_busy_s and decode.stalled_s and prefill.stalled_s
    assert decode.hits == decode.prefetches == 0
    assert decode.copies == decode.demand_loads == 2 * model.num_layers * (NEW_TOKENS - 1)
    assert decode.link_busy_s <= decode.stalled_s * 1.001 <= stats.decode_s * 1.001
    engine.close()


def test_statistics_of_a_run_stay_when_others_follow(model, engine):
    prompts = prompts_of(model, 5, 12, 17)
    _, run = greedy(engine, prompts, NEW_TOKENS)
    before = run.stats().to_json()
    greedy(engine, prompts_of(model, 30), NEW_TOKENS)
    assert run.stats().to_json() == before


def test_recall_is_that_of_the_recorded_predictions(model):
    engine = model.engine((3,) * model.num_layers, lookahead=1, fetch=3, prefill_chunk=CHUNK)
    prompts = prompts_of(model, 3, 30, 17)
    engine.recorder = model.recorder()
    _, run = greedy(engine, prompts, NEW_TOKENS)
    trace = engine.recorder.trace()
    assert trace.predictions is not None and trace.num_tokens == 3 * (NEW_TOKENS - 1)
    found, chosen = np.zeros(3), 0
    for ids_LK, predicted_LNW in zip(trace.decode_expert_ids, trace.predictions, strict=True):
        for layer in range(1, model.num_layers):
            for expert in ids_LK[layer].tolist():
                chosen += 1
                for n in range(3):
                    found[n] += expert in predicted_LNW[layer, 0, : n + 1].tolist()
    residency = run.stats().residency
    assert residency is not None
    np.testing.assert_allclose(residency.recall, [found / chosen])
    assert 0 < residency.recall[0][0] < residency.recall[0][2] <= 1
    engine.close()


# What is recorded


def recorded(model: Model, engine: OffloadEngine, prompts: list[list[int]], num_tokens: int):
    """The texts, and the trace of making them."""
    engine.recorder = model.recorder()
    texts, _ = greedy(engine, prompts, num_tokens)
    return texts, engine.recorder.trace()


def test_what_is_recorded_is_what_the_resident_model_chooses(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    texts, trace = recorded(model, engine, prompts, NEW_TOKENS)
    assert trace.num_sequences == 3 and trace.num_experts == model.num_experts
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        of_prompt = trace.prompt_expert_ids[trace.prompt_offsets[i] : trace.prompt_offsets[i + 1]]
        of_text = trace.decode_expert_ids[trace.decode_offsets[i] : trace.decode_offsets[i + 1]]
        assert len(of_prompt) == len(prompt)
        # The last token was not computed any more.
        chosen_TLK = model.chosen_experts(prompt + text[:-1])
        np.testing.assert_array_equal(np.concatenate([of_prompt, of_text]), chosen_TLK)


def test_only_sequences_that_grow_are_recorded(model, engine):
    prompts = prompts_of(model, 3, 30, 17)
    engine.recorder = model.recorder()
    greedy(engine, prompts, (4, 10, 1))
    greedy(engine, prompts[:1], 6)
    trace = engine.recorder.trace()
    assert np.diff(trace.prompt_offsets).tolist() == [3, 30, 17, 3]
    assert np.diff(trace.decode_offsets).tolist() == [3, 9, 0, 5]
