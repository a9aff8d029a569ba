"""A plan as a table, with its arithmetic, or as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jmoe.config import ModelConfig
from jmoe.planning import sizes
from jmoe.planning.fit import Fit, MemoryNeed
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

    def plan(self, quant_name: str, quant: QuantSpec | None) -> "Plan":
        """The bytes with one quantization (ConfigError, RequestError)."""
        need = MemoryNeed.of(
            self.config,
            self.dtype,
            quant,
            batch_size=self.batch_size,
            num_positions=self.num_positions,
        )
        fit = None
        if self.device_memory_gib is not None:
            fit = need.fit(int(self.device_memory_gib * 2**30))
        return Plan(quant_name, need, fit)

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
class Plan:
    """The bytes of a model in one quantization; ``str`` gives the table."""

    quant_name: str
    need: MemoryNeed
    fit: Fit | None

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
            "device_memory": self.fit and dataclasses.asdict(self.fit),
        }

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
            lines.append(_line(title, size(num_bytes), f"{num_bytes / need.total_bytes:.1%}", bits))
        fit = "" if self.fit is None else f"\n\n{explain(need, self.fit)}"
        return "\n".join(lines) + fit


def explain(need: MemoryNeed, fit: Fit) -> str:
    """Whether it fits, and the arithmetic that says so."""
    memory = size(fit.device_memory_bytes)
    if fit.all_fits:
        left = size(fit.device_memory_bytes - need.total_bytes)
        return f"Fits into {memory}:\n  {memory} - {size(need.total_bytes)} = {left} to spare"
    spare = f"  {memory} - {size(need.base_bytes)} without experts = {size(fit.spare_bytes)}"
    if fit.num_slots == 0:
        return (
            f"Does not fit into {memory}, not even with a single expert:\n{spare}\n"
            f"  an expert takes {size(need.expert_bytes)}\n"
            "  do: use fewer bits, a shorter --context or a smaller --batch"
        )
    return (
        f"Does not fit into {memory} as a whole, but with {fit.experts_per_layer} of "
        f"{need.num_experts} experts per layer:\n{spare} for experts\n"
        f"  {size(fit.spare_bytes)} / {size(need.expert_bytes)} per expert = {fit.num_slots} "
        f"experts of {need.num_layers * need.num_experts}\n"
        f"  {fit.num_slots} / {need.num_layers} layers = {fit.num_slots / need.num_layers:.2f}"
    )


def comparison(plans: Sequence[Plan]) -> str:
    """One line per plan."""
    with_fit = any(plan.fit for plan in plans)
    titles = ["quantization", "weights", "bits per weight", "an expert", "total"]
    lines = [_line(*titles, *(["experts that fit"] if with_fit else []))]
    for plan in plans:
        need, weights = plan.need, sizes.total(plan.need.weights)
        cells = [
            plan.quant_name,
            size(weights.num_bytes),
            f"{weights.bits_per_weight:.2f}",
            size(need.expert_bytes),
            size(need.total_bytes),
        ]
        if plan.fit is not None:
            fitting = f"{plan.fit.experts_per_layer} of {need.num_experts}"
            cells.append("all" if plan.fit.all_fits else fitting)
        lines.append(_line(*cells))
    return "\n".join(lines)


def size(num_bytes: int) -> str:
    """In GiB, or in a smaller unit where that says more."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 2**10:,.2f} KiB"


def _line(title: str, *cells: str) -> str:
    return (f"{title:20}" + "".join(f"{cell:>17}" for cell in cells)).rstrip()


def _sequences(number: int) -> str:
    return "one sequence" if number == 1 else f"{number} sequences"
