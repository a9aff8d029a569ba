"""What a caller may ask of a generation, checked before any work starts."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jmoe.errors import RequestError

# Below this, dividing logits by the temperature leaves only the largest: it is greedy.
MIN_TEMPERATURE = 1e-5
# Beyond this the longest sequences' scores would leave the range of numbers.
MAX_LENGTH_PENALTY = 10.0

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_BEAMS = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping")


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
    num_beams: int = 1  # sequences that are followed for every prompt (generation/beams.py)
    num_return_sequences: int = 1  # of these, the best when they have ended
    length_penalty: float = 1.0  # scores are divided by length ** this: above 0 favours long ones
    early_stopping: bool | Literal["never"] = False  # when a search is over: beams.py

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
        self._check_beams()

    def _check_beams(self) -> None:
        _check_integer("num_beams", self.num_beams, minimum=1)
        _check_integer("num_return_sequences", self.num_return_sequences, minimum=1)
        limit = MAX_LENGTH_PENALTY
        _check_number(
            "length_penalty",
            self.length_penalty,
            f"in [{-limit}, {limit}]",
            lambda x: abs(x) <= limit,
        )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                "early_stopping is not usable",
                got=repr(self.early_stopping),
                expected='True, False or "never"',
            )
        if self.num_return_sequences > self.num_beams:
            raise RequestError(
                "more sequences are to be returned than there are beams",
                got=f"num_return_sequences={self.num_return_sequences}, num_beams={self.num_beams}",
                do="raise num_beams; or, for several samples, repeat the prompt",
            )
        if self.num_beams == 1:
            for name, off in (("length_penalty", 1.0), ("early_stopping", False)):
                if (value := getattr(self, name)) != off:
                    raise RequestError(
                        f"{name} is for beams, and there is one sequence only",
                        got=f"{name}={value!r}, num_beams=1",
                        do=f"set num_beams to 2 or more, or leave {name} out",
                    )
        elif not self.is_greedy:
            raise RequestError(
                "beams take the most probable tokens, and do not sample",
                got=f"num_beams={self.num_beams}, temperature={self.temperature}",
                do="leave out temperature, top_k, top_p and min_p, or num_beams",
            )
        elif self.stop:
            raise RequestError(
                "stop strings do not go with beams, which end by tokens",
                got=f"num_beams={self.num_beams}, stop={list(self.stop)}",
                do="name stop_token_ids, or cut the text afterwards",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


def make_options(
    defaults: Mapping[str, Any], requested: Mapping[str, Any], stop_token_ids: Sequence[int]
) -> GenerationOptions:
    """Puts a request together with a model's own defaults.

    Args:
      defaults: options of the model's generation_config.json. Who asks for beams does not get its
        sampling, and who asks for sampling, or for one beam, not its beams.
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
    own = _fitting_defaults(defaults, given)
    return GenerationOptions(**{"stop_token_ids": tuple(stop_token_ids), **own, **given})


def _fitting_defaults(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's defaults without those of another way to choose tokens than the one asked for."""
    num_beams = given.get("num_beams", defaults.get("num_beams", 1))
    overruled: tuple[str, ...] = ()
    if num_beams == 1 or ("num_beams" not in given and given.get("temperature")):
        overruled = _BEAMS
    elif "num_beams" in given:
        overruled = _SAMPLING
    own = {name: value for name, value in defaults.items() if name not in overruled}
    if "num_return_sequences" in own and isinstance(num_beams, int):
        own["num_return_sequences"] = min(own["num_return_sequences"], num_beams)
    return own


def check_options(**requested: Any) -> None:
    """Raises RequestError if options are unusable with every model; needs no model.

    Options of beams without num_beams are refused, as if no model had that among its defaults.
    """
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
