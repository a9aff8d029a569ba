"""From what the user calls a model to a source of its weights, in whatever form they are."""

import os
from pathlib import Path

from jmoe.errors import RequestError
from jmoe.store import hub, orbax
from jmoe.store.known_models import read_shape, require_weights
from jmoe.store.manifest import is_store, require_complete
from jmoe.store.source import CheckpointSource, RandomSource, WeightSource


def open_source(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    random_weights: bool = False,
    num_layers: int | None = None,
    seed: int = 0,
) -> WeightSource:
    """Opens what the user calls a model.

    Args:
      path_or_id: a directory in Hugging Face format, an Orbax checkpoint, or a hub id. With
        random_weights a directory with a config.json, or the name of a known model.
      revision: branch, tag or commit of a hub id.
      random_weights: take only the shape, and fill it.
      num_layers: with random_weights, instead of the configuration's number of layers.
      seed: of the random weights.

    Raises:
      RequestError: options that contradict each other, or a store instead of a source.
      ConfigError: the configuration is unreadable or not supported.
      CheckpointError: no such model, or it is damaged.
    """
    name = os.fspath(path_or_id)
    if random_weights:
        if revision is not None:
            raise RequestError("random weights have no revision", do="leave --revision out")
        config_json = read_shape(name, num_layers)
        return RandomSource(config_json, f"{Path(name).stem} with random weights", seed)
    if num_layers is not None:
        raise RequestError(
            "another number of layers is for random weights", do="add --random_weights"
        )
    require_weights(name)
    directory = hub.resolve(path_or_id, revision=revision)
    if is_store(directory):
        require_complete(directory)
        raise RequestError(
            "this is a converted store already",
            where=directory,
            do="name the checkpoint that it was made of",
        )
    is_id = not os.path.exists(name)
    return open_directory(directory, name if is_id else None)


def open_directory(directory: Path, name: str | None = None) -> WeightSource:
    """Opens a checkpoint in Hugging Face format, or one that Orbax wrote.

    Raises:
      ConfigError: the configuration is unreadable or not supported.
      CheckpointError: files are missing, damaged, or of another model.
    """
    if orbax.is_checkpoint(directory):
        return orbax.OrbaxSource(directory, name)
    return CheckpointSource(directory, name)
