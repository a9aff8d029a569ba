"""Random weights of any shape and format, for tests, benchmarks and trying out a shape.

Scaled so that activations stay of order one. Quantized ones are random codes: what a real
model of this shape costs to move and to compute, without quantizing anything.
"""

import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.models.decoder import abstract_parameters
from jmoe.models.weights import component_format
from jmoe.quant.formats import DenseFormat, Format, QuantFormat
from jmoe.quant.layout import ExpertLayout, aligned_empty
from jmoe.quant.quant_array import PART_NAMES
from jmoe.quant.spec import QuantSpec

# Numbers that fill_blobs repeats: not as many as any row is long.
_RUN = (1 << 20) - 1


def random_parameters(
    config: ModelConfig, dtype: str, seed: int = 0, quant: QuantSpec | None = None
) -> tuple[jax.Array | np.ndarray, ...]:
    """Parameters in the order of ``decoder.abstract_parameters``."""
    return tuple(iterate_random_parameters(config, dtype, seed, quant))


def iterate_random_parameters(
    config: ModelConfig, dtype: str, seed: int = 0, quant: QuantSpec | None = None
) -> Iterator[jax.Array | np.ndarray]:
    """The same, one after another. A parameter depends on seed, path and shape only."""
    shapes = abstract_parameters(config, dtype, quant)
    for path, shape in shapes.items():
        name, _, part = path.rpartition(".")
        path_seed = zlib.crc32(path.encode(), seed)
        if part == "scale":  # of a norm
            yield jnp.ones(shape.shape, shape.dtype)
        elif part == "blobs":
            assert quant is not None
            layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
            yield random_blobs(layout, shape.shape[0], path_seed)
        elif quant is not None and part in PART_NAMES:
            fmt = component_format(name, quant)
            assert isinstance(fmt, QuantFormat)
            num_columns = shapes[f"{name}.codes"].shape[-1] * 8 // fmt.bits
            std = _std(name, num_columns)
            yield _random_part(part, shape.shape, shape.dtype, fmt, std, path_seed)
        else:
            std = jnp.asarray(_std(path, shape.shape[-1]), shape.dtype)
            yield jax.random.normal(jax.random.key(path_seed), shape.shape, shape.dtype) * std


def random_blobs(layout: ExpertLayout, num_experts: int, seed: int) -> np.ndarray:
    """Blobs of random experts: [num_experts, num_items] of the layout's dtype."""
    blobs = aligned_empty((num_experts, layout.num_bytes), np.uint8)
    for e, blob in enumerate(blobs):
        blob[:] = 0  # also between the parts
        for matrix, parts in layout.host_views(blob).items():
            fmt = layout.format(matrix)
            std = layout.matrix_shape(matrix)[1] ** -0.5
            for name, part in parts.items():
                part_seed = zlib.crc32(f"{e}.{matrix}.{name}".encode(), seed)
                part[...] = _random_part(name, part.shape, part.dtype, fmt, std, part_seed)
    return blobs.view(layout.dtype)


def fill_blobs(layout: ExpertLayout, blobs: np.ndarray) -> None:
    """Fills memory with experts, for measuring: all alike, of few numbers over and over.

    Args:
      layout: of each.
      blobs: uint8 [num_experts, layout.num_bytes], aligned; or items of the layout's dtype.
    """
    rng = np.random.default_rng(0)
    blobs = blobs.view(np.uint8)
    first = blobs[0]
    first[:] = 0  # also between the parts
    for matrix, parts in layout.host_views(first).items():
        fmt = layout.format(matrix)
        std = layout.matrix_shape(matrix)[1] ** -0.5
        for name, part in parts.items():
            if name == "codes":
                _repeat(rng.integers(0, 256, _RUN, np.uint8), part)
            elif isinstance(fmt, DenseFormat):
                _repeat(rng.standard_normal(_RUN, np.float32) * std, part)
            else:
                part[...] = _random_part(name, part.shape, part.dtype, fmt, std, 0)
    blobs[1:] = first


def _repeat(run: np.ndarray, out: np.ndarray) -> None:
    run, flat = run.astype(out.dtype), out.reshape(-1)
    for start in range(0, flat.size, run.size):
        piece = flat[start : start + run.size]
        piece[:] = run[: piece.size]


def _random_part(
    name: str, shape: tuple[int, ...], dtype: np.dtype, fmt: Format, std: float, seed: int
) -> np.ndarray:
    """One array of a matrix whose weights are to have this standard deviation."""
    if isinstance(fmt, DenseFormat):
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return (values * std).astype(dtype)
    # Codes are uniform; every group has the same scale, and its zero point in the middle.
    scale = std * (12 / ((1 << 2 * fmt.bits) - 1)) ** 0.5
    middle = fmt.max_code / 2
    match name:
        case "codes":
            return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        case "nested":
            steps = np.array([scale / 255, 0, middle / 255, 0], np.float32)
            return np.broadcast_to(steps[: shape[-1]], shape).copy()
        case _ if fmt.nested:
            return np.full(shape, 255, dtype)
        case "scales":
            return np.full(shape, scale, dtype)
        case _:
            return np.full(shape, middle, dtype)


def _std(path: str, num_columns: int) -> float:
    return 1.0 if path == "embed_tokens" else num_columns**-0.5
