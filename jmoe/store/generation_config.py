"""A model's own defaults for generation, from ``generation_config.json``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jmoe.errors import CheckpointError
from jmoe.store.json_files import read_json_object

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_BEAMS = ("num_beams", "num_return_sequences", "length_penalty")


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's authors recommend.

    Attributes:
      options: of sampling and of beams, by name, as GenerationOptions has them.
      stop_token_ids: tokens that end a text.
    """

    options: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, directory: Path, config_json: Mapping[str, Any]) -> "GenerationDefaults":
        """Reads the file if there is one; config.json names the end of text otherwise.

        Raises:
          CheckpointError: the file is not a JSON object, or a value has the wrong type.
        """
        path = directory / "generation_config.json"
        raw = read_json_object(path) if path.exists() else {}
        options = {}
        if raw.get("do_sample"):
            options = {name: raw[name] for name in _SAMPLING if raw.get(name) is not None}
            options.setdefault("temperature", 1.0)
        elif raw.get("repetition_penalty") is not None:
            options = {"repetition_penalty": raw["repetition_penalty"]}
        options |= {name: raw[name] for name in _BEAMS if raw.get(name) is not None}
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(
                    f"generation_config.json: {name} is not a number",
                    where=directory,
                    got=repr(value),
                )
        early_stopping = raw.get("early_stopping")
        if isinstance(early_stopping, bool) or early_stopping == "never":
            options["early_stopping"] = early_stopping
        elif early_stopping is not None:
            raise CheckpointError(
                "generation_config.json: early_stopping is not usable",
                where=directory,
                got=repr(early_stopping),
                expected='true, false or "never"',
            )
        eos = raw.get("eos_token_id", config_json.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(
                "eos_token_id must be a token id or a list of them",
                where=directory,
                got=repr(eos),
            )
        return cls(options, tuple(ids))
