"""How fast plans decode on a machine that the user names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jmoe.config import ModelConfig
from jmoe.errors import RequestError
from jmoe.planning.decode_speed import DecodeSpeed, predict_speed
from jmoe.planning.hardware import HardwareSpec
from jmoe.planning.hardware_files import read_named
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan
from jmoe.planning.policy import MISSES, Misses, Policy
from jmoe.planning.traces import RoutingTrace, read_trace_of
from jmoe.quant.spec import QuantSpec


class Machine(NamedTuple):
    """A machine, and the routing to predict by."""

    hardware: HardwareSpec
    trace: RoutingTrace | None

    def predict(
        self,
        config: ModelConfig,
        dtype: str,
        quant: QuantSpec | None,
        plans: Mapping[Misses, Plan],
        need: MemoryNeed,
    ) -> DecodeSpeed:
        """Decoding of one sequence (ConfigError, RequestError)."""
        return predict_speed(config, dtype, quant, plans, need, self.hardware, self.trace)


def find_machine(
    hardware: str | None,
    trace: str | None,
    config: ModelConfig,
    *,
    has_plan: bool,
    batch_size: int,
    num_quants: int,
) -> Machine | None:
    """What the flags name; None if nothing is to be predicted.

    Raises:
      ConfigError: there is no such hardware.
      CheckpointError: the trace cannot be read.
      RequestError: the flags contradict each other, or the trace is of another model.
    """
    if hardware is None:
        if trace is not None:
            raise RequestError(
                "routing is to predict speeds by, which needs a machine",
                got=f"--trace={trace}",
                do="add --hardware, such as --hardware=rtx4090-ddr5",
            )
        return None
    if not has_plan:
        raise RequestError(
            "a speed is predicted for a plan", do="add --device_memory_gib or --policy"
        )
    if batch_size > 1 or num_quants > 1:
        raise RequestError(
            "speeds are predicted for one sequence in one quantization",
            got=f"--batch={batch_size}" if batch_size > 1 else "--quant=all",
            do="leave it out, or --hardware",
        )
    recorded = None if trace is None else read_trace_of(trace, config)
    return Machine(read_named(hardware), recorded)


def plans_by_way(
    plan: Plan, make: Callable[[Policy], Plan], requested: str | Policy | None
) -> dict[Misses, Plan]:
    """Plans of the thread engine for all ways of serving missing experts (RequestError).

    Args:
      plan: what came out for the request.
      make: makes the plan of another policy.
      requested: the policy.
    """
    if plan.policy.mode != "offload" or plan.policy.engine == "compiled":
        raise RequestError(
            "speeds are predicted where experts are missing on the device, and the host sees which",
            got=f"policy {plan.policy.mode}, engine {plan.policy.engine}",
            expected="policy offload, engine thread",
            do="leave --hardware out, or add --policy=offload or a smaller budget",
        )
    asked = requested if isinstance(requested, Policy) else Policy(mode="offload")
    asked = dataclasses.replace(asked, engine="thread", tokens_per_call=1, fetch_ahead=0)
    return {way: make(dataclasses.replace(asked, misses=way)) for way in MISSES}


def table(speed: DecodeSpeed) -> str:
    """A line for each way."""
    titles = ("misses", "tok/s", "hits", "copies/token", "host/token", "link", "host", "device")
    lines = ["".join(f"{title:>13}" for title in titles)]
    for way, result in speed.results.items():
        cells = [
            way,
            f"{result.tokens_per_s:.3g}",
            f"{result.hit_rate:.1%}",
            f"{result.loads_per_token:.1f}",
            f"{result.host_experts / result.num_tokens:.1f}",
            *(f"{share:.0%}" for share in speed.shares(way).values()),
        ]
        lines.append("".join(f"{cell:>13}" for cell in cells))
    return "\n".join(
        [
            f"decoding one sequence, predicted for: {speed.hardware}",
            f"by {speed.routing}",
            *lines,
            "link, host, device: share of the time that each works; a layer whose experts are all "
            f"there takes {speed.layer_s * 1e3:.3g} ms",
        ]
    )
