"""Decode steps that are one program: batches, endings, what is counted, and what goes wrong."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jmoe.engines import offload
from jmoe.engines.batch import BatchRun
from jmoe.engines.contest import Contest
from jmoe.engines.offload import OffloadEngine
from jmoe.errors import CapacityError, TransferError
from jmoe.generation.options import GenerationOptions
from jmoe.metrics import ResidencyStats
from jmoe.planning.plan import make_plan
from jmoe.planning.policy import Policy
from jmoe.residency.array_cache import CacheStatic
from jmoe.residency.cache import SlotCache
from jmoe.residency.eviction import LRU
from jmoe.residency.slot_array import SlotArray
from jmoe.store.expert_store import ExpertStore
from tests.engines.offload_engines import Model, greedy, random_model, some_tokens

CHUNK = 16
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture
def engine(model) -> Iterator[OffloadEngine]:
    """With slots for three of eight experts in each layer."""
    engine = make_engine(model)
    yield engine
    engine.close()


def make_engine(model: Model, slots: int = 3, **policy) -> OffloadEngine:
    policy = {"engine": "compiled", "prefill_chunk": CHUNK} | policy
    return model.engine((slots,) * model.num_layers, **policy)


def slots_of(engine: OffloadEngine) -> SlotArray:
    assert engine.slots is not None
    return engine.slots


def pools_of(engine: OffloadEngine) -> CacheStatic:
    assert engine.places.static is not None
    return engine.places.static


def residency_of(run: BatchRun) -> ResidencyStats:
    residency = run.stats().residency
    assert residency is not None
    return residency


def prompts_of(model: Model, *lengths: int) -> list[list[int]]:
    return [some_tokens(model, length, seed=length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """What the thread engine makes of three prompts."""
    engine = model.engine(prefill_chunk=CHUNK)
    texts, _ = greedy(engine, prompts_of(model, 5, 21, 1), [NEW_TOKENS, 3, 6])
    engine.close()
    return texts


@pytest.mark.parametrize("tokens_per_call", [1, 4])
def test_prompts_of_unequal_lengths_give_what_the_thread_engine_gives(
    model, expected, tokens_per_call
):
    """Three tokens may need more experts than there are slots: those go in rounds."""
    engine = make_engine(model, tokens_per_call=tokens_per_call)
    texts, _ = greedy(engine, prompts_of(model, 5, 21, 1), [NEW_TOKENS, 3, 6])
    assert texts == expected
    engine.close()


@pytest.mark.parametrize("tokens_per_call", [1, 4])
def test_a_stop_token_ends_its_sequence_within_a_call(model, expected, tokens_per_call):
    stop = expected[0][4]
    assert stop not in expected[0][:4]
    engine = make_engine(model, tokens_per_call=tokens_per_call)
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=(stop,))
    run = engine.start(prompts_of(model, 5), options)
    text = []
    for (token_id,) in run:
        text.append(token_id)
        if token_id == stop:
            run.finish(0)
    assert text == expected[0][:5]
    residency = residency_of(run)
    if tokens_per_call > 1:  # else one more may be under way by then
        needed = residency.decode.hits + residency.decode.demand_loads
        assert needed == 4 * model.num_layers * model.top_k
    engine.close()


def test_nothing_is_compiled_for_a_second_batch(model, engine):
    events: list[str] = []

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            events.append(event)

    prompts = prompts_of(model, 5)
    first, _ = greedy(engine, prompts, NEW_TOKENS)
    jax.monitoring.register_event_duration_secs_listener(on_event)
    again, run = greedy(engine, prompts, NEW_TOKENS)
    jax.monitoring.unregister_event_duration_listener(on_event)
    assert again == first and run.stats().compiled_programs == 0 and not events


@pytest.mark.parametrize("tokens_per_call", [1, 4])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_no_program_copies_the_slots(model, num_sequences, tokens_per_call):
    """Nor with several tokens, whose experts go in rounds."""
    engine = make_engine(model, tokens_per_call=tokens_per_call)
    greedy(engine, prompts_of(model, 5, 6, 7)[:num_sequences], 2)
    slots = slots_of(engine).state.slots_SI
    shape = f"u8[{','.join(map(str, slots.shape))}]"
    text = engine.last_programs[-1].as_text() or ""
    assert f"{shape}" in text and "while" in text
    assert not [line for line in text.splitlines() if shape in line and " copy" in line]
    engine.close()


def test_slots_are_updated_in_place(model, engine):
    greedy(engine, prompts_of(model, 5), 3)
    address = slots_of(engine).state.slots_SI.unsafe_buffer_pointer()
    greedy(engine, prompts_of(model, 5), NEW_TOKENS)
    assert slots_of(engine).state.slots_SI.unsafe_buffer_pointer() == address


def test_hits_and_bytes_are_those_of_the_experts_that_were_chosen(model):
    """Layer by layer as SlotCache counts them, from what the prompt has left on."""
    engine = make_engine(model, tokens_per_call=4)
    recorder = engine.recorder = model.recorder()
    prompt = prompts_of(model, 9)
    run = engine.start(prompt, GenerationOptions(max_new_tokens=NEW_TOKENS))
    cache = SlotCache(
        pools_of(engine).slots,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        num_staging=0,
        eviction=LRU(),
    )
    for layer in range(model.num_layers):
        cache.use(layer, slots_of(engine).by_value(layer))
        cache.unpin()
    before = cache.counters.snapshot()
    for _ in run:
        pass
    trace = recorder.trace()
    assert trace.num_tokens == NEW_TOKENS - 1
    for ids_LK in trace.decode_expert_ids.tolist():
        for layer, experts in enumerate(ids_LK):
            cache.use(layer, experts)
            cache.unpin()
    residency = residency_of(run)
    decode = residency.decode
    assert decode.hits == cache.counters.hits - before.hits
    assert decode.demand_loads == cache.counters.misses - before.misses > 0
    assert decode.copied_bytes == decode.demand_loads * model.blob_bytes
    by_layer = residency.decode_by_layer
    assert len(by_layer) == model.num_layers
    assert sum(layer.hits for layer in by_layer) == decode.hits
    assert sum(layer.copied_bytes for layer in by_layer) == decode.copied_bytes
    assert residency.engine == "compiled"
    engine.close()


def test_the_record_is_that_of_the_thread_engine(model):
    traces = []
    for kind in ("thread", "compiled"):
        engine = make_engine(model, engine=kind)
        recorder = engine.recorder = model.recorder()
        greedy(engine, prompts_of(model, 20, 3), NEW_TOKENS)
        traces.append(recorder.trace())
        engine.close()
    thread, compiled = traces
    assert np.array_equal(thread.prompt_expert_ids, compiled.prompt_expert_ids)
    assert np.array_equal(thread.decode_expert_ids, compiled.decode_expert_ids)


def test_a_prompt_leaves_its_experts_in_the_slots(model, engine):
    prompt = prompts_of(model, 30)
    run = engine.start(prompt, GenerationOptions(max_new_tokens=2))
    first = residency_of(run).prefill
    counts = np.zeros((model.num_layers, model.num_experts))
    for ids_LK in model.chosen_experts(prompt[0]):
        for layer, experts in enumerate(ids_LK.tolist()):
            counts[layer, experts] += 1
    for layer in range(model.num_layers):
        held = list(slots_of(engine).layer(layer))
        assert len(held) == 3
        least = min(counts[layer, expert] for expert in held)
        others = [counts[layer, e] for e in range(model.num_experts) if e not in held]
        # An earlier piece of the prompt counts half.
        assert least * 2 >= max(others)
    run.close()
    again = residency_of(engine.start(prompt, GenerationOptions(max_new_tokens=2))).prefill
    assert again.hits > first.hits and again.copied_bytes < first.copied_bytes


def test_the_cache_is_saved_and_restored_as_any_tree_of_arrays(model, engine):
    some, others = some_tokens(model, 1, 8), some_tokens(model, 1, 8, seed=3)
    engine.decode_logits(some)
    saved = jax.device_get(slots_of(engine).state)
    logits, counts = engine.decode_logits(others), slots_of(engine).counts()
    slots_of(engine).state = jax.device_put(saved)
    assert np.array_equal(engine.decode_logits(others), logits)
    assert np.array_equal(slots_of(engine).counts(), counts)


def test_a_state_that_ctrl_c_lost_is_made_anew(model, engine, expected):
    prompts = prompts_of(model, 5)
    greedy(engine, prompts, NEW_TOKENS)
    slots_of(engine).delete()
    assert greedy(engine, prompts, NEW_TOKENS)[0] == [expected[0]]


def test_experts_in_page_locked_memory_give_the_same(model, engine):
    """As on an accelerator: the CPU backend has such memory, too."""
    tokens = some_tokens(model, 1, 8)
    expected = engine.decode_logits(tokens)
    pinned = jax.sharding.SingleDeviceSharding(model.device, memory_kind="pinned_host")
    engine.host_blobs = tuple(jax.device_put(blobs, pinned) for blobs in engine.host_blobs)
    before = engine.programs.num_compiled
    assert np.array_equal(engine.decode_logits(tokens), expected)
    assert engine.programs.num_compiled == before + 1


def test_on_the_cpu_programs_read_the_store_itself(engine):
    for layer, blobs in enumerate(engine.host_blobs):
        assert blobs.unsafe_buffer_pointer() == engine.store.layer(layer).ctypes.data


@pytest.mark.parametrize("kind", ["compiled", "auto"])
def test_where_memory_cannot_be_locked_the_thread_engine_takes_over(
    model, expected, kind, monkeypatch
):
    def refuse(store: ExpertStore, device: jax.Device) -> tuple[jax.Array, ...]:
        raise TransferError("programs cannot read experts in host memory", got="no pinned_host")

    monkeypatch.setattr(offload, "host_arrays", refuse)
    engine = make_engine(model, engine=kind)
    assert engine.notes == [
        "engine thread, not compiled: programs cannot read experts in host memory (no pinned_host)"
    ]
    texts, run = greedy(engine, prompts_of(model, 5), NEW_TOKENS)
    assert texts == [expected[0]]
    assert residency_of(run).engine == "thread"
    engine.close()
    # With as many places as a program needs at least; one layer's would not be enough.
    few = make_engine(model, slots=0, num_staging=model.top_k + 3, engine=kind)
    assert greedy(few, prompts_of(model, 5), NEW_TOKENS)[0] == [expected[0]]
    few.close()
    if kind == "compiled":
        fewest = model.engine((1, 1, 0), engine=kind, num_staging=3, prefill_chunk=CHUNK)
        policy = fewest.plan.policy
        assert (policy.slots, policy.num_staging) == ((0, 1, 0), model.top_k + 2)
        assert greedy(fewest, prompts_of(model, 5), NEW_TOKENS)[0] == [expected[0]]
        fewest.close()


@pytest.mark.parametrize("winner", ["thread", "compiled"])
def test_the_faster_engine_goes_on(model, winner, monkeypatch):
    """The contest runs over batches, and changes no token."""
    seconds = {"thread": 1.0, "compiled": 2.0}
    if winner == "compiled":
        seconds["compiled"] = 0.5
    note = Contest.note
    monkeypatch.setattr(Contest, "note", lambda self, s: note(self, seconds[self.running]))
    monkeypatch.setattr(Contest, "predict", lambda self, token_s: None)  # the thread begins
    prompts, num_tokens = prompts_of(model, 5), 26
    reference = model.engine(prefill_chunk=CHUNK)
    expected, _ = greedy(reference, prompts, num_tokens)
    reference.close()

    engine = make_engine(model, engine="auto")
    texts, run = greedy(engine, prompts, num_tokens)
    first = residency_of(run)
    assert texts == expected
    assert (first.engine, first.engine_reason) == ("compiled", None)  # its turn
    held = [len(slots_of(engine).layer(layer)) for layer in range(model.num_layers)]
    assert held == [3] * model.num_layers
    texts, run = greedy(engine, prompts, num_tokens)
    second = residency_of(run)
    assert texts == expected
    assert second.engine == engine.decodes_by == winner
    assert str(second.engine_reason).startswith(f"engine {winner}: {1000 * seconds[winner]:.2f} ms")
    # Slots and staging, and never both forms at once.
    assert max(first.peak_places, second.peak_places) <= 3 * model.num_layers + 5
    texts, run = greedy(engine, prompts, 5)
    assert texts == [expected[0][:5]] and residency_of(run).engine == winner
    engine.close()


def test_an_engine_hands_out_what_it_has_made_before_the_other_goes_on(model, monkeypatch):
    """A call that a caller left in the middle must not move the end of the contest into one."""
    seconds = {"thread": 1.0, "compiled": 2.0}
    note = Contest.note
    monkeypatch.setattr(Contest, "note", lambda self, s: note(self, seconds[self.running]))
    monkeypatch.setattr(Contest, "predict", lambda self, token_s: None)  # the thread begins
    prompts, num_tokens = prompts_of(model, 5), 30
    reference = model.engine(prefill_chunk=CHUNK)
    expected, _ = greedy(reference, prompts, num_tokens)
    reference.close()
    engine = make_engine(model, engine="auto", tokens_per_call=3)
    run = engine.start(prompts, GenerationOptions(max_new_tokens=num_tokens))
    for _, _ in zip(range(1 + 16 + 2), run, strict=False):
        pass
    assert engine.decodes_by == "compiled"
    texts, run = greedy(engine, prompts, num_tokens)
    assert texts == expected and residency_of(run).engine == "thread"
    engine.close()


def test_the_smallest_budget_has_slots_for_one_token(model):
    kwargs = {"batch_size": 1, "num_positions": 32}
    smallest = {
        kind: model.smallest_budget(**kwargs, engine=kind) for kind in ("thread", "compiled")
    }
    # Staging for a token's experts and two copies; or slots for these, and three for prompts.
    assert smallest["compiled"] - smallest["thread"] == model.blob_bytes
    with pytest.raises(CapacityError, match="staging"):
        make_plan(
            model.config,
            model.dtype,
            model.quant,
            batch_size=1,
            num_positions=32,
            requested=Policy(mode="offload", engine="compiled"),
            budget_bytes=smallest["compiled"] - 1,
        )


def test_layers_share_slots_if_there_are_few(model, expected):
    engine = make_engine(model, slots=0, num_staging=model.top_k + 3)
    assert pools_of(engine).slots == (0,) * model.num_layers
    assert pools_of(engine).num_shared == model.top_k
    texts, run = greedy(engine, prompts_of(model, 5), NEW_TOKENS)
    assert texts == [expected[0]]
    assert residency_of(run).peak_places == model.top_k + 3
    engine.close()


def test_with_too_few_places_auto_is_the_thread_engine(model, expected):
    engine = make_engine(model, slots=0, num_staging=model.top_k + 2, engine="auto")
    texts, run = greedy(engine, prompts_of(model, 5), NEW_TOKENS)
    assert texts == [expected[0]] and residency_of(run).engine == "thread"
    engine.close()


def test_budgets_in_which_one_program_has_no_room_go_by_the_thread_engine(model, expected):
    """Known only once programs are compiled, and say what they take themselves."""
    prompts, engines = prompts_of(model, 5), []
    smallest = model.smallest_budget(1, 16, "auto")
    for places in range(0, 48, 4):
        engine = model.engine_within(smallest + places * model.blob_bytes // 2, "auto")
        with contextlib.suppress(CapacityError):
            texts, run = greedy(engine, prompts, NEW_TOKENS)
            assert texts == [expected[0]]
            residency = residency_of(run)
            assert residency.peak_device_bytes <= (engine.plan.budget_bytes or 0)
            engines.append(engine.places.static is not None)
        engine.close()
    assert engines == sorted(engines)
    assert not engines[0] and engines[-1]


def test_predicted_memory_is_what_is_used(model):
    engine = model.engine_within(model.smallest_budget(1, 32) + 20 * model.blob_bytes, "compiled")
    _, run = greedy(engine, prompts_of(model, 20), NEW_TOKENS)
    residency = residency_of(run)
    assert residency.peak_device_bytes <= engine.plan.budget_bytes
    assert residency.peak_device_bytes == pytest.approx(engine.plan.device_bytes, rel=0.05)
    engine.close()
