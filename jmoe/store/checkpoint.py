"""Checkpoints: the tensors of a model directory, found through its index.

Shards are those that ``model.safetensors.index.json`` names, never those that lie around: model
repositories hold further copies of the same weights. Nothing is mapped into memory: mapped pages
would count as memory of this process, and the promise is that loading needs the model plus at
most one tensor. What the tensors mean is not known here.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from jmoe.errors import CheckpointError
from jmoe.store.json_files import read_json_object
from jmoe.store.reading import read_range
from jmoe.store.safetensors_file import (
    DOWNLOAD_AGAIN,
    NUM_SHOWN,
    NUMPY_DTYPES,
    TensorInfo,
    first_few,
    printable,
    read_header,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# A plain file name: a hostile index must neither read elsewhere nor, on the hub, match a pattern.
_SHARD_NAME = re.compile(r"\w[\w.+-]*\.safetensors", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of one model directory, validated and not yet read.

    Invariants, checked by open(): every shard that the index names is there, with a valid header
    and of the length that its header says; every tensor of the index is in the shard that the
    index names.
    """

    directory: Path
    tensors: Mapping[str, TensorInfo]
    unindexed: tuple[TensorInfo, ...]  # in a shard, and not where the index says, if anywhere

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Finds the shards of a model directory and validates their headers.

        Opens the index and the shards it names, or else ``model.safetensors``, and no other file.

        Raises:
          CheckpointError: no such directory, no safetensors in it, shards missing or damaged.
        """
        require_directory(directory)
        if not os.path.exists(directory / INDEX_NAME):
            if not os.path.exists(directory / SINGLE_NAME):
                raise _no_weights(directory)
            tensors = read_header(directory / SINGLE_NAME)
            return cls(directory=directory, tensors=tensors, unindexed=())

        weight_map = read_weight_map(directory)
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not os.path.exists(directory / shard)]
        if absent:
            raise CheckpointError(
                f"{_count(absent, 'shard')} of {len(shards)} missing: {first_few(absent)}",
                where=directory,
                do="download the missing files",
            )
        headers = {shard: read_header(directory / shard) for shard in shards}
        misplaced = [
            f"{printable(name)} ({shard})"
            for name, shard in weight_map.items()
            if name not in headers[shard]
        ]
        if misplaced:
            raise CheckpointError(
                f"{_count(misplaced, 'tensor')} not in the shard that {INDEX_NAME} names",
                where=directory,
                got=f"no {first_few(misplaced)}",
                do="download the index and the shards again, all of one version",
            )
        return cls(
            directory=directory,
            tensors={name: headers[shard][name] for name, shard in weight_map.items()},
            unindexed=tuple(
                tensor
                for shard in shards
                for name, tensor in headers[shard].items()
                if weight_map.get(name) != shard
            ),
        )

    @property
    def total_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_shards(self) -> int:
        return len({tensor.file for tensor in self.tensors.values()})

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        *,
        optional: Mapping[str, tuple[int, ...]] = {},
        ignored: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Compares names and shapes with those of a model, both ways, and the types.

        Args:
          expected: shapes of the tensors that must be there.
          optional: shapes of the tensors that may be there.
          ignored: whether a tensor of neither kind may be there nevertheless.

        Raises:
          CheckpointError: tensors are missing, extra, of another shape, or of a type that cannot
            be loaded. One error names them all: per kind their number and the first five.
        """
        known = {**optional, **expected}
        present = [self.tensors[name] for name in known if name in self.tensors]
        problems = {
            "missing": [name for name in expected if name not in self.tensors],
            "that the model does not have": [
                printable(name) for name in self.tensors if name not in known and not ignored(name)
            ]
            + [
                f"{printable(tensor.name)} in {tensor.file.name}, not in the index"
                for tensor in self.unindexed
                if not ignored(tensor.name)
            ],
            "of another shape": [
                f"{tensor.name}: {list(tensor.shape)} instead of {list(known[tensor.name])}"
                for tensor in present
                if tensor.shape != known[tensor.name]
            ],
            f"of a type other than {', '.join(NUMPY_DTYPES)}": [
                f"{tensor.name}: {tensor.dtype}"
                for tensor in present
                if tensor.dtype not in NUMPY_DTYPES
            ],
        }
        lines = []
        for problem, names in problems.items():
            if names:
                lines.append(f"{_count(names, 'tensor')} {problem}")
                lines += [f"  {name}" for name in names[:NUM_SHOWN]]
                lines += ["  ..."] if len(names) > NUM_SHOWN else []
        if lines:
            raise CheckpointError(
                "the tensors of the checkpoint do not fit its config.json",
                where=self.directory,
                got="\n       ".join(lines),
                expected=f"{len(expected)} tensors",
                do="check that config.json and the weights belong together and are not quantized",
            )

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in the type in which it is stored. Raises as read_into."""
        info = self.tensors[name]
        destination = np.empty(info.shape, _numpy_dtype(info))
        _read_bytes(info, destination)
        return destination

    def read_into(self, name: str, destination: np.ndarray) -> None:
        """Reads one tensor into an array, and converts it to the array's type.

        Where type and memory layout are those of the file, the bytes go straight to their place.
        Else the tensor is in memory a second time until this returns.

        Args:
          name: a key of ``tensors``.
          destination: array of the tensor's shape, of any float type.

        Raises:
          CheckpointError: the shape differs, the stored type cannot be loaded, or the file became
            shorter or unreadable since open().
        """
        info = self.tensors[name]
        if destination.shape != info.shape:
            raise CheckpointError(
                f"{printable(name)} has another shape",
                where=info.file,
                got=list(info.shape),
                expected=list(destination.shape),
            )
        if destination.dtype == _numpy_dtype(info) and destination.flags.c_contiguous:
            _read_bytes(info, destination)
        else:
            destination[...] = self.read(name)


def require_directory(directory: Path) -> None:
    """Raises CheckpointError unless this is a directory."""
    if os.path.isdir(directory):
        return
    if os.path.exists(directory):
        raise CheckpointError(
            f"{printable(str(directory))} is a file, not a model directory",
            do="name the directory that holds config.json",
        )
    raise CheckpointError(
        f"there is no directory {printable(str(directory))}",
        do="check the path; a model on the hub is named like mistralai/Mixtral-8x7B-v0.1",
    )


def read_weight_map(directory: Path) -> dict[str, str]:
    """Reads from the index of a model directory which shard holds which tensor.

    Raises:
      CheckpointError: the index is missing, not JSON, not of the right form, or names a shard
        that is not a plain file name ending in .safetensors.
    """
    weight_map = read_json_object(directory / INDEX_NAME).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError(
            f"{INDEX_NAME} has no weight_map from tensor names to file names",
            where=directory,
            do=DOWNLOAD_AGAIN,
        )
    for shard in weight_map.values():
        if not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{INDEX_NAME} names a shard that is not a plain file name",
                where=directory,
                got=printable(shard),
                expected="a name like model-00001-of-00019.safetensors",
                do="do not use this directory unless you trust its source",
            )
    return weight_map


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(os.listdir(directory))
    shards = [name for name in names if name.endswith(".safetensors")]
    foreign = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
    if shards:
        do = f"download {INDEX_NAME} too, which says what is in them"
    elif foreign:
        do = "convert them to safetensors, or download the safetensors version of the model"
    else:
        do = "name a directory in Hugging Face format, with config.json and safetensors"
    return CheckpointError(
        f"neither {INDEX_NAME} nor {SINGLE_NAME} is there",
        where=directory,
        got=first_few(shards or foreign or names) or "an empty directory",
        do=do,
    )


def _numpy_dtype(info: TensorInfo) -> np.dtype:
    if info.dtype not in NUMPY_DTYPES:
        raise CheckpointError(
            f"{printable(info.name)} is of a type that jmoe does not load",
            where=info.file,
            got=info.dtype,
            expected=f"one of {', '.join(NUMPY_DTYPES)}",
        )
    return NUMPY_DTYPES[info.dtype]


def _read_bytes(info: TensorInfo, destination: np.ndarray) -> None:
    view = destination.reshape(-1).view(np.uint8).data
    read_range(info.file, info.offset, view, do=DOWNLOAD_AGAIN)


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"
