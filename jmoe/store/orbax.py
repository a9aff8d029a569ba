"""Orbax checkpoints of the functional parameters, with shardings: for research in JAX.

A checkpoint is a directory that loads like any other model:

* ``config.json``, and those of SIDE_FILES that there were.
* ``parameters``: an Orbax PyTree checkpoint (https://orbax.readthedocs.io) of a flat dict from
  the decoder's paths (``abstract_parameters(config)``) to arrays. Unquantized, uncompressed, and
  stacked experts in one chunk each, so that one expert can be read alone.

Orbax and TensorStore, which it brings along, are imported where they are used: they take a while.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jmoe.config import ModelConfig
from jmoe.errors import CheckpointError, JmoeError, RequestError
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.quant.layout import aligned_empty
from jmoe.store.checkpoint import require_directory
from jmoe.store.json_files import read_config_json, read_json_object
from jmoe.store.manifest import CONFIG_NAME
from jmoe.store.partial import partial_path, require_space
from jmoe.store.reading import OnBytes, ignore_bytes
from jmoe.store.safetensors_writer import sync_directory, write_file
from jmoe.store.source import find_side_files, json_sha256

PARAMETERS_NAME = "parameters"

Sharding = jax.sharding.Sharding
ChooseSharding = Callable[[str, jax.ShapeDtypeStruct], Sharding]

_TREE_NAME = "_METADATA"  # Orbax writes it: paths, and how arrays are stored
_DTYPES = ("bfloat16", "float16", "float32")
_SAVE_AGAIN = "copy the whole directory again, or save the parameters again"
_NUM_SHOWN = 5


def is_checkpoint(directory: Path) -> bool:
    """Whether a model directory is an Orbax checkpoint rather than in another form."""
    return os.path.exists(directory / PARAMETERS_NAME / _TREE_NAME)


def save_checkpoint(
    directory: str | os.PathLike[str],
    config_json: Mapping[str, Any],
    parameters: Mapping[str, jax.Array | np.ndarray],
    side_files: Mapping[str, Path] | None = None,
) -> None:
    """Saves unquantized parameters: all of them, or, if anything goes wrong, nothing.

    Args:
      directory: to make; beside it, its name with ``.partial`` is used meanwhile.
      config_json: of the model, as Hugging Face writes it.
      parameters: by path, those of ``abstract_parameters`` of this model and no others, in
        bfloat16, float16 or float32, sharded in any way.
      side_files: files to copy, by name: ``source.find_side_files`` of the model's directory.

    Raises:
      ConfigError: the configuration is not usable.
      RequestError: parameters that do not fit it; or the directory exists already, or what
        an interrupted save left.
      CapacityError: they do not fit on the disk.
      CheckpointError: they cannot be written.
    """
    output = Path(directory).absolute()
    _check_parameters(families.config_from_json(config_json, CONFIG_NAME), parameters)
    num_bytes = sum(parameter.nbytes for parameter in parameters.values())
    partial = _make_partial(output, num_bytes)
    try:
        with _errors_of_orbax("the parameters cannot be written", output, do=None):
            text = json.dumps(dict(config_json), indent=2, ensure_ascii=False) + "\n"
            write_file(partial, CONFIG_NAME, text.encode())
            for name, path in (side_files or {}).items():
                write_file(partial, name, path.read_bytes())
            _write(partial / PARAMETERS_NAME, parameters)
            sync_directory(partial)
            _require_absent(output)
            os.rename(partial, output)
            sync_directory(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore_parameters(
    directory: str | os.PathLike[str],
    dtype: str | None = None,
    sharding: Sharding | ChooseSharding | None = None,
) -> dict[str, jax.Array]:
    """Reads all parameters of a checkpoint, each straight to where it is to be.

    Args:
      directory: made by ``save_checkpoint``.
      dtype: to convert to; None keeps what is stored.
      sharding: of every array; or a function that chooses it by path and shape. None puts them
        on JAX's first device. It need not be the one that they were saved with.

    Returns:
      Arrays by path, in the order of ``abstract_parameters``: ``decoder.rebuild`` takes
      ``tuple(parameters.values())``.

    Raises:
      ConfigError: the configuration is not usable.
      CheckpointError: not such a checkpoint, damaged, or of another model.
      ValueError: a sharding does not divide an array.
    """
    directory = Path(directory).absolute()
    _, config = _read_config(directory)
    ocp = _orbax()
    shapes, arguments = {}, {}
    for path, stored in _read_shapes(directory, config).items():
        shape = jax.ShapeDtypeStruct(stored.shape, dtype or stored.dtype)
        if sharding is None:
            chosen: Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        else:
            chosen = sharding if isinstance(sharding, Sharding) else sharding(path, shape)
        chosen.shard_shape(shape.shape)  # raises if it does not divide
        shapes[path] = shape
        arguments[path] = ocp.ArrayRestoreArgs(
            sharding=chosen, dtype=shape.dtype, global_shape=shape.shape
        )
    with _errors_of_orbax("the parameters cannot be read", directory), _checkpointer() as orbax:
        restored = orbax.restore(
            directory / PARAMETERS_NAME,
            args=ocp.args.PyTreeRestore(item=shapes, restore_args=arguments),
        )
    return {path: restored[path] for path in shapes}


class OrbaxSource:
    """An Orbax checkpoint as a WeightSource: one matrix at a time, of a stack one expert's."""

    def __init__(self, directory: Path, name: str | None = None):
        """Validates configuration, names, shapes and types; reads no weights.

        Raises:
          ConfigError: the configuration is not usable.
          CheckpointError: not such a checkpoint, damaged, or of another model.
        """
        self.directory = directory
        self.name = name or directory.resolve().name
        self.config_json, self.config = _read_config(directory)
        self._parameters = (directory / PARAMETERS_NAME).absolute()
        self._shapes = _read_shapes(directory, self.config)
        tree = read_json_object(self._parameters / _TREE_NAME)
        self._driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        self._is_database = bool(tree.get("use_ocdbt", True))

    @property
    def total_bytes(self) -> int:
        shapes = self._shapes.values()
        return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)

    def read(self, path: str, expert: int | None = None) -> np.ndarray:
        shape = self._shapes[path]
        assert (len(shape.shape) == 3) == (expert is not None)
        what = path if expert is None else f"expert {expert} of {path}"
        with _errors_of_orbax(f"{what} cannot be read", self.directory):
            store = self._open(path)
            array = (store if expert is None else store[expert]).read().result()
        return np.ascontiguousarray(array)

    def parameters(self, dtype: str, on_bytes: OnBytes = ignore_bytes) -> Iterator[np.ndarray]:
        """Reads all parameters as ``parameters.read_parameters`` does, matrix by matrix.

        Args:
          dtype: "float32" or "bfloat16"; others are converted.
          on_bytes: told the size of every matrix, as it is stored.

        Raises:
          CheckpointError: the checkpoint is damaged.
        """
        for path, shape in self._shapes.items():
            array = aligned_empty(shape.shape, dtype)
            experts = range(len(array)) if array.ndim == 3 else (None,)
            for expert in experts:
                matrix = self.read(path, expert)
                array[... if expert is None else expert] = matrix
                on_bytes(matrix.nbytes)
            yield array

    def fingerprint(self) -> dict[str, Any]:
        # Orbax gives its files random names: those of another save differ.
        files = sorted(file for file in self._parameters.rglob("*") if file.is_file())
        sizes = {str(f.relative_to(self._parameters)): f.stat().st_size for f in files}
        tree = (self._parameters / _TREE_NAME).read_bytes()
        return {
            "kind": "orbax",
            "config_sha256": json_sha256(self.config_json),
            "tree_sha256": hashlib.sha256(tree).hexdigest(),
            "files_sha256": json_sha256(sizes),
        }

    def side_files(self) -> dict[str, Path]:
        return find_side_files(self.directory)

    @functools.cached_property
    def _context(self) -> Any:
        import tensorstore

        return tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 24}})

    def _open(self, path: str) -> Any:
        import tensorstore

        folder = f"file://{self._parameters}"
        if self._is_database:
            kvstore: Any = {"driver": "ocdbt", "base": folder, "path": f"{path}/"}
        else:
            kvstore = f"{folder}/{path}/"
        spec = {"driver": self._driver, "kvstore": kvstore}
        return tensorstore.open(spec, open=True, read=True, context=self._context).result()


def _read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    require_directory(directory)
    if not is_checkpoint(directory):
        raise CheckpointError(
            "this is no Orbax checkpoint of parameters",
            where=directory,
            expected=f"{PARAMETERS_NAME}/{_TREE_NAME}",
            do="name a directory that jmoe saved in this form",
        )
    config_json = read_config_json(directory)
    return config_json, families.config_from_json(config_json, directory)


def _read_shapes(directory: Path, config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the stored arrays, which are those of the configuration."""
    with _errors_of_orbax("the list of parameters cannot be read", directory):
        with _checkpointer() as orbax:
            tree = orbax.metadata(directory.absolute() / PARAMETERS_NAME).item_metadata.tree
        stored = {
            path: jax.ShapeDtypeStruct(tuple(array.shape), jnp.dtype(array.dtype))
            for path, array in tree.items()
        }
    problems = _problems(config, stored)
    if problems:
        raise CheckpointError(
            "the parameters of the checkpoint do not fit its config.json",
            where=directory,
            got=problems,
            do="check that config.json and the parameters belong together",
        )
    return {path: stored[path] for path in abstract_parameters(config)}


def _check_parameters(config: ModelConfig, parameters: Mapping[str, Any]) -> None:
    problems = _problems(config, parameters)
    if problems:
        raise RequestError(
            "the parameters are not those of the model",
            got=problems,
            do="save the parameters of an unquantized model, all of them, by their path",
        )


def _problems(config: ModelConfig, parameters: Mapping[str, Any]) -> str:
    """What is wrong with the names, shapes and types of a model's parameters."""
    expected = abstract_parameters(config)
    lines = [f"no {path}" for path in expected if path not in parameters]
    for path, array in parameters.items():
        wanted = expected.get(path)
        if wanted is None:
            lines.append(f"{path}, which the model does not have")
        elif tuple(array.shape) != wanted.shape:
            lines.append(f"{path}: {list(array.shape)} instead of {list(wanted.shape)}")
        elif jnp.dtype(array.dtype).name not in _DTYPES:
            lines.append(f"{path}: {array.dtype}")
    shown = lines[:_NUM_SHOWN]
    if len(lines) > _NUM_SHOWN:
        shown.append(f"and {len(lines) - _NUM_SHOWN} more")
    return "\n       ".join(shown)


def _require_absent(output: Path) -> None:
    if os.path.lexists(output):
        raise RequestError(
            "the output exists already", where=output, do="choose another directory, or delete it"
        )


def _make_partial(output: Path, num_bytes: int) -> Path:
    """Makes the directory to write to."""
    partial = partial_path(output)
    _require_absent(output)
    try:
        require_space(
            output.parent,
            num_bytes,
            what="the parameters do not fit",
            do="free space, or save to another disk",
        )
        partial.mkdir()
    except FileExistsError:
        raise RequestError(
            "another process saves here, or an interrupted save is in the way",
            where=partial,
            do="wait for the process, or delete the directory",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{partial.name} cannot be made", where=output.parent, got=error.strerror
        ) from None
    return partial


def _write(directory: Path, parameters: Mapping[str, jax.Array | np.ndarray]) -> None:
    ocp = _orbax()
    arguments = {
        path: ocp.SaveArgs(chunk_byte_size=array.nbytes // array.shape[0], shard_axes=(0,))
        if array.ndim == 3
        else ocp.SaveArgs()
        for path, array in parameters.items()
    }
    with _checkpointer() as orbax:
        tree = dict(parameters)
        orbax.save(directory, args=ocp.args.PyTreeSave(tree, save_args=arguments))


def _orbax() -> Any:
    import orbax.checkpoint

    return orbax.checkpoint


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """What saves and restores; quietly, as errors say what went wrong."""
    ocp = _orbax()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            yield checkpointer
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _errors_of_orbax(what: str, directory: Path, do: str | None = _SAVE_AGAIN) -> Iterator[None]:
    """Makes one error of all that Orbax raises: it has no types of its own for them."""
    try:
        yield
    except (JmoeError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error  # Orbax puts pages of settings around TensorStore's
        reason = (str(cause).splitlines() or [""])[0][:300]
        raise CheckpointError(
            what, where=directory, got=f"{type(error).__name__}: {reason}", do=do
        ) from error
