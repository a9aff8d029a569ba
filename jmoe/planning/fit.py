"""Whether a model fits into a device's memory, and how many of its experts do if not."""

import dataclasses

from jmoe.config import ModelConfig
from jmoe.planning import sizes
from jmoe.planning.sizes import Component, Size, Workspace
from jmoe.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """What running a model takes, in bytes, from ``of``.

    Attributes:
      weights: by component.
      cache_bytes: of the KV cache.
      workspace: temporaries of the largest program.
      expert_bytes: of one expert.
      num_layers: of the model.
      num_experts: of a layer.
    """

    weights: dict[Component, Size]
    cache_bytes: int
    workspace: Workspace
    expert_bytes: int
    num_layers: int
    num_experts: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: str,
        quant: QuantSpec | None,
        *,
        batch_size: int,
        num_positions: int,
    ) -> "MemoryNeed":
        """The need of so many sequences of so many positions, prompt and new tokens.

        Raises:
          ConfigError: a group size does not divide the rows of a matrix.
          RequestError: more positions than the model's context.
        """
        shape = {"batch_size": batch_size, "num_positions": num_positions}
        return cls(
            weights=sizes.weight_sizes(config, dtype, quant),
            cache_bytes=sizes.cache_bytes(config, dtype, **shape),
            workspace=sizes.workspace(config, dtype, **shape),
            expert_bytes=sizes.expert_bytes(config, dtype, quant),
            num_layers=config.num_hidden_layers,
            num_experts=config.router.num_experts,
        )

    @property
    def total_bytes(self) -> int:
        """With all experts."""
        weight_bytes = sizes.total(self.weights).num_bytes
        return weight_bytes + self.cache_bytes + self.workspace.num_bytes

    @property
    def base_bytes(self) -> int:
        """Without experts: what must be in device memory in any case."""
        return self.total_bytes - self.weights["experts"].num_bytes

    def fit(self, device_memory_bytes: int) -> "Fit":
        """What of it a memory of this size holds."""
        spare_bytes = device_memory_bytes - self.base_bytes
        all_experts = self.num_layers * self.num_experts
        num_slots = max(0, min(all_experts, spare_bytes // self.expert_bytes))
        return Fit(
            device_memory_bytes=device_memory_bytes,
            spare_bytes=spare_bytes,
            num_slots=num_slots,
            experts_per_layer=num_slots // self.num_layers,
            all_fits=self.total_bytes <= device_memory_bytes,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a device memory holds of a model.

    Attributes:
      device_memory_bytes: the memory.
      spare_bytes: left for experts; negative if not even the rest of the model fits.
      num_slots: how many experts that holds, over all layers.
      experts_per_layer: the same for each layer, rounded down.
      all_fits: whether the whole model does.
    """

    device_memory_bytes: int
    spare_bytes: int
    num_slots: int
    experts_per_layer: int
    all_fits: bool
