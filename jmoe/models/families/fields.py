"""Typed reading of a ``config.json``, which remembers what was asked for.

What nobody asked for is either known to leave results alone or refused by name: a setting
that is silently dropped is a silently wrong model.
"""

import math
from collections.abc import Mapping
from typing import Any

from jmoe.errors import ConfigError

_REQUIRED: Any = object()

# Settings of transformers that concern training, other outputs, or how weights were stored.
_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
    }
)


class ConfigFields:
    """The settings of one JSON object, by name and type.

    Every reader method raises ConfigError if the value is absent (and no default is given),
    of another type, or outside its range. An explicit ``null`` counts as absent.
    """

    def __init__(self, raw: Mapping[str, Any], where: object, prefix: str = ""):
        self._raw = raw
        self._prefix = prefix
        self._read: set[str] = set()
        self.where = where

    def name(self, key: str) -> str:
        return self._prefix + key

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(
                f"config.json has no {self.name(key)}",
                where=self.where,
                do="download config.json again",
            )
        return default

    def _wrong(self, key: str, value: object, expected: str) -> ConfigError:
        return ConfigError(
            f"config.json: {self.name(key)} is not usable",
            where=self.where,
            got=repr(value),
            expected=expected,
        )

    def integer(self, key: str, default: Any = _REQUIRED, *, maximum: int = 2**31 - 1) -> Any:
        """A whole number from 1 to a maximum (or the default)."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self._wrong(key, value, f"a whole number from 1 to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive finite number, as a float (or the default)."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a positive number")
        if not (value > 0 and math.isfinite(value)):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, supported: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        """One of the strings that the decoder has a part for (or the default)."""
        value = self._get(key, default)
        if value is not default and value not in supported:
            raise ConfigError(
                f"config.json: {self.name(key)}={value!r} is not supported",
                where=self.where,
                expected=" or ".join(supported),
            )
        return value

    def sub_object(self, key: str) -> "ConfigFields | None":
        """The settings of a nested object, or None if there is none."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return ConfigFields(value, self.where, prefix=f"{self.name(key)}.")

    def refuse_unread(self) -> None:
        """Raises ConfigError naming every setting that was not read and may change results.

        Settings that are off (null, false, empty) or known to have no effect pass.
        """
        unread = {
            self.name(key): value
            for key, value in self._raw.items()
            if key not in self._read
            and key not in _WITHOUT_EFFECT
            and not key.startswith(("_", "unsloth_"))
            and value not in (None, False, "", [], {})
        }
        if not unread:
            return
        listed = ", ".join(f"{key}={value!r:.60}" for key, value in list(unread.items())[:5])
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        if "quantization_config" in unread:
            do = "use the unquantized checkpoint of this model"
        else:
            do = "if a setting does not matter for inference, remove it from config.json"
        raise ConfigError(
            f"config.json has settings that jmoe does not know and that may change results: "
            f"{listed}{more}",
            where=self.where,
            do=do,
        )
