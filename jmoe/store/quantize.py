"""From the matrices of a source to the arrays of a quantized model, in little memory.

While one matrix is quantized the next one is read. Quantization goes in pieces of rows that stay
in the processor's cache; rows do not depend on each other, so the pieces do not show.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from jmoe.errors import CheckpointError
from jmoe.models.decoder import abstract_parameters
from jmoe.models.weights import component_format
from jmoe.quant.formats import DenseFormat, Format, QuantFormat
from jmoe.quant.layout import MATRICES, ExpertLayout, aligned_as, aligned_empty
from jmoe.quant.quant_array import PART_NAMES
from jmoe.quant.solver import Method, quantize
from jmoe.quant.spec import QuantSpec
from jmoe.store.finite import is_finite
from jmoe.store.reading import OnBytes, ignore_bytes
from jmoe.store.source import WeightSource

_PIECE_WEIGHTS = 1 << 20
# Each holds a piece and what is made of it.
_MAX_THREADS = 32


class MatrixKey(NamedTuple):
    """What WeightSource.read takes."""

    path: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.path if self.expert is None else f"{self.path}, expert {self.expert}"


def quantize_matrix(
    w: np.ndarray, fmt: QuantFormat, method: Method, *, where: str
) -> dict[str, np.ndarray]:
    """Quantizes one matrix [N, K].

    Args:
      w: weights of any float type.
      fmt: the format; its groups divide the rows.
      method: how.
      where: what to call the matrix in errors.

    Returns:
      The arrays of a QuantArray, by name, aligned.

    Raises:
      CheckpointError: a weight is NaN or infinite.
    """
    parts = {
        name: aligned_empty(part.shape, part.dtype) for name, part in fmt.parts(*w.shape).items()
    }
    store_matrix(w, fmt, method, parts, where=where)
    return parts


def store_matrix(
    w: np.ndarray, fmt: Format, method: Method, parts: Mapping[str, np.ndarray], *, where: str
) -> None:
    """Writes a matrix [N, K] in a format into the arrays of ``fmt.parts(N, K)``.

    Raises:
      CheckpointError: a weight is NaN or infinite, or too large for a dense format.
    """
    if isinstance(fmt, DenseFormat):
        parts["values"][...] = w
        finite = is_finite(parts["values"])
    else:
        finite = _quantize_into(w, fmt, method, parts)
    _require_finite(finite, where)


def _quantize_into(
    w: np.ndarray, fmt: QuantFormat, method: Method, parts: Mapping[str, np.ndarray]
) -> bool:
    num_rows = _piece_rows(*w.shape)

    def quantize_piece(first: int) -> bool:
        piece = jax.device_put(w[first : first + num_rows])
        array, finite = quantize(piece, fmt, method)
        for name, part in array.parts().items():
            parts[name][first : first + num_rows] = part
        return bool(finite)

    # The first one alone: it compiles for all others.
    firsts = range(0, len(w), num_rows)
    finite = quantize_piece(firsts[0])
    with ThreadPoolExecutor(_num_threads(), "quantize") as pool:
        return all(pool.map(quantize_piece, firsts[1:])) and finite


def _piece_rows(num_rows: int, num_columns: int) -> int:
    """Rows to quantize at a time: all pieces are of one size, if there is a suitable one."""
    limit = min(num_rows, max(1, _PIECE_WEIGHTS // num_columns))
    sizes = range(limit, limit // 2, -1)
    return next((size for size in sizes if num_rows % size == 0), limit)


def _num_threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


def _require_finite(finite: bool, where: str) -> None:
    if not finite:
        raise CheckpointError(
            f"NaN or infinity in {where}",
            do="download the weights again; check.py --deep finds all such tensors",
        )


def read_ahead(
    source: WeightSource, keys: Iterable[MatrixKey], on_bytes: OnBytes = ignore_bytes
) -> Iterator[tuple[MatrixKey, np.ndarray]]:
    """Reads matrices in order, one ahead of the caller. Errors come when it is their turn."""
    with ThreadPoolExecutor(1, "read") as reader:
        pending = None
        for key in keys:
            following = key, reader.submit(source.read, *key)
            if pending is not None:
                yield _await(*pending, on_bytes)
            pending = following
        if pending is not None:
            yield _await(*pending, on_bytes)


def _await(key, future, on_bytes: OnBytes) -> tuple[MatrixKey, np.ndarray]:
    array = future.result()
    on_bytes(array.nbytes)
    return key, array


def layer_blobs(
    source: WeightSource,
    layer: int,
    layout: ExpertLayout,
    method: Method,
    blobs: Iterable[np.ndarray] | None = None,
    on_bytes: OnBytes = ignore_bytes,
) -> Iterator[np.ndarray]:
    """Makes the blobs of a layer's experts, in order.

    Args:
      source: of the weights.
      layer: which layer.
      layout: of a blob.
      method: how to quantize.
      blobs: where to: uint8 [layout.num_bytes], aligned to 64. None allocates each one.
      on_bytes: told how many bytes were read.

    Raises:
      CheckpointError: weights that are not finite or cannot be read.
    """
    num_experts = source.config.router.num_experts
    if blobs is None:
        blobs = (aligned_empty((layout.num_bytes,), np.uint8) for _ in range(num_experts))
    keys = (
        MatrixKey(f"layers.{layer}.experts.{matrix}", expert)
        for expert in range(num_experts)
        for matrix in MATRICES
    )
    matrices = read_ahead(source, keys, on_bytes)
    for blob in blobs:
        blob[:] = 0  # also between the parts
        for matrix, parts in layout.host_views(blob).items():
            key, w = next(matrices)
            store_matrix(w, layout.format(matrix), method, parts, where=str(key))
        yield blob


def matrix_paths(source: WeightSource, quant: QuantSpec) -> list[str]:
    """Paths of all parameters outside of the experts, in the order of abstract_parameters."""
    paths = abstract_parameters(source.config, "bfloat16", quant)
    split = (path.rpartition(".") for path in paths if not path.endswith(".blobs"))
    bases = (base if part in PART_NAMES else f"{base}{dot}{part}" for base, dot, part in split)
    return list(dict.fromkeys(bases))


def shared_shapes(source: WeightSource, quant: QuantSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of what shared_parameters yields, in its order."""
    plain = abstract_parameters(source.config)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in matrix_paths(source, quant):
        fmt = component_format(path, quant)
        if isinstance(fmt, QuantFormat):
            for name, part in fmt.parts(*plain[path].shape).items():
                shapes[f"{path}.{name}"] = part.shape, part.dtype
        else:  # routers and norms are small: reading them tells their type
            dtype = source.read(path).dtype.name if fmt is None else fmt.dtype
            shapes[path] = plain[path].shape, dtype
    return shapes


def shared_parameters(
    source: WeightSource, quant: QuantSpec, method: Method, on_bytes: OnBytes = ignore_bytes
) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter but the blobs, by its path in abstract_parameters(config, dtype, quant).

    Those that are not quantized keep the type of the source, dense ones have their format's.

    Raises:
      CheckpointError: weights that are not finite or cannot be read.
    """
    keys = map(MatrixKey, matrix_paths(source, quant))
    for key, w in read_ahead(source, keys, on_bytes):
        fmt = component_format(key.path, quant)
        if isinstance(fmt, QuantFormat):
            for name, part in quantize_matrix(w, fmt, method, where=str(key)).items():
                yield f"{key.path}.{name}", part
            continue
        values = w if fmt is None else aligned_as(w, fmt.dtype)
        _require_finite(is_finite(values), str(key))
        yield key.path, values


def quantized_parameters(
    source: WeightSource,
    dtype: str,
    quant: QuantSpec,
    method: Method,
    on_bytes: OnBytes = ignore_bytes,
) -> Iterator[np.ndarray]:
    """Quantizes a model as it is loaded: in the order of abstract_parameters(config, dtype, quant).

    Args:
      source: of the weights.
      dtype: of parameters that are not quantized, dense formats included.
      quant: formats of the others.
      method: how.
      on_bytes: told how many bytes were read.

    Raises:
      CheckpointError: weights that are not finite or cannot be read.
    """
    config = source.config
    layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
    shared = shared_parameters(source, quant, method, on_bytes)
    made: dict[str, np.ndarray] = {}  # parts of a matrix whose turn has not come
    for path, shape in abstract_parameters(config, dtype, quant).items():
        if path.endswith(".blobs"):
            blobs = aligned_empty((config.router.num_experts, layout.num_bytes), np.uint8)
            layer = int(path.split(".")[1])
            for _ in layer_blobs(source, layer, layout, method, blobs, on_bytes):
                pass
            yield blobs.view(layout.dtype)
            continue
        while path not in made:
            name, array = next(shared)
            made[name] = array
        yield aligned_as(made.pop(path), shape.dtype)
