"""Small JSON files: reading, each failure one sentence, and writing, a line for each field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jmoe.errors import CheckpointError, ConfigError, JmoeError


def read_json_object(
    path: Path, error: type[JmoeError] = CheckpointError, *, missing_do: str | None = None
) -> dict:
    """Reads a JSON file whose top level is an object.

    Args:
      path: the file.
      error: type of the error to raise.
      missing_do: the remedy to name if the file does not exist.

    Raises:
      error: the file is missing, unreadable, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path.name} is missing", where=path.parent, do=missing_do) from None
    except OSError as e:
        raise error(f"{path.name} cannot be read", where=path.parent, got=e.strerror) from None
    except (ValueError, RecursionError) as e:  # ValueError: also not UTF-8, or a huge number
        raise error(
            f"{path.name} is not JSON", where=path.parent, got=e, do="download the file again"
        ) from None
    if not isinstance(value, dict):
        raise error(
            f"{path.name} must hold a JSON object",
            where=path.parent,
            got=type(value).__name__,
        )
    return value


def read_config_json(directory: Path) -> dict:
    """Reads ``config.json`` of a model directory (ConfigError)."""
    return read_json_object(
        directory / "config.json",
        ConfigError,
        missing_do="name a directory in Hugging Face format",
    )


def json_lines(value: Mapping[str, Any]) -> str:
    """An object as the text of a file, a line for each field."""
    fields = [f" {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    return "\n".join(["{", ",\n".join(fields), "}", ""])
