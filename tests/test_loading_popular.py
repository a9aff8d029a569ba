"""Experts that recorded runs used most are on the device when a model has been loaded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.engines.offload import OffloadEngine
from jmoe.errors import CheckpointError, RequestError, TransferError
from jmoe.loading.popularity import hold_popular
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.traces import RoutingTrace
from jmoe.residency.entries import ExpertKey
from jmoe.residency.link import DeviceLink
from tests.engines.offload_engines import Model, greedy, random_model, some_tokens
from tests.planning.traces import random_trace
from tests.residency.faulty_link import FaultyLink

_PROMPT = "def read(path):"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded model's shape."""
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    random_trace(60, 12, 8).save(path)
    return path


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


def most_popular(trace: RoutingTrace, layer: int, number: int) -> list[int]:
    counts_E = (trace.popularity() + trace.popularity(prompts=True))[layer]
    return np.argsort(-counts_E, kind="stable")[:number].tolist()


def held(engine: OffloadEngine) -> list[set[int]]:
    return [set(experts) for experts in engine.places.held().values()]


def on_device(engine: OffloadEngine) -> list[set[int]]:
    """Those that would not have to be waited for."""
    if engine.slots is not None:
        return [set(engine.slots.layer(i)) for i in range(engine.num_layers)]
    everything = range(engine.config.router.num_experts)
    outlooks = [engine.experts.outlook(i, everything, 1.0) for i in range(engine.num_layers)]
    return [set(outlook.here) for outlook in outlooks]


@pytest.mark.parametrize("kind", ["thread", "compiled"])
def test_slots_hold_the_most_popular_experts_after_loading(kind: str, trace: Path):
    recorded = RoutingTrace.load(trace)
    arguments = {"policy": "offload", "engine": kind, "device_memory_gib": 0.04}
    with jmoe.load(**arguments) as llm:
        expected = llm.generate(_PROMPT, max_new_tokens=12).token_ids
    with jmoe.load(**arguments, popularity=trace) as llm:
        engine = llm.engine
        assert isinstance(engine, OffloadEngine)
        slots = engine.plan.policy.slots
        assert isinstance(slots, tuple) and 0 < min(slots) < 8
        if kind == "compiled":
            assert engine.slots is not None
            slots = engine.slots.static.slots
        expected_held = [set(most_popular(recorded, i, size)) for i, size in enumerate(slots)]
        assert held(engine) == on_device(engine) == expected_held
        (note,) = (note for note in llm.notes if note.startswith("popularity"))
        assert f"{sum(slots)} of 96 experts are on the device to begin with" in note
        assert llm.generate(_PROMPT, max_new_tokens=12).token_ids == expected


def popular_first(ranked: Sequence[int], num_layers: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in ranked for layer in range(num_layers)]


@pytest.mark.parametrize("kind", ["thread", "compiled"])
def test_what_is_used_comes_before_what_is_popular(kind: str, model: Model):
    engine = model.engine((4,) * model.num_layers, engine=kind, num_staging=6)
    assert engine.places.favour(popular_first([6, 3, 1, 7, 0], model.num_layers)) == 12
    assert held(engine) == on_device(engine) == [{6, 3, 1, 7}] * model.num_layers
    before = engine.places.counts()
    texts, run = greedy(engine, [some_tokens(model, 5).tolist()], 6)
    traffic = run.stats().residency
    assert traffic is not None and traffic.prefill.hits > 0
    assert (engine.places.counts() - before).copies == (
        traffic.prefill.copies + traffic.decode.copies
    )  # those of the start are no generation's
    assert texts == greedy(model.resident, [some_tokens(model, 5).tolist()], 6)[0]
    engine.close()


@pytest.mark.parametrize("kind", ["thread", "compiled"])
def test_slots_that_are_added_get_popular_experts_and_those_that_go_had_the_least(
    kind: str, model: Model
):
    engine = model.engine((4,) * model.num_layers, engine=kind, num_staging=6)
    engine.places.favour(popular_first([6, 3, 1, 7, 0], model.num_layers))
    engine.places.resize((2,) * model.num_layers, 6)
    assert held(engine) == on_device(engine) == [{6, 3}] * model.num_layers
    engine.places.resize((5,) * model.num_layers, 6)
    assert held(engine) == on_device(engine) == [{6, 3, 1, 7, 0}] * model.num_layers
    engine.close()


def test_one_pool_gets_the_most_popular_experts_of_all_layers(model: Model):
    engine = model.engine(4, num_staging=6)
    keys = [ExpertKey(2, 5), ExpertKey(2, 1), ExpertKey(0, 3), ExpertKey(2, 7), ExpertKey(1, 0)]
    assert engine.places.favour(keys) == 4
    assert held(engine) == on_device(engine) == [{3}, set(), {1, 5, 7}]
    engine.close()


def test_after_a_copy_that_failed_the_next_change_of_slots_tries_again(model: Model):
    link = FaultyLink(DeviceLink(model.device, model.layout.dtype), script=["ok", "start"])
    engine = model.engine((2,) * model.num_layers, link=link)
    with pytest.raises(TransferError):
        engine.places.favour(popular_first([6, 3], model.num_layers))
    engine.places.settle()
    assert held(engine) == on_device(engine)
    engine.places.resize((2,) * model.num_layers, 6)
    assert held(engine) == on_device(engine) == [{6, 3}] * model.num_layers
    engine.close()


@pytest.mark.parametrize("model_name", [None, "mixtral-8x7b"])
def test_records_of_other_models_are_refused_before_anything_is_loaded(
    model_name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def build(*arguments: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("jmoe.loading.building.Setup.build", build)
    path = tmp_path / "trace.npz"
    shape = {"random_weights": True, "num_layers": 1} if model_name else {}
    with pytest.raises(CheckpointError):
        jmoe.load(model_name, **shape, policy="offload", popularity=path)
    random_trace(20, 11, 8).save(path)
    with pytest.raises(RequestError, match="of another model"):
        jmoe.load(model_name, **shape, policy="offload", popularity=path)


def test_where_no_expert_is_offloaded_it_has_no_effect(trace: Path):
    with jmoe.load(policy="resident", popularity=trace) as llm:
        assert "popularity has no effect: no expert is offloaded or mapped" in llm.notes


@pytest.mark.parametrize(("misses", "num_held"), [("host", 0), ("split", 0), ("auto", 6)])
def test_a_host_that_is_as_fast_as_the_device_keeps_its_experts(
    misses: str, num_held: int, model: Model
):
    costs = ExpertCosts(copy_s=1e-3, host=lambda tokens: 1e-4, device=lambda tokens: 1e-4)
    engine = model.engine((2,) * model.num_layers, misses=misses, costs=costs)
    shares = {(layer, 4): 0.5 for layer in range(model.num_layers)}
    shares |= {(layer, 5): 0.25 for layer in range(model.num_layers)}
    (note,) = hold_popular(engine, shares)
    assert sum(map(len, held(engine))) == num_held
    assert ("since the host computes as fast" in note) == (num_held == 0)
    engine.close()
