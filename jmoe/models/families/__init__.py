"""Model families: what each one calls its settings and its tensors.

A family is a module with ``read_config`` (config.json to ModelConfig), ``TENSOR_NAMES``
(a table from parameters to checkpoint tensors) and ``IGNORED_TENSORS`` (a pattern). It
holds no arithmetic. To add one, write that module and enter it in FAMILIES.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jmoe.config import ModelConfig
from jmoe.errors import ConfigError
from jmoe.models.decoder import abstract_parameters
from jmoe.models.families import mixtral
from jmoe.models.families.fields import ConfigFields

FAMILIES: Mapping[str, ModuleType] = {"mixtral": mixtral}


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterSource:
    """Where one parameter of the decoder comes from.

    Attributes:
      shape: shape of the parameter.
      tensors: names of checkpoint tensors. One, of the parameter's shape; or as many as the
        parameter's first dimension, which are stacked along it.
      stacked: whether they are stacked.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    stacked: bool


def config_from_json(raw: Mapping[str, Any], where: object) -> ModelConfig:
    """Translates the contents of a Hugging Face ``config.json``.

    Args:
      raw: the parsed JSON object.
      where: the directory or file it came from, for error messages.

    Raises:
      ConfigError: an unknown model_type; a setting missing, of the wrong type, or
        contradictory; or one that jmoe does not know and that may change results.
    """
    fields = ConfigFields(raw, where)
    model_type = fields.choice("model_type", tuple(FAMILIES))
    try:
        config = FAMILIES[model_type].read_config(fields)
    except ConfigError as error:
        if error.where is not None:
            raise
        raise ConfigError(
            error.what, where=where, got=error.got, expected=error.expected, do=error.do
        ) from None
    fields.refuse_unread()
    return config


def parameter_sources(config: ModelConfig) -> dict[str, ParameterSource]:
    """Which checkpoint tensors fill each parameter, by dotted parameter path."""
    names = FAMILIES[config.model_type].TENSOR_NAMES
    sources = {}
    for path, parameter in abstract_parameters(config).items():
        layer = next((part for part in path.split(".") if part.isdigit()), "")
        template = names[path.replace(f".{layer}.", ".{layer}.", 1) if layer else path]
        stacked = "{expert}" in template
        experts = range(parameter.shape[0]) if stacked else range(1)
        sources[path] = ParameterSource(
            shape=parameter.shape,
            tensors=tuple(template.format(layer=layer, expert=expert) for expert in experts),
            stacked=stacked,
        )
    return sources


def tensor_shapes(
    config: ModelConfig,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that a checkpoint must hold, and of those that it may."""
    expected = {
        name: source.shape[1:] if source.stacked else source.shape
        for source in parameter_sources(config).values()
        for name in source.tensors
    }
    optional = {}
    if config.tie_word_embeddings:
        # Some checkpoints store the tied head a second time.
        name = FAMILIES[config.model_type].TENSOR_NAMES["lm_head"]
        optional[name] = (config.vocab_size, config.hidden_size)
    return expected, optional


def is_ignored_tensor(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint tensor of this name may be there and is not needed."""
    return re.fullmatch(FAMILIES[config.model_type].IGNORED_TENSORS, name) is not None
