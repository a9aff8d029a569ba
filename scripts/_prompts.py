"""Prompts from the command line, standard input and files."""

import json
import sys
from pathlib import Path
from typing import Any

from jmoe.errors import RequestError


def read_prompts(prompts: list[str], prompt_file: str | None) -> list[Any]:
    """Prompts in the order given: first of --prompt ("-" is stdin), then of --prompt_file.

    A file that ends in .jsonl holds one prompt per line: a string, an object with "prompt",
    or an object with "messages" (or a bare list of messages). Any other file is one prompt,
    taken as it is, to its last newline; so is standard input.

    Raises:
      RequestError: a prompt is empty, a file cannot be read, is not UTF-8, or is not such JSON.
    """
    texts: list[Any] = [_read_stdin() if prompt == "-" else prompt for prompt in prompts]
    if prompt_file is not None:
        texts += _read_file(Path(prompt_file))
    if "" in texts:
        raise RequestError("the prompt is empty", do="give it some text")
    return texts


def as_messages(prompt: Any, system: str | None) -> Any:
    """A text prompt as a conversation of one question; messages stay, behind the system's."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *turns] if system else turns


def _read_file(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(
            "the prompt file cannot be read", where=path, got=error.strerror
        ) from None
    text = _decode(data, path)
    return _parse_lines(text, path) if path.suffix == ".jsonl" else [text]


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            "the prompt is not UTF-8",
            where=where,
            got=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            do="convert it, for example with iconv -t utf-8",
        ) from None


def _parse_lines(text: str, path: Path) -> list[Any]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError("a line is not JSON", where=where, got=error) from None
        if isinstance(value, dict):
            value = value.get("prompt", value.get("messages"))
        is_messages = isinstance(value, list) and value and isinstance(value[0], dict)
        if not (isinstance(value, str) or is_messages):
            raise RequestError(
                "a line is not a prompt",
                where=where,
                expected='a string, {"prompt": "..."} or {"messages": [...]}',
            )
        prompts.append(value)
    if not prompts:
        raise RequestError("the prompt file is empty", where=path)
    return prompts
