"""What a model looks like, of whatever the user names: from small files only."""

import os
from pathlib import Path
from typing import NamedTuple

from jmoe.config import ModelConfig
from jmoe.errors import ConfigError, RequestError
from jmoe.models import families
from jmoe.store import hub
from jmoe.store.json_files import read_config_json, read_json_object
from jmoe.store.known_models import is_known_model, read_known_model, with_num_layers
from jmoe.store.manifest import Manifest, is_store


class ModelShape(NamedTuple):
    """A model's configuration, and its manifest if it is a converted store."""

    config: ModelConfig
    manifest: Manifest | None


def read_model_shape(
    model: str | os.PathLike[str], *, num_layers: int | None = None, revision: str | None = None
) -> ModelShape:
    """Reads config.json, of a store manifest.json too, and nothing else.

    Args:
      model: the name of a known model (``known_models``); a directory; a config.json by itself;
        or a hub id, of which config.json is downloaded.
      num_layers: instead of the model's own number of layers.
      revision: branch, tag or commit of a hub id.

    Raises:
      CheckpointError: there is no such model.
      ConfigError: no model of this name is known; or its configuration is unreadable or not
        supported.
      RequestError: another number of layers than a store has.
    """
    manifest, where = None, model
    name = os.fspath(model)
    if is_known_model(name) or not ("/" in name or os.path.exists(name)):
        config_json = read_known_model(name)
    elif os.path.isfile(model):
        config_json = read_json_object(Path(model), ConfigError)
    else:
        directory = where = hub.resolve(model, revision=revision, config_only=True)
        config_json = read_config_json(directory)
        if is_store(directory):
            manifest = Manifest.read(directory)
    if num_layers is not None:
        if manifest is not None:
            raise RequestError(
                "a converted store has the number of layers that it has",
                where=where,
                got=num_layers,
                do="leave the number of layers out",
            )
        config_json = with_num_layers(config_json, num_layers)
    return ModelShape(families.config_from_json(config_json, where), manifest)
