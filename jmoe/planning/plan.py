"""Plan: how a model will run on a device, where every byte goes, and why."""

import dataclasses
from typing import Any, Literal

from jmoe.config import ModelConfig
from jmoe.errors import CapacityError, RequestError
from jmoe.planning.budget import (
    Item,
    Offloading,
    cache_item,
    format_bytes,
    shortfall,
    smallest_gib,
    weight_items,
)
from jmoe.planning.need import MemoryNeed
from jmoe.planning.policy import MODES, Mode, Policy
from jmoe.quant.spec import QuantSpec

# Of the free memory of a device: the workspace is an estimate, and allocators leave gaps.
SHARE_OF_FREE = 0.9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model will run.

    Attributes:
      policy: which leaves nothing out.
      items: of device memory; together the predicted peak.
      host_bytes: of experts in host memory; of everything if the policy is host.
      reasons: of what was decided, a sentence each.
      budget_bytes: that the device's part keeps to; None is without end.
    """

    policy: Policy
    items: tuple[Item, ...]
    host_bytes: int
    reasons: tuple[str, ...]
    budget_bytes: int | None

    @property
    def device_bytes(self) -> int:
        """All items: the predicted peak."""
        return sum(item.num_bytes for item in self.items)

    @property
    def spare_bytes(self) -> int | None:
        """What is left of the budget."""
        return None if self.budget_bytes is None else self.budget_bytes - self.device_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_json(),
            "items": [item._asdict() for item in self.items],
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "budget_bytes": self.budget_bytes,
            "spare_bytes": self.spare_bytes,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        rows = [*self.items]
        rule = len(rows)
        rows.append(Item("together", self.device_bytes, ""))
        if self.budget_bytes is not None and self.spare_bytes is not None:
            rows.append(Item("spare", self.spare_bytes, ""))
            rows.append(Item("budget", self.budget_bytes, ""))
        lines = [
            f"{name:20}{format_bytes(num_bytes):>17}  {note}".rstrip()
            for name, num_bytes, note in rows
        ]
        lines.insert(rule, "-" * 37)
        head = f"{f'policy {self.policy.mode}':20}{'device memory':>17}"
        host = f"{'host memory':20}{format_bytes(self.host_bytes):>17}"
        return "\n".join([head, *lines, host, *(f"- {reason}" for reason in self.reasons)])


def make_plan(
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    *,
    batch_size: int,
    num_positions: int,
    requested: Mode | Literal["auto"] | Policy = "auto",
    offload: Policy = Policy(mode="offload"),  # noqa: B008  (frozen)
    budget_bytes: int | None = None,
    platform: str = "gpu",
    free_bytes: int | None = None,
    workspace_bytes: int | None = None,
) -> Plan:
    """Decides how a model runs in a budget of device memory, and where its bytes go.

    Args:
      config: the model.
      dtype: of activations, KV cache, and what is not quantized.
      quant: formats; None is all weights in dtype.
      batch_size: sequences at once.
      num_positions: of each, prompt and new tokens.
      requested: a mode; "auto", which is resident where that fits, else offload; or a policy,
        of which everything that it leaves open is chosen.
      offload: the policy that auto and offload mean.
      budget_bytes: device memory to use. None on a CPU has no end; else for offload and auto it
        is SHARE_OF_FREE of what is free, if that is known.
      platform: of the device: "cpu", "gpu", "tpu".
      free_bytes: device memory that is free; None if the backend does not say. No plan uses more.
      workspace_bytes: of a policy that names its chunk, once its programs are compiled; None
        estimates it.

    Raises:
      CapacityError: that takes more than the budget. The text has the arithmetic, the smallest
        budget that works, and what would make it smaller.
      ConfigError: a group size does not divide the rows of a matrix.
      RequestError: more positions than the model's context; a budget for the mode host; a policy
        for a model of another shape.
    """
    if isinstance(requested, Policy):
        policy, mode = requested, requested.mode
        policy.check_model(config)
    else:
        policy, mode = offload, requested
    if mode not in ("auto", *MODES):
        raise RequestError(
            "unknown policy", got=repr(mode), expected=f"auto, {', '.join(MODES)}, or a file"
        )
    shape = {"batch_size": batch_size, "num_positions": num_positions}
    need = MemoryNeed.of(config, dtype, quant, **shape)
    if mode == "host":
        return _host(need, budget_bytes)
    limit_bytes, reasons = _limit(budget_bytes, mode, platform, free_bytes)
    fits = limit_bytes is None or need.total_bytes <= limit_bytes
    if mode == "resident" or (mode == "auto" and fits):
        items = (
            *weight_items(need),
            cache_item(need, **shape),
            Item("workspace", need.workspace.num_bytes, "estimated"),
        )
        return _resident(need, items, limit_bytes, reasons)
    if mode == "auto":
        reasons += (f"resident would take {format_bytes(need.total_bytes)}: offload",)
    offloading = Offloading(
        config=config,
        dtype=dtype,
        need=need,
        policy=policy,
        workspace_bytes=workspace_bytes,
        **shape,
    )
    spending = offloading.spend(limit_bytes)
    return Plan(
        policy=spending.policy,
        items=spending.items,
        host_bytes=need.all_experts * need.blob_bytes,
        reasons=(*reasons, *spending.reasons),
        budget_bytes=limit_bytes,
    )


def _resident(
    need: MemoryNeed, items: tuple[Item, ...], limit_bytes: int | None, reasons: tuple[str, ...]
) -> Plan:
    if limit_bytes is not None and need.total_bytes > limit_bytes:
        raise CapacityError(
            "the model does not fit into this device memory as a whole",
            got=format_bytes(limit_bytes),
            expected=shortfall(need.total_bytes, items),
            do=f"allow {smallest_gib(need.total_bytes)} GiB or more; or use the policy offload, "
            "or fewer bits",
        )
    why = "no budget" if limit_bytes is None else f"all {need.all_experts} experts fit"
    return Plan(
        policy=Policy(mode="resident"),
        items=items,
        host_bytes=0,
        reasons=(*reasons, f"{why}: resident"),
        budget_bytes=limit_bytes,
    )


def _host(need: MemoryNeed, budget_bytes: int | None) -> Plan:
    if budget_bytes is not None:
        raise RequestError(
            "with the policy host nothing is in device memory",
            got=f"a budget of {format_bytes(budget_bytes)}",
            do="leave the budget out, or choose another policy",
        )
    return Plan(
        policy=Policy(mode="host"),
        items=(),
        host_bytes=need.total_bytes,
        reasons=("everything is computed by the CPU",),
        budget_bytes=None,
    )


def _limit(
    budget_bytes: int | None, mode: str, platform: str, free_bytes: int | None
) -> tuple[int | None, tuple[str, ...]]:
    """The bytes to keep to, and why they are not those that were asked for."""
    if free_bytes is None or platform == "cpu":  # whose memory is the host's
        return budget_bytes, ()
    free = format_bytes(free_bytes)
    if budget_bytes is None:
        # Whoever asks for a resident model gets what the device can hold, to the last byte.
        if mode == "resident":
            return None, ()
        budget_bytes = int(SHARE_OF_FREE * free_bytes)
        return budget_bytes, (f"no budget: {SHARE_OF_FREE:.0%} of the {free} that are free",)
    if free_bytes < budget_bytes:
        return free_bytes, (f"{free} are free, less than {format_bytes(budget_bytes)}",)
    return budget_bytes, ()
