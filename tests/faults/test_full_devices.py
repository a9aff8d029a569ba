"""A device that turns out to be full, in any phase: CapacityError, with the next smaller plan."""

import itertools
import re
from collections.abc import Iterator

import jax
import pytest

import jmoe
from jmoe.engines import device_model, expert_model
from jmoe.engines.decode_loop import DecodeLoop
from jmoe.engines.memory import smaller_plan
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.programs import ProgramCache
from jmoe.engines.prompt_stream import PromptStream
from jmoe.engines.resident_steps import ResidentSteps
from jmoe.errors import CapacityError, TransferError
from jmoe.loading import LoadOptions, find_model
from jmoe.planning.budget import smallest_gib
from jmoe.planning.plan import make_plan
from jmoe.planning.policy import Policy
from tests.engines.offload_engines import Model, greedy, random_model
from tests.residency.faulty_link import FaultyLink

NEW_TOKENS = 8
PROMPTS = [[5, 9, 2, 71, 40], list(range(1, 30))]
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nMore.")


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return greedy(model.resident, PROMPTS, NEW_TOKENS)[0]


@pytest.fixture
def engine(model) -> Iterator[OffloadEngine]:
    engine = model.engine((3,) * model.num_layers, prefill_chunk=16)
    yield engine
    engine.close()


def fail_after(monkeypatch, where: type, name: str, calls: int, error: Exception = FULL) -> None:
    """Lets a method raise once, at the call after so many."""
    method, left = getattr(where, name), [calls]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize(
    ("doing", "where", "name", "calls"),
    [
        ("making a KV cache and compiling", ProgramCache, "get", 2),
        ("prefilling", PromptStream, "run", 1),
        ("decoding", DecodeLoop, "run", 3),
    ],
)
def test_a_full_device_is_told_with_the_next_smaller_plan(
    model, engine, expected, monkeypatch, doing, where, name, calls
):
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected  # compiled and tried from here on
    fail_after(monkeypatch, where, name, calls)
    with pytest.raises(CapacityError, match=re.escape(f"while {doing} (2 x ")) as caught:
        greedy(engine, PROMPTS, NEW_TOKENS)
    assert caught.value.got == "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."
    assert caught.value.__cause__ is FULL
    assert_names_a_smaller_plan(model, engine, caught.value)
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected


def assert_names_a_smaller_plan(model: Model, engine: OffloadEngine, error: CapacityError) -> None:
    """One that works, with the slots that were named."""
    found = re.search(r"device_memory_gib=([\d.]+), which leaves slots for (\d+) of", str(error.do))
    assert found, error.do
    budget_bytes = int(float(found[1]) * 2**30)
    policy = engine.plan.policy
    plan = make_plan(
        model.config,
        model.dtype,
        model.quant,
        batch_size=2,
        num_positions=64,
        requested=Policy(mode="offload", eviction=policy.eviction, lookahead=policy.lookahead),
        budget_bytes=budget_bytes,
    )
    assert plan.policy.num_slots >= int(found[2])


@pytest.mark.parametrize("num_good", [0, 7, 40])
def test_an_expert_without_room_is_told_with_the_next_smaller_plan(model, expected, num_good):
    class FullOnce(FaultyLink):
        def start(self, blob):
            try:
                return super().start(blob)
            except TransferError:
                raise CapacityError("no memory for an expert", got="99 bytes free") from None

    link = FullOnce(model.link(), script=["ok"] * num_good + ["start"])
    engine = model.engine((1,) * model.num_layers, link=link, prefill_chunk=16)
    with pytest.raises(CapacityError, match="ran out of memory while") as caught:
        for _ in range(3):
            greedy(engine, PROMPTS, NEW_TOKENS)
    assert "no memory for an expert: 99 bytes free" in str(caught.value)
    assert_names_a_smaller_plan(model, engine, caught.value)
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    engine.close()


@pytest.mark.parametrize(
    ("doing", "where", "name", "calls"),
    [
        ("making a KV cache and compiling", ProgramCache, "get", 1),
        ("prefilling", ResidentSteps, "prefill", 0),
        ("decoding", ResidentSteps, "step", 2),
    ],
)
def test_a_full_device_is_told_by_the_resident_engine_too(
    model, expected, monkeypatch, doing, where, name, calls
):
    engine = model.resident
    greedy(engine, PROMPTS, NEW_TOKENS)
    fail_after(monkeypatch, where, name, calls)
    with pytest.raises(CapacityError, match=re.escape(f"while {doing} (2 x ")) as caught:
        greedy(engine, PROMPTS, NEW_TOKENS)
    assert "fewer prompts at once" in str(caught.value.do)  # on a CPU; there is nothing to offload
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected


def test_other_errors_of_the_backend_stay_what_they_are(model, engine, monkeypatch):
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    greedy(engine, PROMPTS, NEW_TOKENS)
    fail_after(monkeypatch, DecodeLoop, "run", 2, other)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        greedy(engine, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("policy", ["offload", "resident"])
def test_a_device_that_is_full_while_weights_are_loaded(policy, monkeypatch):
    def no_memory(*_):
        raise FULL

    monkeypatch.setattr(device_model, "adopt", no_memory)
    monkeypatch.setattr(expert_model, "adopt", no_memory)
    with pytest.raises(CapacityError, match="out of memory while loading the weights") as caught:
        jmoe.load(policy=policy)
    do = str(caught.value.do)
    found = re.search(r"device_memory_gib=([\d.]+), which leaves slots for (\d+)", do)
    if policy == "resident":
        assert "fewer bits" in do and not found
        return
    assert found
    options = LoadOptions(policy="offload", device_memory_gib=float(found[1]))
    plan = find_model(None, options, None).plan
    assert plan.policy.num_slots >= int(found[2])


def test_smaller_plans_end_at_the_smallest(model):
    used_bytes, sizes = 10**9, []
    while True:
        plan = smaller_plan(
            model.config,
            model.dtype,
            model.quant,
            batch_size=1,
            num_positions=64,
            used_bytes=used_bytes,
            policy=Policy(mode="offload", lookahead=0),
        )
        if plan is None:
            break
        used_bytes = plan.device_bytes
        sizes.append(used_bytes)
    assert len(sizes) > 3
    assert all(later < sooner for sooner, later in itertools.pairwise(sizes))
    with pytest.raises(CapacityError, match="not even") as caught:
        make_plan(
            model.config,
            model.dtype,
            model.quant,
            batch_size=1,
            num_positions=64,
            requested="offload",
            budget_bytes=1,
        )
    assert smallest_gib(used_bytes) in str(caught.value)
