"""Predicted speeds of plans: from a machine's numbers and nothing else."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jmoe.errors import ConfigError, RequestError
from jmoe.planning.decode_speed import MAX_TOKENS, DecodeSpeed, predict_speed, uniform_trace
from jmoe.planning.hardware import HardwareSpec
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import MISSES, Misses, Policy
from jmoe.planning.simulate import simulate
from jmoe.planning.sizes import Component
from jmoe.planning.traces import RoutingTrace, read_trace_of
from jmoe.quant.spec import PRESETS
from tests.models.configs import small_config
from tests.planning.hardware import small_experts, small_spec
from tests.planning.traces import random_trace

# Of the experts that the machine has times of.
CONFIG = small_config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_local_experts=8, vocab_size=96
)
QUANT = PRESETS["int4"]
TRACE = random_trace(200, 3, 8)


def predict(
    trace: RoutingTrace | None = TRACE, machine: HardwareSpec | None = None, **policy
) -> DecodeSpeed:
    plans: dict[Misses, Plan] = {
        way: make_plan(
            CONFIG,
            "float32",
            QUANT,
            requested=Policy(mode="offload", slots=(3, 3, 3), misses=way, **policy),
            batch_size=1,
            num_positions=64,
        )
        for way in MISSES
    }
    need = MemoryNeed.of(CONFIG, "float32", QUANT, batch_size=1, num_positions=64)
    return predict_speed(CONFIG, "float32", QUANT, plans, need, machine or small_spec(), trace)


def test_a_prediction_is_a_simulation_with_the_machines_costs():
    spec = small_spec(fetch_s=0.0)
    speed = predict(machine=spec, num_staging=7, eviction="lru")
    need = MemoryNeed.of(CONFIG, "float32", QUANT, batch_size=1, num_positions=64)
    shared: tuple[Component, ...] = ("attention", "head", "routers", "norms")
    read_s = sum(need.weights[name].num_bytes for name in shared) / 3 / spec.device_bytes_per_s
    assert speed.layer_s == pytest.approx(read_s + 2 * 1e-4 + 3e-5 + 1e-5)
    loaded = simulate(
        TRACE,
        slots=[3, 3, 3],
        num_staging=7,
        blob_bytes=need.blob_bytes,
        bytes_per_s=need.blob_bytes / spec.to_device(need.blob_bytes),
        layer_s=speed.layer_s,
    )
    assert speed.results["load"].tokens_per_s == pytest.approx(loaded.tokens_per_s)
    host = speed.results["host"]
    steps_with_host_s = host.host_s - host.host_experts * 1e-3  # what was handed over
    assert steps_with_host_s == pytest.approx(1e-4 * (200 * 3 - host.full_hits))
    assert host.copies == 0 and speed.results["load"].host_experts == 0


def test_what_copies_take_of_the_loops_time_counts():
    plain, charged = (predict(machine=small_spec(fetch_s=s)).results["load"] for s in (0.0, 1e-3))
    assert charged.seconds > plain.seconds + 0.5e-3 * charged.copies


def test_shares_say_what_each_resource_does_of_the_time():
    speed = predict()
    for way, result in speed.results.items():
        shares = speed.shares(way)
        assert max(shares.values()) == pytest.approx(result.bound_share)
        assert all(0 <= share <= 1 for share in shares.values())
    assert speed.shares("load")["host"] == speed.shares("host")["link"] == 0
    assert speed.to_json()["ways"]["host"]["busy_shares"] == speed.shares("host")


def test_routing_is_what_was_recorded_or_said_to_be_random():
    assert predict().routing.startswith("recorded routing, 200 tokens")
    speed = predict(None)
    assert speed.routing.startswith(f"uniformly random routing, {MAX_TOKENS} tokens")
    assert speed.results["load"].hit_rate == pytest.approx(3 / 8, abs=0.03)
    counts_LE = uniform_trace(CONFIG).popularity()
    assert counts_LE.mean() == 250 and np.abs(counts_LE - 250).max() < 60


def test_recorded_predictions_are_used_as_far_as_they_go():
    predictions = np.full((200, 3, 1, 2), -1, np.int16)
    predictions[:, 1:, 0] = TRACE.decode_expert_ids[:, 1:]
    speed = predict(dataclasses.replace(TRACE, predictions=predictions))
    assert speed.routing.endswith("by: the routers' predictions")
    assert speed.results["load"].useful > 0
    assert predict().results["load"].speculated == 0


def test_nothing_is_guessed_for_experts_that_were_not_measured():
    machine = small_spec(experts=(small_experts(hidden_size=128),))
    with pytest.raises(ConfigError, match="no times of these experts") as caught:
        predict(machine=machine)
    assert caught.value.got == "64 x 128 in 4g64, activations in float32"
    assert caught.value.expected == "128 x 128 in 4g64, activations in float32"
    with pytest.raises(ConfigError, match="times of some experts"):
        predict(machine=small_spec(experts=()))


def test_traces_have_to_be_of_the_model(tmp_path: Path):
    path = tmp_path / "trace.npz"
    TRACE.save(path)
    assert read_trace_of(path, CONFIG).num_tokens == 200
    random_trace(20, 4, 8).save(path)
    with pytest.raises(RequestError, match="of another model"):
        read_trace_of(path, CONFIG)
    with pytest.raises(RequestError, match="no decode tokens"):
        predict(random_trace(0, 3, 8))
