"""From what the user names to an engine with weights: whatever form they are stored in.

A model may be a directory in Hugging Face format (or its hub id), a converted store, an Orbax
checkpoint, or the shape of a known model with random weights. Its weights stay as they are,
are quantized on the way, or are quantized already.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jmoe.config import ModelConfig
from jmoe.engines.memory import check_fits
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import ConfigError, RequestError
from jmoe.models import families
from jmoe.models.random_weights import iterate_random_parameters
from jmoe.native import library
from jmoe.native.choice import DEFAULT_ACTIVATION_BITS, HostKernels, uncovered
from jmoe.planning import sizes
from jmoe.planning.memory import available_host_bytes
from jmoe.quant.solver import Method, check_method
from jmoe.quant.spec import QuantSpec, parse_spec
from jmoe.store import hub, orbax
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.host_memory import check_choice
from jmoe.store.json_files import read_config_json
from jmoe.store.known_models import read_shape, require_weights
from jmoe.store.manifest import check_quant, is_store, require_complete
from jmoe.store.open_source import open_directory
from jmoe.store.parameters import check_tensors, read_parameters
from jmoe.store.quantize import quantized_parameters

EMBEDDED_MODEL = Path(__file__).parent / "data" / "tiny-mixtral"

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a model: the arguments of ``jmoe.load``, which explains them.

    Raises RequestError or ConfigError if they are unusable or contradict each other.
    """

    dtype: str = "auto"
    quant: str | None = None
    method: Method = "hqq"
    host_memory: str = "auto"
    random_weights: bool = False
    num_layers: int | None = None
    seed: int = 0
    host_kernels: bool = True
    activation_bits: int | None = None
    threads: int = 0
    revision: str | None = None
    progress: bool = False

    def __post_init__(self):
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(
                "unknown dtype", got=repr(self.dtype), expected="auto, float32 or bfloat16"
            )
        check_choice(self.host_memory)
        _ = self.spec  # which raises
        check_method(self.method)
        if self.activation_bits is not None and not self.host_kernels:
            raise RequestError(
                "activations in few bits are for the host kernels, which are switched off",
                got=self.activation_bits,
            )
        _ = self.kernel_options  # which raises
        if self.num_layers is not None and not self.random_weights:
            raise RequestError(
                "num_layers changes the shape of a model, and goes with random weights only",
                got=self.num_layers,
                do="add --random_weights, or leave --num_layers out",
            )

    @property
    def kernel_options(self) -> HostKernels:
        """What ``activation_bits`` and ``threads`` say."""
        bits = self.activation_bits or DEFAULT_ACTIVATION_BITS
        return HostKernels(activation_bits=bits, num_threads=self.threads)  # type: ignore[arg-type]

    @property
    def spec(self) -> QuantSpec | None:
        """What ``quant`` says."""
        return None if self.quant is None else parse_spec(self.quant)


class FoundModel(NamedTuple):
    """A model whose configuration and files were checked, and whose weights were not read yet.

    Attributes:
      name: what the user called it.
      directory: where the tokenizer and the defaults for generation are.
      config_json: as Hugging Face writes it.
      config: the same, understood.
      build: reads, makes up or maps the weights; returns the engine, and what was decided on
        the way and why, a sentence each.
    """

    name: str
    directory: Path
    config_json: dict[str, Any]
    config: ModelConfig
    build: Callable[[], tuple[ResidentEngine, tuple[str, ...]]]


def find_model(
    model: str | Path | None, options: LoadOptions, device: jax.Device | None = None
) -> FoundModel:
    """Finds out in which form a model is, and whether it can be loaded.

    Raises as ``jmoe.load``; after this only what changes in the meantime can go wrong.
    """
    device = device or default_device()
    if options.random_weights:
        return _find_random(model, options, device)
    if model is None:
        name, directory = "tiny-mixtral (embedded)", EMBEDDED_MODEL
    else:
        require_weights(model)
        name, directory = str(model), hub.resolve(model, revision=options.revision)
    require_complete(directory)
    if is_store(directory):
        return _find_store(name, directory, options, device)
    if options.spec is not None:
        return _find_source(name, directory, options.spec, options, device)
    if orbax.is_checkpoint(directory):
        return _find_orbax(name, directory, options, device)
    return _find_checkpoint(name, directory, options, device)


def default_device() -> jax.Device:
    """JAX's first device (ConfigError if no backend starts)."""
    try:
        return jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # a backend that JAX_PLATFORMS asks for
        raise ConfigError(
            "JAX cannot start on any device",
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            got=str(error) or type(error).__name__,
            do="unset JAX_PLATFORMS, or install the extra for your accelerator, jmoe[cuda12]",
        ) from None


def parameter_bytes(config: ModelConfig, dtype: str, quant: QuantSpec | None = None) -> int:
    """Size of a model's weights."""
    return sizes.total(sizes.weight_sizes(config, dtype, quant)).num_bytes


def _find_checkpoint(
    name: str, directory: Path, options: LoadOptions, device: jax.Device
) -> FoundModel:
    config_json = read_config_json(directory)
    config = families.config_from_json(config_json, directory)
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, config)
    dtype = _choose_dtype(options.dtype, config, device, None)
    num_bytes = _check_size(config, dtype, None, device)

    def build() -> tuple[ResidentEngine, tuple[str, ...]]:
        with _bar(num_bytes, "loading", options) as bar:
            parameters = read_parameters(checkpoint, config, dtype, bar.update)
            return _engine(config, parameters, dtype, device, None, options)

    return FoundModel(name, directory, config_json, config, build)


def _find_orbax(name: str, directory: Path, options: LoadOptions, device: jax.Device) -> FoundModel:
    source = orbax.OrbaxSource(directory, name)
    config = source.config
    dtype = _choose_dtype(options.dtype, config, device, None)
    _check_size(config, dtype, None, device)

    def build() -> tuple[ResidentEngine, tuple[str, ...]]:
        with _bar(source.total_bytes, "loading", options) as bar:
            parameters = source.parameters(dtype, bar.update)
            return _engine(config, parameters, dtype, device, None, options)

    return FoundModel(name, directory, source.config_json, config, build)


def _find_source(
    name: str, directory: Path, quant: QuantSpec, options: LoadOptions, device: jax.Device
) -> FoundModel:
    """A model that is quantized as it is read."""
    source = open_directory(directory, name)
    config = source.config
    dtype = _choose_dtype(options.dtype, config, device, quant)
    _check_size(config, dtype, quant, device)

    def build() -> tuple[ResidentEngine, tuple[str, ...]]:
        with _bar(source.total_bytes, f"quantizing ({options.method})", options) as bar:
            parameters = quantized_parameters(source, dtype, quant, options.method, bar.update)
            return _engine(config, parameters, dtype, device, quant, options)

    return FoundModel(name, directory, source.config_json, config, build)


def _find_store(name: str, directory: Path, options: LoadOptions, device: jax.Device) -> FoundModel:
    model = ConvertedModel.open(directory)
    check_quant(model.manifest, options.quant)
    config, quant = model.config, model.quant
    dtype = _choose_dtype(options.dtype, config, device, quant)
    if device.platform != "cpu":  # there, mapped files need no memory of their own
        _check_size(config, dtype, quant, device)

    def build() -> tuple[ResidentEngine, tuple[str, ...]]:
        with _bar(model.shared_bytes, "loading", options) as bar:
            if options.host_memory != "mmap":
                bar.total += model.expert_bytes
            store = model.open_experts(
                options.host_memory, bar.update, available_bytes=available_host_bytes()
            )
            lock = store.lock_pages(device)
            parameters = model.parameters(store, dtype, bar.update)
            engine, notes = _engine(config, parameters, dtype, device, quant, options)
            if device.platform != "cpu":  # which computes from the store's own memory
                jax.block_until_ready(engine.parameters)
                store.close()
        return engine, (
            *notes,
            f"experts in host memory: {store.memory} ({store.memory_reason}); "
            f"pages: {lock.kind} ({lock.reason})",
        )

    # A store of random weights has no tokenizer: see _find_random.
    is_random = model.manifest.source.get("kind") == "random"
    files = EMBEDDED_MODEL if is_random else directory
    return FoundModel(name, files, dict(model.config_json), config, build)


def _find_random(model: str | Path | None, options: LoadOptions, device: jax.Device) -> FoundModel:
    if model is None:
        raise RequestError(
            "random weights need a shape", do="name one, such as --model=mixtral-8x7b"
        )
    config_json = read_shape(model, options.num_layers)
    config = families.config_from_json(config_json, model)
    quant = options.spec
    dtype = _choose_dtype(options.dtype, config, device, quant)
    num_bytes = _check_size(config, dtype, quant, device)
    name = f"random weights of the shape {Path(model).stem}"
    if options.num_layers is not None:
        name += f" with {options.num_layers} layers"

    def build() -> tuple[ResidentEngine, tuple[str, ...]]:
        with _bar(num_bytes, "making up weights", options) as bar:

            def counted() -> Iterator[np.ndarray | jax.Array]:
                for parameter in iterate_random_parameters(config, dtype, options.seed, quant):
                    bar.update(parameter.nbytes)
                    yield parameter

            return _engine(config, counted(), dtype, device, quant, options)

    # Any tokenizer will do, as long as the model has its ids.
    return FoundModel(name, EMBEDDED_MODEL, config_json, config, build)


def _engine(
    config: ModelConfig,
    parameters: Iterable[np.ndarray | jax.Array],
    dtype: str,
    device: jax.Device,
    quant: QuantSpec | None,
    options: LoadOptions,
) -> tuple[ResidentEngine, tuple[str, ...]]:
    """The engine, and which kernels it computes with on a CPU."""
    if device.platform != "cpu":
        return ResidentEngine(config, parameters, dtype, device, quant), ()
    status = library.status()
    host = options.kernel_options if options.host_kernels and status.available else None
    engine = ResidentEngine(config, parameters, dtype, device, quant, host)
    if host is None:
        off = "host kernels: switched off; the CPU computes through XLA, more slowly"
        return engine, (status.reason if options.host_kernels else off,)
    note = status.reason
    if quant is not None:
        note += f"; activations in {host.activation_bits} bits"
        if others := uncovered(quant.formats):
            note += f"; none for {', '.join(map(str, others))}, which XLA computes"
    return engine, (note,)


def _check_size(
    config: ModelConfig, dtype: str, quant: QuantSpec | None, device: jax.Device
) -> int:
    num_bytes = parameter_bytes(config, dtype, quant)
    check_fits(
        num_bytes,
        device,
        what=f"the model in {dtype if quant is None else quant}",
        do="use fewer bits (--quant=attn4-experts4), or a machine with more memory",
    )
    return num_bytes


def _choose_dtype(
    dtype: str, config: ModelConfig, device: jax.Device, quant: QuantSpec | None
) -> str:
    if dtype != "auto":
        return dtype
    if device.platform != "cpu":
        return "bfloat16"
    # On a CPU float32 is exact and no slower, if there is room.
    fits = parameter_bytes(config, "float32", quant) < 0.8 * available_host_bytes()
    return "float32" if fits or quant is not None else "bfloat16"


def _bar(num_bytes: int, label: str, options: LoadOptions) -> tqdm:
    show = options.progress and sys.stderr.isatty()
    return tqdm(total=num_bytes, unit="B", unit_scale=True, delay=1, desc=label, disable=not show)
