"""Shapes of known models: their config.json, without weights.

The files lie in configs/models: beside the package in a source checkout, inside it once it is
installed.
"""

import os
import re
from pathlib import Path
from typing import Any

from jmoe.errors import ConfigError, RequestError
from jmoe.store.json_files import read_config_json, read_json_object

_PACKAGE = Path(__file__).parents[1]
_DIRECTORIES = (
    _PACKAGE / "configs" / "models",
    _PACKAGE.parent / "configs" / "models",
)
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def known_model_names() -> tuple[str, ...]:
    """Names such as mixtral-8x7b, in alphabetical order."""
    return tuple(sorted(path.stem for path in _directory().glob("*.json")))


def is_known_model(name: object) -> bool:
    return isinstance(name, str) and name in known_model_names()


def read_known_model(name: str, num_layers: int | None = None) -> dict[str, Any]:
    """The config.json of a known model.

    Args:
      name: one of ``known_model_names``.
      num_layers: instead of the model's own number of layers.

    Raises:
      ConfigError: no model of this name is known, or it cannot have so many layers.
    """
    if not _NAME.fullmatch(name) or not is_known_model(name):
        raise ConfigError(
            "no model of this name is known",
            got=repr(name[:100]),
            expected=f"one of {', '.join(known_model_names())}",
        )
    raw = read_json_object(_directory() / f"{name}.json", ConfigError)
    return raw if num_layers is None else with_num_layers(raw, num_layers)


def read_shape(model: str | Path, num_layers: int | None = None) -> dict[str, Any]:
    """The config.json of a known model, of a model directory, or a file of that format.

    Raises:
      ConfigError: there is no such thing, it is not usable, or cannot have so many layers.
    """
    path = Path(model)
    if not os.path.exists(model):  # unlike a Path, "" does not
        return read_known_model(str(model), num_layers)
    raw = read_config_json(path) if path.is_dir() else read_json_object(path, ConfigError)
    return raw if num_layers is None else with_num_layers(raw, num_layers)


def require_weights(model: str | Path) -> None:
    """Raises RequestError if this is the name of a known shape and not of a model."""
    if is_known_model(str(model)) and not Path(model).exists():
        raise RequestError(
            f"{model} is the shape of a known model, without weights",
            do="name a directory or a hub id, or add --random_weights",
        )


def with_num_layers(config_json: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The same configuration with another number of layers (ConfigError if that is not usable)."""
    if num_layers < 1:
        raise ConfigError("a model has at least one layer", got=f"num_layers={num_layers}")
    return config_json | {"num_hidden_layers": num_layers}


def _directory() -> Path:
    for directory in _DIRECTORIES:
        if directory.is_dir():
            return directory
    return _DIRECTORIES[0]
