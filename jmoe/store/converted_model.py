"""A model that convert.py wrote: opened in a moment, its experts used where they lie."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jmoe.config import ModelConfig
from jmoe.errors import CheckpointError, ConfigError
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.weights import component_format
from jmoe.quant.formats import DenseFormat
from jmoe.quant.layout import ExpertLayout, aligned_as, aligned_empty
from jmoe.quant.quant_array import PART_NAMES
from jmoe.quant.solver import Method
from jmoe.quant.spec import QuantSpec
from jmoe.store import host_memory
from jmoe.store.expert_store import ExpertStore
from jmoe.store.host_memory import FileRange
from jmoe.store.json_files import read_config_json
from jmoe.store.manifest import (
    BLOBS_NAME,
    CONFIG_NAME,
    CONVERT_AGAIN,
    DATA_ALIGNMENT,
    MANIFEST_NAME,
    PADDING_PREFIX,
    SHARED_NAME,
    TENSOR_ALIGNMENT,
    Manifest,
    experts_name,
)
from jmoe.store.reading import OnBytes, ignore_bytes
from jmoe.store.safetensors_file import (
    NUMPY_DTYPES,
    TensorInfo,
    first_few,
    printable,
    read_header,
)

STORED_DTYPES: Mapping[str, np.dtype] = {"U8": np.dtype(np.uint8), **NUMPY_DTYPES}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModel:
    """An opened store directory.

    Invariants, checked by open(): the manifest lists the files of a model of this configuration,
    they have the sizes it gives, and config.json is the one that was converted; every layer's
    blobs are there, as large as the layout says, at a multiple of DATA_ALIGNMENT; the shared
    tensors are those of the model, in the shapes and dtypes of the manifest's formats, at
    multiples of TENSOR_ALIGNMENT.

    Attributes:
      directory: the store.
      manifest: what it says of itself.
      config: the model.
      config_json: as it is in the store.
      layout: of an expert's blob.
    """

    directory: Path
    manifest: Manifest
    config: ModelConfig
    config_json: Mapping[str, Any]
    layout: ExpertLayout
    _blobs: tuple[TensorInfo, ...]  # by layer
    _shared: Mapping[str, TensorInfo]  # by path

    @classmethod
    def open(
        cls, directory: Path, *, verify: bool = False, on_bytes: OnBytes = ignore_bytes
    ) -> Self:
        """Opens and checks a store; reads headers only, whatever its size.

        Args:
          directory: that convert.py wrote.
          verify: also read every file and compare its contents with the hash of the manifest.
          on_bytes: told how much of that was read, piece by piece; ``manifest.total_bytes``
            in all.

        Raises:
          CheckpointError: not a complete store, or not as it was written.
          ConfigError: its config.json is not usable.
        """
        manifest = Manifest.read(directory)
        config_json = read_config_json(directory)
        manifest.check_config(directory)
        config = families.config_from_json(config_json, directory / CONFIG_NAME)
        manifest.check_files(directory, config.num_hidden_layers)
        if verify:
            manifest.check_contents(directory, on_bytes)
        layout, shapes = _layout_and_shapes(directory, config, manifest.quant)
        return cls(
            directory=directory,
            manifest=manifest,
            config=config,
            config_json=config_json,
            layout=layout,
            _blobs=tuple(
                _find_blobs(directory / experts_name(layer), config.router.num_experts, layout)
                for layer in range(config.num_hidden_layers)
            ),
            _shared=_find_shared(directory / SHARED_NAME, shapes, manifest.quant),
        )

    @property
    def quant(self) -> QuantSpec:
        return self.manifest.quant

    @property
    def method(self) -> Method:
        return self.manifest.method

    @property
    def expert_bytes(self) -> int:
        """Of all blobs."""
        return sum(info.num_bytes for info in self._blobs)

    @property
    def shared_bytes(self) -> int:
        """Of all other parameters, as they are stored."""
        return sum(info.num_bytes for info in self._shared.values())

    @property
    def expert_files(self) -> list[FileRange]:
        """By layer where the blobs of its experts are, one after another."""
        return [_range(info) for info in self._blobs]

    def open_experts(
        self,
        host_memory: str = "auto",
        on_bytes: OnBytes = ignore_bytes,
        *,
        available_bytes: int | None = None,
    ) -> ExpertStore:
        """Maps the experts, or loads them.

        Args:
          host_memory: "mmap", "ram", or "auto": what free memory allows.
          on_bytes: told how much was loaded, piece by piece; ``expert_bytes`` in all, and not
            called for a mapping.
          available_bytes: free memory (``planning.memory.available_host_bytes``); None is what
            the system says, which in a container may be more than there is.

        Raises:
          ConfigError: unknown kind of memory.
          CapacityError: not enough memory.
          CheckpointError: a file became shorter or unreadable.
        """
        if available_bytes is None:
            available_bytes = psutil.virtual_memory().available
        return ExpertStore.open(
            self.layout,
            self.expert_files,
            host_memory=host_memory,
            available_bytes=available_bytes,
            on_bytes=on_bytes,
        )

    def parameters(
        self, store: ExpertStore, dtype: str, on_bytes: OnBytes = ignore_bytes
    ) -> Iterator[np.ndarray]:
        """All parameters, in the order of ``decoder.abstract_parameters`` with ``self.quant``.

        Blobs are the store's memory itself, and the others are aligned so that the CPU backend
        takes all of them without a copy.

        Args:
          store: from ``open_experts``.
          dtype: of activations: "float32" or "bfloat16". What is not quantized is converted.
          on_bytes: told the size of every other parameter that was read; ``shared_bytes`` in all.

        Raises:
          CheckpointError: a file became shorter or unreadable.
        """
        layer = 0
        for path, parameter in abstract_parameters(self.config, dtype, self.quant).items():
            if path.endswith(".blobs"):
                yield store.layer(layer).view(self.layout.dtype)
                layer += 1
            else:
                info = self._shared[path]
                yield aligned_as(self._read(info, on_bytes), parameter.dtype)

    def _read(self, info: TensorInfo, on_bytes: OnBytes) -> np.ndarray:
        array = aligned_empty(info.shape, STORED_DTYPES[info.dtype])
        host_memory.read_files([(_range(info), array)], on_bytes)
        return array


def _range(info: TensorInfo) -> FileRange:
    return FileRange(info.file, info.offset, info.num_bytes)


def _layout_and_shapes(
    directory: Path, config: ModelConfig, quant: QuantSpec
) -> tuple[ExpertLayout, dict[str, jax.ShapeDtypeStruct]]:
    """The layout of experts, and all other parameters by path (CheckpointError)."""
    try:
        layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
        parameters = abstract_parameters(config, "bfloat16", quant)
    except ConfigError as error:  # a group that does not divide
        raise CheckpointError(
            f"the formats of {MANIFEST_NAME} do not fit its {CONFIG_NAME}",
            where=directory,
            got=error.got,
            expected=error.expected,
            do=CONVERT_AGAIN,
        ) from None
    return layout, {path: p for path, p in parameters.items() if not path.endswith(".blobs")}


def _find_blobs(path: Path, num_experts: int, layout: ExpertLayout) -> TensorInfo:
    """The blobs of a layer, if the file holds them and nothing else (CheckpointError)."""
    tensors = read_header(path)
    expected = f"{BLOBS_NAME}: U8 {[num_experts, layout.num_bytes]}"
    shown = [f"{printable(t.name)}: {t.dtype} {list(t.shape)}" for t in tensors.values()]
    if shown != [expected]:
        raise CheckpointError(
            f"{path.name} does not hold the experts of a layer in the manifest's formats",
            where=path.parent,
            got=first_few(shown) or "no tensors",
            expected=expected,
            do=CONVERT_AGAIN,
        )
    info = tensors[BLOBS_NAME]
    _check_alignment(info, DATA_ALIGNMENT)
    return info


def _find_shared(
    path: Path, expected: Mapping[str, jax.ShapeDtypeStruct], quant: QuantSpec
) -> dict[str, TensorInfo]:
    """All parameters but blobs by path, if they are what the formats demand (CheckpointError)."""
    tensors = {
        name: info
        for name, info in read_header(path).items()
        if not name.startswith(PADDING_PREFIX)
    }
    dtypes = {name: _dtypes(name, parameter.dtype, quant) for name, parameter in expected.items()}
    present = [tensors[name] for name in expected if name in tensors]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "that the model does not have": [printable(n) for n in tensors if n not in expected],
        "of another shape": [
            f"{t.name}: {list(t.shape)} instead of {list(expected[t.name].shape)}"
            for t in present
            if t.shape != expected[t.name].shape
        ],
        "of another type": [
            f"{t.name}: {t.dtype} instead of {' or '.join(dtypes[t.name])}"
            for t in present
            if t.dtype not in dtypes[t.name]
        ],
    }
    found = [
        f"{len(names)} tensor{'' if len(names) == 1 else 's'} {problem}: {first_few(names)}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f"{path.name} does not hold the parameters of the manifest's formats",
            where=path.parent,
            got="\n       ".join(found),
            expected=f"{len(expected)} tensors",
            do=CONVERT_AGAIN,
        )
    for info in tensors.values():
        _check_alignment(info, TENSOR_ALIGNMENT)
    return tensors


def _dtypes(path: str, part_dtype: np.dtype, quant: QuantSpec) -> tuple[str, ...]:
    """In which types, as safetensors calls them, a parameter may be stored."""
    last = path.rpartition(".")[2]
    if last in ("scale", "router"):  # as the source had it
        return tuple(NUMPY_DTYPES)
    if last not in PART_NAMES:
        fmt = component_format(path, quant)
        assert isinstance(fmt, DenseFormat), path
        part_dtype = jnp.dtype(fmt.dtype)
    return tuple(name for name, dtype in STORED_DTYPES.items() if dtype == part_dtype)


def _check_alignment(info: TensorInfo, alignment: int) -> None:
    if info.offset % alignment:
        raise CheckpointError(
            f"{printable(info.name)} is not aligned in {info.file.name}",
            where=info.file.parent,
            got=f"a start at byte {info.offset}",
            expected=f"a multiple of {alignment}",
            do=CONVERT_AGAIN,
        )
