"""Small converted stores, written by hand from the description of the format."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.random_weights import random_parameters
from jmoe.quant.formats import DenseFormat
from jmoe.quant.spec import parse_spec
from tests.models.configs import mixtral_json

CONFIG_CHANGES = {"hidden_size": 64, "intermediate_size": 128}
_DTYPE_NAMES = {
    np.dtype(np.uint8): "U8",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
}


def stored_parameters(
    config_json: Mapping[str, Any], quant: str, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random parameters by path, in the dtypes in which a store holds them."""
    spec = parse_spec(quant)
    config = families.config_from_json(config_json, "a test")
    paths = abstract_parameters(config, "bfloat16", spec)
    values = random_parameters(config, "bfloat16", seed, spec)
    parameters = {path: np.asarray(value) for path, value in zip(paths, values, strict=True)}
    dense = {"embed_tokens": spec.embeddings, "lm_head": spec.head}
    for path, value in parameters.items():
        fmt = dense.get(path) or (spec.attention if path.endswith("_proj") else None)
        if isinstance(fmt, DenseFormat):
            parameters[path] = value.astype(fmt.dtype)
    return parameters


def write_store(
    directory: Path, quant: str = "attn4-experts4", *, seed: int = 0, **config_changes: Any
) -> dict[str, np.ndarray]:
    """Writes a store of a small random model; returns its parameters by path, as stored."""
    directory.mkdir(parents=True)
    config_json = mixtral_json(**{**CONFIG_CHANGES, **config_changes})
    (directory / "config.json").write_text(json.dumps(config_json))
    parameters = stored_parameters(config_json, quant, seed)
    shared = {}
    for path, value in parameters.items():
        if path.endswith(".blobs"):
            layer = int(path.split(".")[1])
            write_tensors(
                directory / f"experts-{layer:05}.safetensors", {"blobs": value.view(np.uint8)}
            )
        else:
            shared[path] = value
    write_tensors(directory / "shared.safetensors", shared)
    write_manifest(directory, parse_spec(quant).to_json())
    return parameters


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, alignment: int = 4096, padding: bool = True
) -> None:
    """Writes a safetensors file whose data start at a multiple of this many bytes.

    With padding every tensor starts at a multiple of 64 of it.
    """
    entries, data = {}, b""
    for name, tensor in tensors.items():
        gap = -len(data) % 64 if padding else 0
        if gap:
            span = [len(data), len(data) + gap]
            entries[f"_padding{len(data)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": span}
            data += bytes(gap)
        span = [len(data), len(data) + tensor.nbytes]
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        data += tensor.tobytes()
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % alignment)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_manifest(directory: Path, quant: Mapping[str, str], **changes: Any) -> None:
    """Writes the manifest of what is in the directory; a change to None removes a part."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.iterdir())
        if file.name != "manifest.json"
    }
    manifest = {
        "format": "jmoe-store",
        "format_version": 1,
        "quant": dict(quant),
        "method": "rtn",
        "source": {"name": "random", "kind": "random"},
        "config_sha256": _sha256(directory / "config.json"),
        "files": files,
    } | changes
    text = json.dumps({key: value for key, value in manifest.items() if value is not None})
    (directory / "manifest.json").write_text(text)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
