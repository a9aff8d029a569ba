"""Where unquantized weights come from: one matrix at a time, by the decoder's names.

A source knows nothing of quantization, and holds no weights: memory is what its caller keeps.
"""

import functools
import hashlib
import json
import math
import os
import statistics
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jmoe.config import ModelConfig
from jmoe.errors import CheckpointError
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.families import ParameterSource
from jmoe.quant.layout import aligned_empty
from jmoe.store.checkpoint import INDEX_NAME, Checkpoint
from jmoe.store.json_files import read_config_json
from jmoe.store.manifest import SIDE_FILES
from jmoe.store.parameters import check_tensors
from jmoe.store.safetensors_file import NUMPY_DTYPES

_SAMPLE_BYTES = 1 << 16
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class WeightSource(Protocol):
    """The weights of one model, unquantized, in whatever form they are stored.

    Attributes:
      name: of the model; a directory's is its last part.
      directory: where its files are; None if it has none.
      config_json: as Hugging Face writes it.
      config: the same, read.
      total_bytes: that reading everything once reads.
    """

    @property
    def name(self) -> str: ...
    @property
    def directory(self) -> Path | None: ...
    @property
    def config_json(self) -> dict[str, Any]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def total_bytes(self) -> int: ...

    def read(self, path: str, expert: int | None = None) -> np.ndarray:
        """Reads one parameter, in the type in which it is stored.

        Args:
          path: a key of ``abstract_parameters(config)``, such as "embed_tokens".
          expert: of a stack of experts, "layers.3.experts.w1", the matrix of this one only.

        Raises:
          CheckpointError: the file changed or became unreadable.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON that differs for another model or changed weights; without paths and times."""
        ...

    def side_files(self) -> dict[str, Path]:
        """Those of manifest.SIDE_FILES that there are."""
        ...


class CheckpointSource:
    """A checkpoint in Hugging Face format. Its tensors are those of its configuration."""

    def __init__(self, directory: Path, name: str | None = None):
        """Validates configuration, names, shapes and types; reads no weights.

        Raises:
          ConfigError: config.json is unreadable or not supported.
          CheckpointError: files or tensors are missing, damaged, or of another model.
        """
        self.name = name or directory.resolve().name
        self.directory = directory
        self.config_json = read_config_json(directory)
        self.config = families.config_from_json(self.config_json, directory)
        self._checkpoint = Checkpoint.open(directory)
        check_tensors(self._checkpoint, self.config)
        self._sources: dict[str, ParameterSource] = families.parameter_sources(self.config)

    @property
    def total_bytes(self) -> int:
        tensors = self._checkpoint.tensors
        return sum(
            tensors[name].num_bytes for source in self._sources.values() for name in source.tensors
        )

    def read(self, path: str, expert: int | None = None) -> np.ndarray:
        source = self._sources[path]
        assert source.stacked == (expert is not None)
        info = self._checkpoint.tensors[source.tensors[expert or 0]]
        array = aligned_empty(info.shape, NUMPY_DTYPES[info.dtype])
        self._checkpoint.read_into(info.name, array)
        return array

    @property
    def files(self) -> list[Path]:
        """Those that hold the weights."""
        return sorted({info.file for info in self._checkpoint.tensors.values()})

    def fingerprint(self) -> dict[str, Any]:
        index = self.directory / INDEX_NAME
        return {
            "kind": "checkpoint",
            "config_sha256": json_sha256(self.config_json),
            "index": _describe_file(index) if index.exists() else None,
            "files": {file.name: _describe_file(file) for file in self.files},
        }

    def side_files(self) -> dict[str, Path]:
        return find_side_files(self.directory)


class RandomSource:
    """Random bfloat16 weights of any shape, scaled so that activations stay of order one.

    A matrix depends on seed, path and expert only. Its values are the quantiles of the normal
    distribution at 2^16 uniform steps: as good as any for trying out a shape, and made at the
    speed of a disk.
    """

    def __init__(self, config_json: dict[str, Any], name: str, seed: int = 0):
        """Raises ConfigError: the configuration is not usable."""
        self.name = name
        self.directory = None
        self.config_json = config_json
        self.config = families.config_from_json(config_json, name)
        self._seed = seed
        self._shapes = {path: p.shape for path, p in abstract_parameters(self.config).items()}

    @property
    def total_bytes(self) -> int:
        return _BFLOAT16.itemsize * sum(math.prod(shape) for shape in self._shapes.values())

    def read(self, path: str, expert: int | None = None) -> np.ndarray:
        shape = self._shapes[path] if expert is None else self._shapes[path][1:]
        if path.endswith(".scale"):  # of a norm
            return np.ones(shape, _BFLOAT16)
        std = 1.0 if path == "embed_tokens" else shape[-1] ** -0.5
        table = (_normal_quantiles() * std).astype(_BFLOAT16).view(np.uint16)
        seed = [self._seed, zlib.crc32(path.encode()), 0 if expert is None else expert + 1]
        generator = np.random.Generator(np.random.SFC64(seed))
        array = aligned_empty(shape, _BFLOAT16)
        flat = array.reshape(-1).view(np.uint16)
        for start in range(0, flat.size, table.size):
            piece = flat[start : start + table.size]
            piece[:] = table[generator.integers(0, table.size, piece.size, np.uint16)]
        return array

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "random",
            "config_sha256": json_sha256(self.config_json),
            "seed": self._seed,
        }

    def side_files(self) -> dict[str, Path]:
        return {}


@functools.lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """The quantiles of the standard normal distribution in the middle of 2^16 equal parts."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / (1 << 16)) for i in range(1 << 16)], np.float32)


def find_side_files(directory: Path) -> dict[str, Path]:
    """Those of manifest.SIDE_FILES that a directory has."""
    return {name: directory / name for name in SIDE_FILES if (directory / name).is_file()}


def json_sha256(value: Mapping[str, Any]) -> str:
    """Hash of a JSON object, whatever the order of its keys and its spacing."""
    return _sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _describe_file(path: Path) -> dict[str, Any]:
    """Size of a file, and hash of its head and tail: changed weights of equal size show there."""
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            head = file.read(_SAMPLE_BYTES)
            file.seek(max(_SAMPLE_BYTES, num_bytes - _SAMPLE_BYTES))
            return {"bytes": num_bytes, "sample_sha256": _sha256(head + file.read(_SAMPLE_BYTES))}
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read", where=path.parent, got=error.strerror
        ) from None
