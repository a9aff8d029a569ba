"""Verifying a converted store without running it: manifest, sizes, formats, hashes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from jmoe.models.decoder import abstract_parameters
from jmoe.quant.solver import Method
from jmoe.store.converted_model import ConvertedModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What a valid store holds.

    Attributes:
      directory: the store.
      family: of the model.
      source: what was converted, as the manifest says it.
      quant: its name, or the formats of all components.
      formats: of every component.
      method: how the codes were found.
      num_layers: of the model.
      num_experts: per layer.
      num_parameters: before they were quantized.
      blob_bytes: of one expert.
      expert_bytes: of all experts.
      shared_bytes: of all other parameters.
      total_bytes: of all files but the manifest.
      num_files: without the manifest.
      hashes_verified: whether all contents were read and are as they were written.
    """

    directory: Path
    family: str
    source: str
    quant: str
    formats: Mapping[str, str]
    method: Method
    num_layers: int
    num_experts: int
    num_parameters: int
    blob_bytes: int
    expert_bytes: int
    shared_bytes: int
    total_bytes: int
    num_files: int
    hashes_verified: bool

    @property
    def bits_per_parameter(self) -> float:
        """Of what is loaded, scales and zero points included."""
        return 8 * (self.expert_bytes + self.shared_bytes) / self.num_parameters


def verify_store(
    directory: Path,
    *,
    deep: bool = False,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> StoreReport:
    """Checks that a converted store can be loaded.

    Args:
      directory: that convert.py wrote.
      deep: also read every file and compare it with the hash in the manifest.
      progress: told the bytes read so far, and in all, while that goes on.

    Raises:
      ConfigError: its config.json is not usable.
      CheckpointError: it is incomplete, or not as it was written.
    """
    model = ConvertedModel.open(directory)
    manifest, done_bytes = model.manifest, 0

    def count(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        progress(done_bytes, manifest.total_bytes)

    if deep:
        manifest.check_contents(directory, count)
    parameters = abstract_parameters(model.config).values()
    return StoreReport(
        directory=directory,
        family=model.config.model_type,
        source=str(manifest.source.get("name", "unknown")),
        quant=str(model.quant),
        formats=model.quant.to_json(),
        method=model.method,
        num_layers=model.config.num_hidden_layers,
        num_experts=model.config.router.num_experts,
        num_parameters=sum(math.prod(parameter.shape) for parameter in parameters),
        blob_bytes=model.layout.num_bytes,
        expert_bytes=model.expert_bytes,
        shared_bytes=model.shared_bytes,
        total_bytes=manifest.total_bytes,
        num_files=len(manifest.files),
        hashes_verified=deep,
    )
