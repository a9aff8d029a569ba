"""The host fails or stalls while it computes experts: a typed error, no wrong token, no hang."""

import threading

import pytest

from jmoe.errors import ComputeError
from jmoe.residency.host_experts import HostExperts
from tests.engines.offload_engines import Model, greedy, random_model, some_tokens

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture(scope="module")
def expected(model):
    engine = model.engine((1,) * model.num_layers, misses="host")
    texts, _ = greedy(engine, [prompt_of(model)], NUM_TOKENS)
    engine.close()
    return texts


def prompt_of(model: Model) -> list[int]:
    return some_tokens(model, 9).tolist()


def engine_with(model: Model, compute, **options):
    """An engine whose host computes in another way."""
    engine = model.engine((1,) * model.num_layers, misses="host")
    hybrid = engine.hybrid
    assert hybrid is not None
    hybrid.host.close()

    def wrapped(*arguments):
        return compute(hybrid.compute, *arguments)

    host = HostExperts(wrapped, model.blob_bytes, **options)
    engine.hybrid = hybrid._replace(host=host)
    return engine, host


@pytest.mark.parametrize("failing_job", [0, 2, 5, 9])  # of prompt, and of decode steps
def test_a_failure_is_an_error_and_the_next_generation_is_right(model, expected, failing_job):
    jobs = []

    def compute(inner, *arguments):
        jobs.append(arguments[0])
        if len(jobs) == failing_job + 1:
            raise MemoryError("the host is out of memory")
        return inner(*arguments)

    engine, _ = engine_with(model, compute)
    with pytest.raises(ComputeError, match=f"layer {failing_job % model.num_layers}, expert"):
        greedy(engine, [prompt_of(model)], NUM_TOKENS)
    got, _ = greedy(engine, [prompt_of(model)], NUM_TOKENS)
    assert got == expected
    engine.close()


def test_a_halt_is_an_error_and_the_next_generation_is_right_when_it_is_over(model, expected):
    halted, go_on = threading.Event(), threading.Event()

    def compute(inner, *arguments):
        if not halted.is_set():
            halted.set()
            go_on.wait()
        return inner(*arguments)

    engine, host = engine_with(model, compute, stall_s=0.05)
    for _ in range(2):
        with pytest.raises(ComputeError, match="come to a halt"):
            greedy(engine, [prompt_of(model)], NUM_TOKENS)
    host._stall_s = 60.0
    go_on.set()
    got, _ = greedy(engine, [prompt_of(model)], NUM_TOKENS)
    assert got == expected
    engine.close()
