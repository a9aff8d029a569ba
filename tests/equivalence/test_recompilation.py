"""After warm-up nothing is compiled, a step is one executable, and the cache stays in place."""

import collections
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.engines.batch import BatchRun
from jmoe.engines.resident_steps import ResidentSteps
from jmoe.generation.options import GenerationOptions
from tests.equivalence.measures import GREEDY, SAMPLED

# What the runtime calls one execution of a compiled program in its traces.
EXECUTION = "CommonPjRtLoadedExecutable::ExecuteHelperOnSingleDevice"
NUM_STEPS = 12


@pytest.fixture
def compilations():
    """Names of the compilations since the test cleared it; eager operations compile too."""
    events: list[str] = []

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    yield events
    jax.monitoring.unregister_event_duration_listener(on_event)


def test_the_listener_notices_compilations(compilations):
    """Otherwise the other tests would pass for nothing."""
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert compilations


def test_another_generation_of_the_same_shapes_compiles_nothing(llm, compilations):
    first, second = "import os", "def test_of_something_else(self, parameter):"
    for options in (GREEDY, SAMPLED):
        llm.generate(first, **options)
        llm.generate([first, second], **options)

    compilations.clear()
    other = {"temperature": 1.3, "top_p": 0.5, "top_k": 40, "min_p": 0.01, "seed": 2**40}
    for options in (GREEDY | {"max_new_tokens": 31}, SAMPLED | other):
        single = llm.generate(second, **options)
        batch = llm.generate([second, first], **options)
        assert single.stats.compiled_programs == batch[0].stats.compiled_programs == 0
    assert compilations == []


def test_scoring_another_text_of_the_same_bucket_compiles_nothing(llm, compilations):
    llm.engine.logits(list(range(130, 260)))
    compilations.clear()
    llm.engine.logits(list(range(300, 520)))
    assert compilations == []


def start(llm, num_steps: int) -> BatchRun:
    """A warm run of two prompts: its first tokens are there, the steps are still to be made."""
    options = GenerationOptions(max_new_tokens=num_steps + 1, stop_token_ids=())
    prompts = [[1, 100, 200], [1, 300]]
    list(llm.engine.start(prompts, options))
    return llm.engine.start(prompts, options)


def test_a_decode_step_is_one_executable(llm, tmp_path):
    run = start(llm, NUM_STEPS)
    with jax.profiler.trace(tmp_path):
        tokens = list(run)
    assert len(tokens) == NUM_STEPS + 1  # the first is the prefill's
    counts = trace_events(tmp_path)
    calls = {name: count for name, count in counts.items() if name.startswith("PjitFunction")}
    assert counts[EXECUTION] == NUM_STEPS, calls


def test_the_trace_counts_eager_operations_too(llm, tmp_path):
    x = llm.engine.put(np.ones(3))
    with jax.profiler.trace(tmp_path):
        jnp.negative(x).block_until_ready()
    assert trace_events(tmp_path)[EXECUTION] == 1


def trace_events(directory: Path) -> collections.Counter[str]:
    """How often each event occurs in the trace of a profiler."""
    (file,) = directory.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    return collections.Counter(
        event.name for plane in profile.planes for line in plane.lines for event in line.events
    )


def test_the_cache_is_updated_in_place_by_prefill_and_decode(llm):
    run = start(llm, NUM_STEPS)
    before = buffers(run)
    assert len(before) == 2 * llm.config.num_hidden_layers
    list(run)
    assert buffers(run) == before


def buffers(run: BatchRun) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(run._state.cache)]


def test_the_step_aliases_the_cache_and_copies_none_of_it(llm):
    run = start(llm, NUM_STEPS)
    leaves = jax.tree.leaves(run._state.cache)
    cache_bytes = sum(leaf.nbytes for leaf in leaves)
    shape = ",".join(map(str, leaves[0].shape))
    steps = run._steps
    assert isinstance(steps, ResidentSteps)
    programs = [steps._decode_step, *steps._prefill_chunk.values()]
    for program in programs:
        analysis = program.memory_analysis()
        assert analysis is not None
        assert analysis.alias_size_in_bytes >= cache_bytes
        hlo = program.as_text()
        assert hlo is not None and "input_output_alias" in hlo
        copies = [line for line in hlo.splitlines() if f"f32[{shape}]" in line and " copy(" in line]
        assert copies == []


def test_a_donated_state_cannot_be_used_again(llm):
    run = start(llm, NUM_STEPS)
    state = run._state
    list(run)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.cache.layers[0].k)
