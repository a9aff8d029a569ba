"""From a checkpoint to the decoder's parameters, one host array after another."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.models import families
from jmoe.quant.layout import aligned_empty
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.reading import OnBytes, ignore_bytes


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compares a checkpoint's names, shapes and dtypes with what the model needs.

    Raises:
      CheckpointError: listing everything missing, unknown or misshaped at once.
    """
    expected, optional = families.tensor_shapes(config)
    checkpoint.check(
        expected,
        optional=optional,
        ignored=lambda name: families.is_ignored_tensor(config, name),
    )


def read_parameters(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: str,
    on_bytes: OnBytes = ignore_bytes,
) -> Iterator[np.ndarray]:
    """Reads the parameters in the order of ``decoder.abstract_parameters``.

    Tensors are read straight into the arrays that are yielded, which are aligned so that
    the CPU backend takes them over without a copy: besides those arrays, no more than one
    tensor is in memory at any time.

    Args:
      checkpoint: checked with ``check_tensors``.
      config: the model.
      dtype: "float32" or "bfloat16"; other dtypes are converted.
      on_bytes: called with the size of every piece of a parameter, once it is read.

    Raises:
      CheckpointError: a file changed or became unreadable since it was opened.
    """
    for source in families.parameter_sources(config).values():
        array = aligned_empty(source.shape, jnp.dtype(dtype))
        pieces = list(array) if source.stacked else [array]
        for piece, name in zip(pieces, source.tensors, strict=True):
            checkpoint.read_into(name, piece)
            on_bytes(piece.nbytes)
        yield array
