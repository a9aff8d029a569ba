"""What the user asked to measure, and the engine that it is measured on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jmoe
from jmoe.api import parameter_bytes
from jmoe.engines.memory import check_fits
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import ConfigError, RequestError
from jmoe.models import families
from jmoe.models.random_weights import random_parameters
from jmoe.store.json_files import read_config_json, read_json_object


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The flags of bench.py. Raises RequestError if they contradict each other."""

    model: str | None  # None is the embedded model, unless config is given
    config: str | None  # random weights of this shape instead of a model
    layers: int | None  # instead of the config's num_hidden_layers
    dtype: str
    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int  # 0 leaves out the generation test
    repeats: int
    warmup: int
    peer: str

    def __post_init__(self):
        if self.model is not None and self.config is not None:
            raise RequestError("--model and --config exclude each other", do="drop one of them")
        if self.layers is not None and self.config is None:
            raise RequestError("--layers goes with --config", do="name a shape with --config")
        if not self.batch_sizes:
            raise RequestError("--batch is empty", expected="numbers such as 1,4")
        if not self.prompt_lengths and not self.new_tokens:
            raise RequestError(
                "nothing to measure", do="give --prompt_lengths, or --new_tokens above 0"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Subject(NamedTuple):
    """What is measured."""

    name: str
    engine: ResidentEngine
    config_json: dict[str, Any]  # as Hugging Face writes it, layers overridden


def read_integers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    """The numbers of a comma-separated flag (RequestError)."""
    for value in values:
        if not value.strip().isdecimal() or int(value) < 1:
            raise RequestError(
                f"--{flag} is not usable", got=repr(value), expected="whole numbers from 1: 64,512"
            )
    return tuple(int(value) for value in values)


def load_subject(settings: Settings) -> Subject:
    """Loads the model, or fills the shape with random weights.

    Raises:
      JmoeError: of the kinds that jmoe.load raises.
    """
    device = jax.local_devices()[0]
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    if settings.config is None:
        llm = jmoe.load(settings.model, dtype=dtype, device=device, progress=True)
        return Subject(llm.name, llm.engine, read_config_json(llm.directory))

    path = Path(settings.config)
    raw = read_json_object(path, ConfigError, missing_do="see configs/models")
    name = f"random weights of the shape {path.stem}"
    if settings.layers is not None:
        raw["num_hidden_layers"] = settings.layers
        name += f" with {settings.layers} layers"
    config = families.config_from_json(raw, path)
    check_fits(
        parameter_bytes(config, dtype),
        device,
        what=f"{config.num_hidden_layers} layers of {path.name} in {dtype}",
        do="lower --layers, or use --dtype=bfloat16",
    )
    parameters = random_parameters(config, dtype)
    return Subject(name, ResidentEngine(config, parameters, dtype, device), raw)
