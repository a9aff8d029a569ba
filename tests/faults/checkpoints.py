"""Builders of small checkpoints, sound and damaged, for all tests of loading."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TINY_MIXTRAL = Path(__file__).parents[2] / "jmoe" / "data" / "tiny-mixtral"
FIRST_SHARD = "model-00001-of-00005.safetensors"
INDEX_NAME = "model.safetensors.index.json"

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 4892809584\n"
)
WEB_PAGE = b"\n <!DOCTYPE html><html><body>Access to this model is restricted</body></html>\n"


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, given as bytes or as what becomes JSON, sound or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(
    dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8, **changes: Any
) -> dict[str, Any]:
    """One entry of a header; by default two float32 at the start of the data."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]} | changes


@dataclasses.dataclass(frozen=True, slots=True)
class FileFault:
    """Contents of a damaged safetensors file, and words that its error must hold."""

    contents: bytes
    words: tuple[str, ...]


_DATA = bytes(8)
_TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":1}'


def _one(data: bytes = _DATA, **changes: Any) -> bytes:
    return safetensors_bytes({"w": entry(**changes)}, data)


def _without(key: str) -> bytes:
    return safetensors_bytes({"w": {k: v for k, v in entry().items() if k != key}}, _DATA)


_MALFORMED = ("malformed entry for w", "dtype, shape and data_offsets")
_UNOWNED = "bytes that no tensor owns"
_SHARED = "bytes that two tensors own"

FILE_FAULTS: dict[str, FileFault] = {
    # Something else under this name.
    "lfs_pointer": FileFault(
        LFS_POINTER, ("Git LFS pointer", f"{len(LFS_POINTER)} bytes", "git lfs pull")
    ),
    "web_page": FileFault(WEB_PAGE, ("web page", "licence")),
    "web_page_upper_case": FileFault(b"<HTML><BODY>403", ("web page", "access")),
    "xml_error": FileFault(b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", ("web page",)),
    "pickle": FileFault(b"PK\x03\x04\x00\x00\x08\x08" * 8, ("not a safetensors file",)),
    # Cut short.
    "no_bytes": FileFault(b"", ("is empty", "0 bytes", "download the file again")),
    "seven_bytes": FileFault(b"\x40" + bytes(6), ("too short", "7 bytes")),
    "header_cut": FileFault(_one()[:30], ("truncated within its header", "30 bytes")),
    "header_length_only": FileFault(_one()[:8], ("truncated within its header", "8 bytes")),
    "data_cut": FileFault(_one()[:-3], ("is truncated", f"{len(_one())} bytes", "download")),
    "data_absent": FileFault(_one(b""), ("is truncated",)),
    # A header that is no header.
    "header_over_limit": FileFault(
        (100_000_001).to_bytes(8, "little") + bytes(64),
        ("not a safetensors file", "100000001 bytes", "at most 100000000"),
    ),
    "header_not_json": FileFault(safetensors_bytes(b'{"w": '), ("not valid JSON",)),
    "header_not_utf8": FileFault(safetensors_bytes(b'{"\xff": 1}'), ("not valid JSON", "utf-8")),
    "header_utf16": FileFault(safetensors_bytes("{}".encode("utf-16")), ("not valid JSON",)),
    "header_list": FileFault(safetensors_bytes([]), ("not a JSON object", "list")),
    "header_of_zero_bytes": FileFault(safetensors_bytes(b""), ("not valid JSON",)),
    "header_nested_deep": FileFault(safetensors_bytes(b"[" * 200_000), ("not valid JSON",)),
    "header_number_of_5000_digits": FileFault(
        safetensors_bytes(b'{"w":' + b"9" * 5000 + b"}"), ("not valid JSON",)
    ),
    "key_twice": FileFault(safetensors_bytes(_TWICE, _DATA), ("w appears twice",)),
    "key_twice_in_entry": FileFault(
        safetensors_bytes(b'{"w":{"dtype":"F32","dtype":"F32"}}'), ("dtype appears twice",)
    ),
    "metadata_not_object": FileFault(safetensors_bytes({"__metadata__": [1]}), ("__metadata__",)),
    # Entries.
    "entry_not_object": FileFault(safetensors_bytes({"w": 7}), (*_MALFORMED, "got: 7")),
    "no_dtype": FileFault(_without("dtype"), _MALFORMED),
    "no_shape": FileFault(_without("shape"), _MALFORMED),
    "no_offsets": FileFault(_without("data_offsets"), _MALFORMED),
    "dtype_number": FileFault(_one(dtype=32), _MALFORMED),
    "shape_number": FileFault(_one(shape=2), _MALFORMED),
    "shape_bool": FileFault(_one(shape=[2, True]), _MALFORMED),
    "shape_float": FileFault(_one(shape=[2.0]), _MALFORMED),
    "shape_negative": FileFault(_one(shape=[-1, -2]), _MALFORMED),
    "shape_null": FileFault(_one(shape=[None]), _MALFORMED),
    "shape_past_64_bits": FileFault(_one(shape=[2**64]), _MALFORMED),
    "three_offsets": FileFault(_one(data_offsets=[0, 4, 8]), _MALFORMED),
    "offset_bool": FileFault(_one(begin=False), _MALFORMED),
    "offset_string": FileFault(_one(end="8"), _MALFORMED),
    "offset_negative": FileFault(_one(begin=-8, end=0), _MALFORMED),
    "offset_past_64_bits": FileFault(_one(end=10**4000), _MALFORMED),
    "offsets_reversed": FileFault(_one(begin=8, end=0), _MALFORMED),
    "unknown_dtype": FileFault(_one(dtype="F8"), ("a type that safetensors does not have", "BF16")),
    "lower_case_dtype": FileFault(_one(dtype="f32"), ("got: f32", "one of")),
    "huge_shape": FileFault(_one(shape=[2**40, 2**40]), ("impossible shape", "w")),
    "huge_empty_shape": FileFault(_one(b"", shape=[0, 2**62], end=0), ("impossible shape",)),
    "rank_100": FileFault(_one(shape=[2] + [1] * 99), ("impossible shape",)),
    "range_too_short": FileFault(_one(end=4), ("4 bytes", "8 bytes for F32 [2]")),
    "range_too_long": FileFault(_one(shape=[1]), ("8 bytes", "4 bytes for F32 [1]")),
    "half_a_byte": FileFault(_one(b"0", dtype="F4", shape=[1], end=1), ("1 bytes for F4 [1]",)),
    "name_with_control_characters": FileFault(
        safetensors_bytes({"\x1b[31m\ud800": 7}), (r"\x1b[31m\ud800",)
    ),
    # Ownership of bytes.
    "overlap": FileFault(
        safetensors_bytes({"v": entry(), "w": entry(begin=4, end=12)}, bytes(12)), (_SHARED, "w")
    ),
    "same_range": FileFault(safetensors_bytes({"v": entry(), "w": entry()}, _DATA), (_SHARED,)),
    "hole_before": FileFault(_one(bytes(12), begin=4, end=12), (_UNOWNED, "before w")),
    "hole_between": FileFault(
        safetensors_bytes({"v": entry(), "w": entry(begin=12, end=20)}, bytes(20)),
        (_UNOWNED, "before w"),
    ),
    "empty_tensor_outside": FileFault(_one(b"", shape=[0], begin=4, end=4), (_UNOWNED,)),
    "bytes_after": FileFault(_one() + b"garbage", ("bytes after its last tensor",)),
}


def link_model(directory: Path, source: Path = TINY_MIXTRAL) -> Path:
    """Fills a directory with links to a model's files; replace() puts others in their place."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def replace(path: Path, contents: bytes) -> None:
    """Writes a file where link_model() may have left a link, without following it."""
    path.unlink(missing_ok=True)
    path.write_bytes(contents)


def write_sharded(directory: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Writes shards by file name, and the index that names them all."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        save_file(dict(tensors), directory / shard)
    write_index(directory, {name: shard for shard, ts in shards.items() for name in ts})
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    replace(directory / INDEX_NAME, json.dumps({"weight_map": weight_map}).encode())


def _edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX_NAME).read_bytes())["weight_map"]
        change(weight_map)
        write_index(directory, weight_map)

    return apply


def _cut(directory: Path) -> None:
    replace(directory / FIRST_SHARD, (directory / FIRST_SHARD).read_bytes()[:-100])


@dataclasses.dataclass(frozen=True, slots=True)
class DirectoryFault:
    """A way to damage a copy of tiny-mixtral, and words that its error must hold."""

    damage: Callable[[Path], object]
    words: tuple[str, ...]


DIRECTORY_FAULTS: dict[str, DirectoryFault] = {
    "shard_missing": DirectoryFault(
        lambda directory: (directory / FIRST_SHARD).unlink(),
        ("1 shard of 5 missing", FIRST_SHARD, "download"),
    ),
    "shard_is_lfs_pointer": DirectoryFault(
        lambda directory: replace(directory / FIRST_SHARD, LFS_POINTER),
        (f"{FIRST_SHARD} is a Git LFS pointer", "git lfs pull"),
    ),
    "shard_is_web_page": DirectoryFault(
        lambda directory: replace(directory / FIRST_SHARD, WEB_PAGE),
        (f"{FIRST_SHARD} is a web page",),
    ),
    "shard_truncated": DirectoryFault(_cut, (f"{FIRST_SHARD} is truncated", "7284688 bytes")),
    "index_not_json": DirectoryFault(
        lambda directory: replace(directory / INDEX_NAME, b"{"), (f"{INDEX_NAME} is not JSON",)
    ),
    "index_empty": DirectoryFault(_edit_index(dict.clear), ("no weight_map",)),
    "index_absent": DirectoryFault(
        lambda directory: (directory / INDEX_NAME).unlink(),
        ("neither", INDEX_NAME, "download", FIRST_SHARD),
    ),
    "index_names_other_shard": DirectoryFault(
        _edit_index(
            lambda weights: weights.update({"lm_head.weight": weights["model.norm.weight"]})
        ),
        ("1 tensor not in the shard", "lm_head.weight"),
    ),
    "index_names_absent_tensor": DirectoryFault(
        _edit_index(lambda weights: weights.update({"model.more": FIRST_SHARD})),
        ("1 tensor not in the shard", f"model.more ({FIRST_SHARD})"),
    ),
    "index_leaves_directory": DirectoryFault(
        _edit_index(lambda weights: weights.update({"lm_head.weight": "../x.safetensors"})),
        ("not a plain file name", "../x.safetensors", "trust"),
    ),
}
