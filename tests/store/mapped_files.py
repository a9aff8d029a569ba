"""Files whose pages are mapped, and not in memory."""

import os
from pathlib import Path

import numpy as np
import pytest

from jmoe.store import page_cache
from jmoe.store.host_memory import FileRange, map_file


def write_layers(
    directory: Path, num_layers: int, num_experts: int, blob_bytes: int, offset: int = 4096
) -> list[FileRange]:
    """Files of random experts, on the disk and not only in memory."""
    files = []
    for layer in range(num_layers):
        contents = np.random.default_rng(layer).integers(
            0, 256, offset + num_experts * blob_bytes, np.uint8
        )
        path = directory / f"layer{layer}"
        path.write_bytes(contents.tobytes())
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files.append(FileRange(path, offset, num_experts * blob_bytes))
    return files


def map_cold(files: list[FileRange], num_experts: int) -> list[np.ndarray]:
    """Maps them, with nothing in memory; skips the test where files always are (tmpfs)."""
    layers = [map_file(file).reshape(num_experts, -1) for file in files]
    for layer, file in zip(layers, files, strict=True):
        page_cache.drop(layer, file.path)
        # Half of it: others may be reading here.
        if page_cache.missing_bytes(layer) < layer.nbytes / 2:
            pytest.skip("files are always in memory here")
    return layers
