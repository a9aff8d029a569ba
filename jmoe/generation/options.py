"""What a caller may ask of a generation, checked before any work starts."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmoe.errors import RequestError

# Below this, dividing logits by the temperature leaves only the largest: it is greedy.
MIN_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to choose tokens and when to stop. Raises RequestError if a value is unusable."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy: always the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # then the fewest whose probabilities reach p; 1 keeps all
    min_p: float = 0.0  # then those at least min_p times as probable as the best; 0 keeps all
    repetition_penalty: float = 1.0  # divides the scores of tokens seen already; 1 is off
    seed: int = 0  # of the random numbers; the same seed gives the same text
    stop: tuple[str, ...] = ()  # text that ends a sequence and is not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end a sequence

    def __post_init__(self):
        _check_integer("max_new_tokens", self.max_new_tokens, minimum=1)
        _check_integer("top_k", self.top_k, minimum=0)
        _check_integer("seed", self.seed, minimum=0, maximum=2**63 - 1)
        _check_number("temperature", self.temperature, "at least 0", lambda x: x >= 0)
        _check_number("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1)
        _check_number(
            "repetition_penalty", self.repetition_penalty, "greater than 0", lambda x: x > 0
        )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("a stop string must not be empty", got=list(self.stop))
        for token_id in self.stop_token_ids:
            _check_integer("a stop token id", token_id, minimum=0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def make_options(
    defaults: Mapping[str, Any], requested: Mapping[str, Any], stop_token_ids: Sequence[int]
) -> GenerationOptions:
    """Puts a request together with a model's own defaults.

    Args:
      defaults: sampling options of the model's generation_config.json.
      requested: options of the caller; None means not given.
      stop_token_ids: the model's end-of-text tokens, used unless the caller names others.

    Raises:
      RequestError: an unknown option, or an unusable value.
    """
    known = {field.name for field in dataclasses.fields(GenerationOptions)}
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise RequestError(
            f"unknown generation option {unknown[0]!r}", expected=", ".join(sorted(known))
        )
    given = {name: value for name, value in requested.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    # Asking to truncate the distribution is asking to sample from it.
    if "temperature" not in given and given.keys() & {"top_k", "top_p", "min_p"}:
        given["temperature"] = defaults.get("temperature") or 1.0
    merged = {"stop_token_ids": tuple(stop_token_ids), **defaults, **given}
    return GenerationOptions(**merged)


def check_options(**requested: Any) -> None:
    """Raises RequestError if options are unusable with every model; needs no model."""
    make_options({}, requested, ())


def _check_integer(name: str, value: Any, *, minimum: int, maximum: int = 2**31 - 1) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not minimum <= value <= maximum:
        raise RequestError(
            f"{name} is not usable",
            got=repr(value),
            expected=f"a whole number from {minimum} to {maximum}",
        )


def _check_number(name: str, value: Any, expected: str, accepts: Callable[[float], bool]) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not accepts(value):
        raise RequestError(
            f"{name} is not usable", got=repr(value), expected=f"a number {expected}"
        )
