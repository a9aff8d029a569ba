"""From what the user names to a model that can be built: whatever form its weights are stored in.

A model may be a directory in Hugging Face format (or its hub id), a converted store, an Orbax
checkpoint, or the shape of a known model with random weights. Its weights stay as they are,
are quantized on the way, or are quantized already.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jmoe.config import ModelConfig
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import ConfigError, RequestError
from jmoe.loading.building import Engine, Setup, decide
from jmoe.loading.disk import (
    check_engine,
    check_no_store,
    plan_disk,
    use_disk,
)
from jmoe.loading.options import LoadOptions
from jmoe.models import families
from jmoe.models.random_weights import iterate_random_parameters
from jmoe.planning.memory import available_host_bytes
from jmoe.planning.plan import Plan
from jmoe.store import hub, orbax
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.json_files import read_config_json
from jmoe.store.known_models import read_shape, require_weights
from jmoe.store.manifest import check_quant, is_store, require_complete
from jmoe.store.open_source import open_directory
from jmoe.store.parameters import check_tensors, read_parameters
from jmoe.store.quantize import quantized_parameters

EMBEDDED_MODEL = Path(__file__).parents[1] / "data" / "tiny-mixtral"


class FoundModel(NamedTuple):
    """A model whose configuration and files were checked, and whose weights were not read yet.

    Attributes:
      name: what the user called it.
      directory: where the tokenizer and the defaults for generation are.
      config_json: as Hugging Face writes it.
      setup: how it will run.
      build: reads, makes up or maps the weights; returns the engine, and what was decided on
        the way and why, a sentence each.
    """

    name: str
    directory: Path
    config_json: dict[str, Any]
    setup: Setup
    build: Callable[[], tuple[Engine, tuple[str, ...]]]

    @property
    def config(self) -> ModelConfig:
        return self.setup.config

    @property
    def plan(self) -> Plan:
        return self.setup.plan


def find_model(
    model: str | Path | None, options: LoadOptions, device: jax.Device | None = None
) -> FoundModel:
    """Finds out in which form a model is, and whether it can be loaded.

    Raises as ``jmoe.load``; after this only what changes in the meantime can go wrong.
    """
    device = device or default_device()
    if options.random_weights:
        check_no_store(options)
        return _find_random(model, options, device)
    if model is None:
        name, directory = "tiny-mixtral (embedded)", EMBEDDED_MODEL
    else:
        require_weights(model)
        name, directory = str(model), hub.resolve(model, revision=options.revision)
    require_complete(directory)
    if is_store(directory):
        return _find_store(name, directory, options, device)
    check_no_store(options)
    if options.spec is not None:
        return _find_source(name, directory, options, device)
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


def _find_checkpoint(
    name: str, directory: Path, options: LoadOptions, device: jax.Device
) -> FoundModel:
    config_json = read_config_json(directory)
    config = families.config_from_json(config_json, directory)
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, config)
    setup = decide(config, None, options, device)
    if setup.quant is not None:  # experts are to be blobs
        return _find_source(name, directory, options, device)
    setup.check_size()

    def build() -> tuple[Engine, tuple[str, ...]]:
        with _bar(setup.num_bytes, "loading", options) as bar:
            return setup.build(read_parameters(checkpoint, config, setup.dtype, bar.update))

    return FoundModel(name, directory, config_json, setup, build)


def _find_orbax(name: str, directory: Path, options: LoadOptions, device: jax.Device) -> FoundModel:
    source = orbax.OrbaxSource(directory, name)
    setup = decide(source.config, None, options, device)
    if setup.quant is not None:
        return _find_source(name, directory, options, device)
    setup.check_size()

    def build() -> tuple[Engine, tuple[str, ...]]:
        with _bar(source.total_bytes, "loading", options) as bar:
            return setup.build(source.parameters(setup.dtype, bar.update))

    return FoundModel(name, directory, source.config_json, setup, build)


def _find_source(
    name: str, directory: Path, options: LoadOptions, device: jax.Device
) -> FoundModel:
    """A model that is quantized, or laid out expert by expert, as it is read."""
    source = open_directory(directory, name)
    setup = decide(source.config, options.spec, options, device)
    setup.check_size()
    quant = setup.quant
    assert quant is not None
    label = f"quantizing ({options.method})" if quant.is_quantized else "loading"

    def build() -> tuple[Engine, tuple[str, ...]]:
        with _bar(source.total_bytes, label, options) as bar:
            return setup.build(
                quantized_parameters(source, setup.dtype, quant, options.method, bar.update)
            )

    return FoundModel(name, directory, source.config_json, setup, build)


def _find_store(name: str, directory: Path, options: LoadOptions, device: jax.Device) -> FoundModel:
    model = ConvertedModel.open(directory)
    check_quant(model.manifest, options.quant)
    setup = decide(model.config, model.quant, options, device)
    if not setup.is_mapped:
        setup.check_size()
    setup = plan_disk(setup, model)
    check_engine(setup)

    def build() -> tuple[Engine, tuple[str, ...]]:
        with _bar(model.shared_bytes, "loading", options) as bar:
            if options.host_memory != "mmap":
                bar.total += model.expert_bytes
            store = model.open_experts(
                options.host_memory, bar.update, available_bytes=available_host_bytes()
            )
            as_arrays = setup.plan.policy.engine != "thread"
            lock = store.lock_pages(setup.device, as_arrays=as_arrays)
            if setup.is_mapped:
                store.open_disk(
                    available_host_bytes(),
                    # A program of all layers does not say which experts it will use.
                    has_hints=setup.is_offload or bool(setup.popularity),
                    read_ahead=options.read_ahead,
                )
            parameters = model.parameters(store, setup.dtype, bar.update)
            engine, notes = setup.build(parameters, store)
            if isinstance(engine, ResidentEngine) and not setup.is_mapped:
                # On a CPU it computes from the store's own memory.
                jax.block_until_ready(engine.parameters)
                store.close()
        return engine, (
            *notes,
            f"experts in host memory: {store.memory} ({store.memory_reason}); "
            f"pages: {lock.kind} ({lock.reason})",
            *use_disk(setup, engine, store),
        )

    # A store of random weights has no tokenizer: see _find_random.
    is_random = model.manifest.source.get("kind") == "random"
    files = EMBEDDED_MODEL if is_random else directory
    return FoundModel(name, files, dict(model.config_json), setup, build)


def _find_random(model: str | Path | None, options: LoadOptions, device: jax.Device) -> FoundModel:
    if model is None:
        raise RequestError(
            "random weights need a shape", do="name one, such as --model=mixtral-8x7b"
        )
    config_json = read_shape(model, options.num_layers)
    config = families.config_from_json(config_json, model)
    setup = decide(config, options.spec, options, device)
    setup.check_size()
    name = f"random weights of the shape {Path(model).stem}"
    if options.num_layers is not None:
        name += f" with {options.num_layers} layers"

    def build() -> tuple[Engine, tuple[str, ...]]:
        with _bar(setup.num_bytes, "making up weights", options) as bar:

            def counted() -> Iterator[np.ndarray | jax.Array]:
                for parameter in iterate_random_parameters(
                    config, setup.dtype, options.seed, setup.quant
                ):
                    bar.update(parameter.nbytes)
                    yield parameter

            return setup.build(counted())

    # Any tokenizer will do, as long as the model has its ids.
    return FoundModel(name, EMBEDDED_MODEL, config_json, setup, build)


def _bar(num_bytes: int, label: str, options: LoadOptions) -> tqdm:
    show = options.progress and sys.stderr.isatty()
    return tqdm(total=num_bytes, unit="B", unit_scale=True, delay=1, desc=label, disable=not show)
