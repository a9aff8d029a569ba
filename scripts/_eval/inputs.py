"""The text to score, and the model to compare with."""

from pathlib import Path
from typing import Any

import jmoe
from jmoe.errors import RequestError
from jmoe.loading import EMBEDDED_MODEL
from jmoe.store.manifest import is_store

EMBEDDED_TEXT = EMBEDDED_MODEL / "eval.txt"


def read_text(path: str | None, model: str | None) -> str:
    """The text of --text, or the held-out text of the embedded model.

    Raises:
      RequestError: neither applies, or the file cannot be read, is empty or is not UTF-8.
    """
    if path is None and model is not None:
        raise RequestError(
            "there is no text to score",
            do="name a file with --text, such as the raw test set of WikiText-2",
        )
    file = EMBEDDED_TEXT if path is None else Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError("the text cannot be read", where=file, got=error.strerror) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            "the text is not UTF-8",
            where=file,
            got=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            do="convert it, for example with iconv -t utf-8",
        ) from None
    if not text:
        raise RequestError("the text is empty", where=file)
    return text


def choose_reference(
    requested: str | None, model: str | None, loading: dict[str, Any]
) -> tuple[str | None, str] | None:
    """Which model to compare with, and why; None for no comparison.

    Args:
      requested: the value of --reference.
      model: the value of --model; None is the embedded model, in the result too.
      loading: further arguments of ``jmoe.load``.
    """
    if requested is not None:
        return None if requested == "none" else (requested, "as asked for")
    if loading["quant"] is None or loading["random_weights"]:
        return None
    if model is not None and is_store(Path(model)):
        return None
    return model, "the same model, unquantized"


def load_reference(name: str | None, llm: "jmoe.LLM", text: str) -> "jmoe.LLM":
    """Loads the reference in the dtype of the model.

    Raises:
      RequestError: its tokens are not those of the model.
    """
    reference = jmoe.load(name, dtype=llm.engine.dtype, progress=True)
    same = llm.config.vocab_size == reference.config.vocab_size
    if not same or llm.tokenizer.encode(text) != reference.tokenizer.encode(text):
        raise RequestError(
            "the reference has other tokens than the model",
            where=reference.name,
            got=f"a vocabulary of {reference.config.vocab_size}",
            expected=f"the {llm.config.vocab_size} tokens of {llm.name}",
            do="compare with a model of the same family, or with --reference=none",
        )
    return reference
