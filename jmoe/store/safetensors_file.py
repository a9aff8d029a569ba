"""Headers of safetensors files: which tensors, of what type and shape, at which bytes.

Reads the head of a file and asks for its size; the data itself is neither read nor mapped, so a
checkpoint of 90 GB is validated in a moment and before anything is allocated. Whether the tensors
are those of a model is not known here.
Source: https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jmoe.errors import CheckpointError

# Every type of the format; some are smaller than a byte.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

# The types that jmoe loads.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

DOWNLOAD_AGAIN = "download the file again"
NUM_SHOWN = 5  # names in a message

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LENGTH_BYTES = 8
_MAX_INTEGER = 2**63 - 1  # numpy's limits: of a size, of a number of elements, of a rank
_MAX_ELEMENTS = 2**56
_MAX_RANK = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    name: str
    dtype: str  # as the format writes it, such as BF16
    shape: tuple[int, ...]
    file: Path
    offset: int  # of the first byte, in the file
    num_bytes: int


def printable(name: str) -> str:
    """A name out of a file, safe to show on a terminal."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def first_few(names: Sequence[str]) -> str:
    """The first of some names, for a message; dots stand for the others."""
    return ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and validates the header of a safetensors file.

    Args:
      path: the file.

    Returns:
      Its tensors by name. Together they own every byte of the data section exactly once.

    Raises:
      CheckpointError: the file is missing, unreadable, something else under this name (a Git LFS
        pointer, a web page), damaged, or not as long as its header says.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "is not a regular file")
        with path.open("rb") as file:
            header = _read_header_bytes(path, file, status.st_size)
    except FileNotFoundError:
        raise _error(path, "is missing", do=DOWNLOAD_AGAIN) from None
    except OSError as e:
        raise _error(path, "cannot be read", got=e.strerror) from None

    data_start = _LENGTH_BYTES + len(header)
    tensors = {
        name: _parse_entry(path, name, entry, data_start)
        for name, entry in _parse_json(path, header).items()
    }
    _check_layout(path, tensors.values(), data_start, status.st_size)
    return tensors


def _error(path: Path, what: str, **details: Any) -> CheckpointError:
    return CheckpointError(f"{path.name} {what}", where=path.parent, **details)


def _damaged(path: Path, what: str, **details: Any) -> CheckpointError:
    return _error(path, what, do=DOWNLOAD_AGAIN, **details)


def _read_header_bytes(path: Path, file: Any, file_bytes: int) -> bytes:
    start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        raise _error(
            path,
            f"is a Git LFS pointer ({file_bytes} bytes), not weights",
            do="git lfs pull, or download the file again",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _error(
            path,
            f"is a web page ({file_bytes} bytes), not weights",
            do="download the file again; check that you have access and accepted the licence",
        )
    if file_bytes < _LENGTH_BYTES:
        raise _damaged(
            path,
            "is empty" if file_bytes == 0 else "is too short for a safetensors file",
            got=f"{file_bytes} bytes",
        )
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise _damaged(
            path,
            "is not a safetensors file",
            got=f"a header length of {header_bytes} bytes",
            expected=f"at most {_MAX_HEADER_BYTES}",
        )
    if _LENGTH_BYTES + header_bytes > file_bytes:
        raise _damaged(
            path,
            "is truncated within its header",
            got=f"{file_bytes} bytes",
            expected=f"more than {_LENGTH_BYTES + header_bytes}",
        )
    file.seek(_LENGTH_BYTES)
    return file.read(header_bytes)


def _parse_json(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number past all bounds
        raise _damaged(path, "has a header that is not valid JSON", got=e) from None
    if not isinstance(entries, dict):
        raise _damaged(
            path,
            "has a header that is not a JSON object",
            got=type(entries).__name__,
        )
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "has a __metadata__ that is not an object", got=reprlib.repr(metadata))
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"{printable(key)} appears twice")
        unique[key] = value
    return unique


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    shown = printable(name)
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        } if all(_is_size(n) for n in (*shape, begin, end)) and begin <= end:
            pass
        case _:
            raise _damaged(
                path,
                f"has a malformed entry for {shown}",
                got=reprlib.repr(entry),
                expected="dtype, shape and data_offsets [begin, end]",
            )
    if dtype not in DTYPE_BITS:
        raise _damaged(
            path,
            f"holds {shown} in a type that safetensors does not have",
            got=printable(dtype),
            expected=f"one of {', '.join(DTYPE_BITS)}",
        )
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise _damaged(path, f"gives {shown} an impossible shape", got=reprlib.repr(shape))
    num_bytes = end - begin
    expected_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * num_bytes != expected_bits:
        raise _damaged(
            path,
            f"gives {shown} a byte range that does not fit its shape",
            got=f"{num_bytes} bytes",
            expected=f"{-(-expected_bits // 8)} bytes for {dtype} {shape}",
        )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=path,
        offset=data_start + begin,
        num_bytes=num_bytes,
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER  # a bool is not a size


def _check_layout(
    path: Path, tensors: Iterable[TensorInfo], data_start: int, file_bytes: int
) -> None:
    in_order = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes))
    cursor = data_start
    for tensor in in_order:
        if tensor.offset != cursor:
            raise _damaged(
                path,
                f"has bytes that two tensors own, before {printable(tensor.name)}"
                if tensor.offset < cursor
                else f"has bytes that no tensor owns, before {printable(tensor.name)}",
                got=f"a start at byte {tensor.offset}",
                expected=cursor,
            )
        cursor += tensor.num_bytes
    if cursor != file_bytes:
        raise _damaged(
            path,
            "is truncated" if cursor > file_bytes else "has bytes after its last tensor",
            got=f"{file_bytes} bytes",
            expected=f"{cursor} bytes",
        )
