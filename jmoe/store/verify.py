"""Verifying a model directory without running it: configuration, headers, names, shapes, values.

Says whether a model would load, not whether it is any good.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from jmoe.models import families
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.finite import NonFinite, count_non_finite
from jmoe.store.json_files import read_config_json
from jmoe.store.parameters import check_tensors
from jmoe.store.safetensors_file import NUMPY_DTYPES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What a valid model directory holds."""

    directory: Path
    family: str
    num_shards: int
    num_tensors: int
    num_parameters: int
    total_bytes: int
    dtypes: Mapping[str, int]  # number of tensors by type
    non_finite: Mapping[str, NonFinite] | None  # by tensor; None where values were not read


def verify_directory(
    directory: Path,
    *,
    deep: bool = False,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> CheckpointReport:
    """Checks that a model directory can be loaded.

    Args:
      directory: a model directory in Hugging Face format.
      deep: also read every tensor and count NaN and infinity. Needs the memory of one tensor.
      progress: told the bytes read so far, and in all, after each tensor of a deep check.

    Raises:
      ConfigError: config.json is not usable.
      CheckpointError: tensors are missing, extra, damaged, or of the wrong shape or type.
    """
    config = families.config_from_json(read_config_json(directory), directory / "config.json")
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, config)
    tensors = checkpoint.tensors.values()
    return CheckpointReport(
        directory=directory,
        family=config.model_type,
        num_shards=checkpoint.num_shards,
        num_tensors=len(tensors),
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        total_bytes=checkpoint.total_bytes,
        dtypes=dict(collections.Counter(tensor.dtype for tensor in tensors).most_common()),
        non_finite=find_non_finite(checkpoint, progress) if deep else None,
    )


def find_non_finite(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> dict[str, NonFinite]:
    """Reads all tensors of the types that jmoe loads, and finds those with NaN or infinity."""
    found = {}
    done_bytes = 0
    in_order = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    for info in in_order:
        if info.dtype in NUMPY_DTYPES:
            counts = count_non_finite(checkpoint.read(info.name))
            if counts.num_nan or counts.num_inf:
                found[info.name] = counts
        done_bytes += info.num_bytes
        progress(done_bytes, checkpoint.total_bytes)
    return found
