"""The bytes of a model and its plan as tables, or as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from _plan.speed import Machine, plans_by_way, table
from jmoe.config import ModelConfig
from jmoe.errors import CapacityError
from jmoe.planning import sizes
from jmoe.planning.budget import format_bytes
from jmoe.planning.decode_speed import DecodeSpeed
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import Policy
from jmoe.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked for, but for the quantization."""

    model: str
    config: ModelConfig
    dtype: str
    batch_size: int
    num_positions: int
    device_memory_gib: float | None
    policy: str | Policy | None
    machine: Machine | None = None

    def report(self, quant_name: str, quant: QuantSpec | None) -> "Report":
        """The bytes with one quantization, and the plan if one is asked for.

        Raises:
          ConfigError: a group size does not divide the rows of a matrix.
          RequestError: more positions than the model's context; a policy that cannot be.
          ConfigError: the machine has no times of these experts.
        """
        need = MemoryNeed.of(
            self.config,
            self.dtype,
            quant,
            batch_size=self.batch_size,
            num_positions=self.num_positions,
        )
        if self.device_memory_gib is None and self.policy is None:
            return Report(quant_name, need)
        try:
            plan = self._plan(quant, self.policy or "auto")
        except CapacityError as error:
            return Report(quant_name, need, refusal=error)
        speed = None
        if self.machine is not None:
            plans = plans_by_way(plan, lambda policy: self._plan(quant, policy), self.policy)
            speed = self.machine.predict(self.config, self.dtype, quant, plans, need)
        return Report(quant_name, need, plan, speed=speed)

    def _plan(self, quant: QuantSpec | None, requested: str | Policy) -> Plan:
        budget = None if self.device_memory_gib is None else int(self.device_memory_gib * 2**30)
        return make_plan(
            self.config,
            self.dtype,
            quant,
            batch_size=self.batch_size,
            num_positions=self.num_positions,
            requested=requested,  # type: ignore[arg-type]
            budget_bytes=budget,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_type": self.config.model_type,
            "num_hidden_layers": self.config.num_hidden_layers,
            "num_experts": self.config.router.num_experts,
            "dtype": self.dtype,
            "batch": self.batch_size,
            "context": self.num_positions,
        }

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.model}: {config.num_hidden_layers} layers of {config.router.num_experts} "
            f"experts (top {config.router.top_k}); {_sequences(self.batch_size)} of "
            f"{self.num_positions:,} positions, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The bytes of a model in one quantization; ``str`` gives tables.

    Attributes:
      quant_name: of the quantization.
      need: the bytes.
      plan: how it runs in the memory of a device, if that was asked for and can be.
      refusal: why it cannot be.
      speed: of decoding, if it is predicted.
    """

    quant_name: str
    need: MemoryNeed
    plan: Plan | None = None
    refusal: CapacityError | None = None
    speed: DecodeSpeed | None = None

    def save_policy(self, path: str) -> None:
        """Writes the plan's policy (CapacityError if there is no plan, RequestError)."""
        if self.refusal is not None:
            raise self.refusal
        assert self.plan is not None
        self.plan.policy.write(path)

    def to_json(self) -> dict[str, Any]:
        need, weights = self.need, sizes.total(self.need.weights)
        return {
            "quant": self.quant_name,
            "components": {
                name: {
                    "num_weights": size.num_weights,
                    "bytes": size.num_bytes,
                    "bits_per_weight": size.bits_per_weight,
                    "share": size.num_bytes / need.total_bytes,
                }
                for name, size in need.weights.items()
            },
            "num_weights": weights.num_weights,
            "weight_bytes": weights.num_bytes,
            "bits_per_weight": weights.bits_per_weight,
            "kv_cache_bytes": need.cache_bytes,
            "workspace_bytes": need.workspace.num_bytes,
            "workspace_parts": dataclasses.asdict(need.workspace),
            "total_bytes": need.total_bytes,
            "expert_bytes": need.expert_bytes,
            "plan": self.plan and self.plan.to_json(),
            "does_not_fit": self.refusal and str(self.refusal),
        } | ({"decode": self.speed.to_json()} if self.speed is not None else {})

    def __str__(self) -> str:
        need, weights = self.need, sizes.total(self.need.weights)
        rows = [
            (name, size.num_bytes, f"{size.bits_per_weight:.2f}")
            for name, size in need.weights.items()
            if size.num_weights
        ]
        rows += [
            ("all weights", weights.num_bytes, f"{weights.bits_per_weight:.2f}"),
            ("KV cache", need.cache_bytes, ""),
            ("workspace, estimated", need.workspace.num_bytes, ""),
            ("total", need.total_bytes, ""),
        ]
        lines = [_line("component", "bytes", "share", "bits per weight")]
        for title, num_bytes, bits in rows:
            if title in ("all weights", "total"):
                lines.append("-" * len(lines[0]))
            share = f"{num_bytes / need.total_bytes:.1%}"
            lines.append(_line(title, format_bytes(num_bytes), share, bits))
        if self.plan is not None:
            lines += ["", str(self.plan)]
        if self.speed is not None:
            lines += ["", table(self.speed)]
        if self.refusal is not None:
            lines += ["", f"cannot be: {self.refusal}"]
        return "\n".join(lines)


def comparison(reports: Sequence[Report]) -> str:
    """One line per quantization."""
    with_plan = any(report.plan or report.refusal for report in reports)
    titles = ["quantization", "weights", "bits per weight", "an expert", "total"]
    lines = [_line(*titles, *(["experts a layer"] if with_plan else []))]
    for report in reports:
        need, weights = report.need, sizes.total(report.need.weights)
        cells = [
            report.quant_name,
            format_bytes(weights.num_bytes),
            f"{weights.bits_per_weight:.2f}",
            format_bytes(need.expert_bytes),
            format_bytes(need.total_bytes),
        ]
        if with_plan:
            cells.append(_experts_that_fit(report))
        lines.append(_line(*cells))
    return "\n".join(lines)


def _experts_that_fit(report: Report) -> str:
    if report.plan is None:
        return "cannot be"
    if report.plan.policy.mode != "offload":
        return "all"
    each = report.plan.policy.num_slots / report.need.num_layers
    return f"{each:.2f} of {report.need.num_experts}"


def _line(title: str, *cells: str) -> str:
    return (f"{title:20}" + "".join(f"{cell:>17}" for cell in cells)).rstrip()


def _sequences(number: int) -> str:
    return "one sequence" if number == 1 else f"{number} sequences"
