"""What a model needs of a device's memory, by its parts."""

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
      workspace: temporaries of the largest program, with all experts on the device.
      expert_bytes: of one expert.
      blob_bytes: of one expert as it moves between memories.
      num_layers: of the model.
      num_experts: of a layer.
    """

    weights: dict[Component, Size]
    cache_bytes: int
    workspace: Workspace
    expert_bytes: int
    blob_bytes: int
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
            blob_bytes=sizes.blob_bytes(config, dtype, quant),
            num_layers=config.num_hidden_layers,
            num_experts=config.router.num_experts,
        )

    @property
    def total_bytes(self) -> int:
        """With all experts: what a resident model takes."""
        weight_bytes = sizes.total(self.weights).num_bytes
        return weight_bytes + self.cache_bytes + self.workspace.num_bytes

    @property
    def base_bytes(self) -> int:
        """Weights but for the experts, and the KV cache: on the device in any case."""
        return self.total_bytes - self.workspace.num_bytes - self.weights["experts"].num_bytes

    @property
    def all_experts(self) -> int:
        """Over all layers."""
        return self.num_layers * self.num_experts
