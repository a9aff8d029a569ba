"""How fast a plan would decode on a machine, for each way of serving missing experts: predicted.

One sequence, routing that was recorded or is made up, and the costs of a hardware file: replayed
by ``simulate``. Left out: attention over the positions before, and prompts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jmoe.config import ModelConfig
from jmoe.errors import ConfigError, RequestError
from jmoe.native.choice import DEFAULT_ACTIVATION_BITS
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.hardware import HardwareSpec, formats_text
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan
from jmoe.planning.policy import Misses
from jmoe.planning.simulate import SimulationResult, simulate
from jmoe.planning.traces import RoutingTrace
from jmoe.quant.formats import DenseFormat
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import PRESETS, QuantSpec

# Of a trace, the first ones; and as many of routing that is made up.
MAX_TOKENS = 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpeed:
    """What is predicted.

    Attributes:
      hardware: the machine's name.
      routing: what was replayed, for people.
      layer_s: of a layer whose experts are all on the device.
      results: by way of serving missing experts.
    """

    hardware: str
    routing: str
    layer_s: float
    results: Mapping[Misses, SimulationResult]

    def shares(self, way: Misses) -> dict[str, float]:
        """Of the time of decoding, how much each resource works."""
        result = self.results[way]
        busy_s = {"link": result.link_s, "host": result.host_s, "device": result.compute_s}
        return {name: seconds / result.seconds for name, seconds in busy_s.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "hardware": self.hardware,
            "routing": self.routing,
            "layer_s": self.layer_s,
            "ways": {
                way: result.to_json() | {"busy_shares": self.shares(way)}
                for way, result in self.results.items()
            },
        }


def predict_speed(
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    plans: Mapping[Misses, Plan],
    need: MemoryNeed,
    hardware: HardwareSpec,
    trace: RoutingTrace | None = None,
) -> DecodeSpeed:
    """Replays decoding of one sequence.

    Args:
      config: the model.
      dtype: of activations.
      quant: formats; None is all weights in dtype.
      plans: of the mode offload, by way of serving missing experts.
      need: of the model.
      hardware: the machine.
      trace: of this model; None makes up routing in which all experts are equally likely.

    Raises:
      ConfigError: the hardware has no times of these experts.
      RequestError: the trace has no decode tokens.
    """
    costs = costs_of(config, dtype, quant, hardware)
    shared_bytes = sum(
        size.num_bytes
        for name, size in need.weights.items()
        if name not in ("experts", "embeddings")
    )
    if not need.weights["head"].num_bytes:  # which reads the embeddings then
        shared_bytes += need.weights["embeddings"].num_bytes
    top_k = config.router.top_k
    layer_s = (
        shared_bytes / config.num_hidden_layers / hardware.device_bytes_per_s
        + top_k * costs.device(1)
        + hardware.round_trip_s
        + hardware.dispatch_s
    )
    routing = "uniformly random routing"
    if trace is None:
        trace = uniform_trace(config)
    else:
        if not trace.num_tokens:
            raise RequestError("the trace has no decode tokens", do="record a longer generation")
        trace = _first_tokens(trace)
        routing = "recorded routing"
    results = {}
    for way, plan in plans.items():
        policy = plan.policy
        recorded = 0 if trace.predictions is None else trace.predictions.shape[2]
        lookahead = min(policy.lookahead or 0, recorded)
        fetch = policy.fetch or top_k
        if trace.predictions is not None:
            fetch = min(fetch, trace.predictions.shape[3])
        assert policy.slots is not None and policy.eviction is not None
        results[way] = simulate(
            trace,
            slots=policy.slots,
            num_staging=policy.num_staging,
            eviction=policy.eviction,
            predictor="recorded" if lookahead else "none",
            lookahead=lookahead,
            fetch=fetch,
            blob_bytes=need.blob_bytes,
            layer_s=layer_s,
            misses=way,
            costs=costs,
        )
    with_predictions = "the routers' predictions" if trace.predictions is not None else "none"
    return DecodeSpeed(
        hardware=hardware.name,
        routing=f"{routing}, {trace.num_tokens} tokens; copies ahead of use by: {with_predictions}",
        layer_s=layer_s,
        results=results,
    )


def costs_of(
    config: ModelConfig, dtype: str, quant: QuantSpec | None, hardware: HardwareSpec
) -> ExpertCosts:
    """Costs of a model's experts, if the hardware has times of just these (ConfigError)."""
    quant = quant or PRESETS["f32" if dtype == "float32" else "bf16"]
    layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
    bits = 0 if isinstance(layout.formats[0], DenseFormat) else DEFAULT_ACTIVATION_BITS
    chosen = {"activation_bits": bits, "dtype": dtype}
    if hardware.experts_of(layout, **chosen) is None:
        formats = formats_text(layout.formats)
        known = "; ".join(
            _describe(t.formats, t.hidden_size, t.intermediate_size, t.dtype)
            for t in hardware.experts
        )
        raise ConfigError(
            "the hardware has no times of these experts",
            where=hardware.name,
            got=_describe(formats, config.hidden_size, config.intermediate_size, dtype),
            expected=known or "times of some experts",
            do="measure them on such a machine (scripts/hardware.py --output=json), or choose "
            "--quant and --dtype of which it has times",
        )
    return ExpertCosts.of(hardware, layout, **chosen)


def uniform_trace(config: ModelConfig, seed: int = 0) -> RoutingTrace:
    """MAX_TOKENS tokens that use any experts of each layer, all equally likely."""
    router = config.router
    luck = np.random.default_rng(seed).random(
        (MAX_TOKENS, config.num_hidden_layers, router.num_experts)
    )
    ids = np.argsort(luck, axis=-1)[..., : router.top_k].astype(np.uint16)
    return RoutingTrace(
        decode_expert_ids=ids,
        decode_offsets=np.array([0, MAX_TOKENS]),
        prompt_expert_ids=ids[:0],
        prompt_offsets=np.zeros(2, np.int64),
        num_experts=router.num_experts,
    )


def _first_tokens(trace: RoutingTrace) -> RoutingTrace:
    predictions = trace.predictions
    return dataclasses.replace(
        trace,
        decode_expert_ids=trace.decode_expert_ids[:MAX_TOKENS],
        decode_offsets=np.minimum(trace.decode_offsets, MAX_TOKENS),
        predictions=None if predictions is None else predictions[:MAX_TOKENS],
    )


def _describe(formats: str, hidden_size: int, intermediate_size: int, dtype: str) -> str:
    return f"{hidden_size} x {intermediate_size} in {formats}, activations in {dtype}"
