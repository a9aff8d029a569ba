"""Writing files so that a name stands for a complete file: hashed, synced, then renamed.

Tensors are written one after another, as they are made; the header comes first and needs their
shapes only.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmoe.store.manifest import DATA_ALIGNMENT, PADDING_PREFIX, TENSOR_ALIGNMENT, FileEntry

_DTYPES = {"uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LENGTH_BYTES = 8
_WRITE_BYTES = 1 << 24
# So much is written to the disk while more is made, not in one go at the end.
_SYNC_BYTES = 1 << 27


class NewFile:
    """A file under a temporary name, which ``finish`` gives its own name, or ``discard`` ends.

    Of a process that was killed a file NAME.tmp remains, which the next attempt overwrites.
    Every method raises OSError.
    """

    def __init__(self, directory: Path, name: str):
        self._path = directory / f"{name}.tmp"
        self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115  (closed by the methods)
        self._digest = hashlib.sha256()
        self._num_bytes = self._num_synced = 0

    def write(self, contents: bytes | np.ndarray) -> None:
        """Appends bytes: hashed and written piece by piece, while they are in the cache."""
        if not isinstance(contents, bytes):
            contents = contents.reshape(-1).view(np.uint8).data  # type: ignore[assignment]
        view = memoryview(contents)  # type: ignore[arg-type]
        for start in range(0, len(view), _WRITE_BYTES):
            piece = view[start : start + _WRITE_BYTES]
            self._digest.update(piece)
            while piece:
                count = self._file.write(piece)
                self._num_bytes += count
                piece = piece[count:]
            if self._num_bytes - self._num_synced >= _SYNC_BYTES:
                os.fdatasync(self._file.fileno())
                self._num_synced = self._num_bytes

    def finish(self) -> FileEntry:
        """Syncs the file and gives it its name; ``sync_directory`` makes that last."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, self._path.with_suffix(""))
        return FileEntry(self._num_bytes, self._digest.hexdigest())

    def discard(self) -> None:
        """Leaves nothing behind, if the file is not finished."""
        if not self._file.closed:
            self._file.close()
            self._path.unlink(missing_ok=True)


def write_file(directory: Path, name: str, contents: bytes) -> FileEntry:
    """Writes a small file, or replaces it: at every moment the old one or the new one is there."""
    file = NewFile(directory, name)
    try:
        file.write(contents)
        return file.finish()
    finally:
        file.discard()


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TensorFile:
    """What a safetensors file holds besides the values of its tensors.

    Data start at a multiple of DATA_ALIGNMENT, and every tensor at one of the alignment. The
    format allows no gaps, so that a tensor of U8 fills them, named with PADDING_PREFIX.

    Attributes:
      head: the first bytes of the file.
      num_bytes: of the whole file.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        alignment: int = TENSOR_ALIGNMENT,
    ):
        """Takes shapes and types ("uint8", "bfloat16", ...), in the order of writing."""
        entries: dict[str, Any] = {}
        self._padding: dict[str, bytes] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            end = _place(entries, name, shape, dtype, end)
            padding = -end % alignment
            self._padding[name] = bytes(padding)
            if padding:
                end = _place(entries, f"{PADDING_PREFIX}{len(entries)}", (padding,), "uint8", end)
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(_LENGTH_BYTES + len(header)) % DATA_ALIGNMENT)
        self.head = len(header).to_bytes(_LENGTH_BYTES, "little") + header
        self.num_bytes = len(self.head) + end

    def padding_after(self, name: str) -> bytes:
        """What must be written behind a tensor."""
        return self._padding[name]


def _place(
    entries: dict[str, Any], name: str, shape: tuple[int, ...], dtype: str, begin: int
) -> int:
    end = begin + math.prod(shape) * jnp.dtype(dtype).itemsize
    entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return end
