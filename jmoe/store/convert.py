"""Converting a model to a store: layer by layer, in the memory of two experts.

Three things go on at once: one matrix is read, one is quantized, and what is finished before is
hashed and written.
"""

import collections
import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmoe.errors import CapacityError, JmoeError, RequestError
from jmoe.models.decoder import abstract_parameters
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.solver import Method, check_method
from jmoe.quant.spec import QuantSpec
from jmoe.store.manifest import (
    BLOBS_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    SHARED_NAME,
    FileEntry,
    Manifest,
    experts_name,
)
from jmoe.store.partial import PartialDirectory, partial_path, require_absent, require_space
from jmoe.store.quantize import layer_blobs, shared_parameters, shared_shapes
from jmoe.store.reading import OnBytes, ignore_bytes
from jmoe.store.safetensors_writer import NewFile, TensorFile, write_file
from jmoe.store.source import WeightSource, json_sha256

_SMALL_FILES_BYTES = 1 << 20  # room for the journal and the manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
      output: the store.
      input_bytes: of weights that were read; without those of files finished before.
      output_bytes: of the whole store.
      seconds: that it took.
      resumed_files: files that were finished before.
    """

    output: Path
    input_bytes: int
    output_bytes: int
    seconds: float
    resumed_files: int

    @property
    def bytes_per_s(self) -> float:
        """Of input."""
        return self.input_bytes / self.seconds


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A file of tensors to write: what is in it, and how to make that, piece by piece."""

    name: str
    form: TensorFile
    pieces: Callable[[OnBytes], Iterator[tuple[str, np.ndarray]]]
    num_parameters: int


class Conversion:
    """One conversion of a source to a store. Everything is checked when this is made.

    Attributes:
      output_bytes: size that the store will have, but for manifest and side files.
      kept: after ``run`` failed, the directory that a resumption goes on from; or None.
    """

    def __init__(
        self,
        source: WeightSource,
        output: Path,
        quant: QuantSpec,
        *,
        method: Any,
        resume: bool = False,
    ):
        """Checks everything that can be checked before the work; writes nothing.

        Args:
          source: of the weights.
          output: directory to make.
          quant: formats of the components.
          method: how to find codes: "hqq" or "rtn".
          resume: go on with what an interrupted conversion to this output left.

        Raises:
          ConfigError: the formats do not fit the model, or there is no such method.
          RequestError: the output is not a place to write to.
          CapacityError: it does not fit on the disk.
        """
        self._source = source
        self._output = Path(os.path.abspath(output))
        self._quant = quant
        check_method(method)
        self._method: Method = method
        self._resume = resume
        self.kept: Path | None = None
        config = source.config
        self._layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
        abstract_parameters(config, "bfloat16", quant)  # raises if a group size does not fit
        _check_place(self._output, source.directory)
        fingerprint = source.fingerprint()
        self._source_json = {
            "name": source.name,
            "kind": fingerprint["kind"],
            "fingerprint": json_sha256(fingerprint),
        }
        self._side_files = {name: _read_small(p) for name, p in source.side_files().items()}
        self._files = list(self._plan())
        self.output_bytes = sum(file.form.num_bytes for file in self._files)
        self._check_space()

    def run(self, on_bytes: OnBytes = ignore_bytes) -> ConversionReport:
        """Converts.

        Args:
          on_bytes: told of progress, in bytes of input; those of files that a resumption finds
            finished are told at once.

        Raises:
          RequestError: the output came into being, another process converts to it, or there is
            an interrupted conversion that this one does not resume.
          CheckpointError: weights are not finite or cannot be read.
          CapacityError: the disk is full.
        """
        started = time.perf_counter()
        partial = None
        try:
            partial = PartialDirectory(self._output, self._settings(), resume=self._resume)
            resumed = partial.finished.keys() & {file.name for file in self._files}
            input_bytes = self._write_files(partial, on_bytes)
            small_files = {
                name: write_file(partial.path, name, contents)
                for name, contents in self._small_files().items()
            }
            manifest = self._manifest(partial.finished | small_files)
            partial.publish(manifest.to_bytes())
        except OSError as error:
            raise _explain(error, self._output) from None
        finally:
            self.kept = partial and partial.leave()
        return ConversionReport(
            output=self._output,
            input_bytes=input_bytes,
            output_bytes=manifest.total_bytes,
            seconds=time.perf_counter() - started,
            resumed_files=len(resumed),
        )

    def _plan(self) -> Iterator[_File]:
        config, layout = self._source.config, self._layout
        num_experts = config.router.num_experts
        experts_form = TensorFile({BLOBS_NAME: ((num_experts, layout.num_bytes), "uint8")})
        sizes = [math.prod(layout.matrix_shape(matrix)) for matrix in MATRICES]
        for layer in range(config.num_hidden_layers):
            yield _File(
                experts_name(layer),
                experts_form,
                lambda on_bytes, layer=layer: (
                    (BLOBS_NAME, blob)
                    for blob in layer_blobs(
                        self._source, layer, layout, self._method, on_bytes=on_bytes
                    )
                ),
                num_experts * sum(sizes),
            )
        yield _File(
            SHARED_NAME,
            TensorFile(shared_shapes(self._source, self._quant)),
            lambda on_bytes: shared_parameters(self._source, self._quant, self._method, on_bytes),
            sum(
                math.prod(parameter.shape)
                for path, parameter in abstract_parameters(config).items()
                if ".experts." not in path
            ),
        )

    def _settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on with the other's files."""
        settings = {
            "format_version": FORMAT_VERSION,
            "quant": self._quant.to_json(),
            "method": self._method,
            "source": self._source_json,
            "platform": jax.default_backend(),  # another one may round differently
        }
        return json.loads(json.dumps(settings))

    def _write_files(self, partial: PartialDirectory, on_bytes: OnBytes) -> int:
        """Writes the files of tensors that are not finished; returns the bytes that it read."""
        num_parameters = sum(file.num_parameters for file in self._files)
        input_bytes = 0

        def count(num_bytes: int) -> None:
            nonlocal input_bytes
            input_bytes += num_bytes
            on_bytes(num_bytes)

        with _Writer(partial) as writer:
            for file in self._files:
                if file.name in partial.finished:
                    on_bytes(self._source.total_bytes * file.num_parameters // num_parameters)
                    continue
                writer.begin(file.name)
                writer.write(file.form.head)
                previous = None
                for name, piece in file.pieces(count):
                    if previous not in (None, name):
                        writer.write(file.form.padding_after(previous))
                    writer.write(piece)
                    previous = name
                if previous is not None:
                    writer.write(file.form.padding_after(previous))
                writer.end()
        return input_bytes

    def _small_files(self) -> dict[str, bytes]:
        config_json = json.dumps(self._source.config_json, indent=2, ensure_ascii=False) + "\n"
        return {CONFIG_NAME: config_json.encode()} | self._side_files

    def _manifest(self, files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            quant=self._quant,
            method=self._method,
            source=self._source_json,
            config_sha256=files[CONFIG_NAME].sha256,
            files=files,
        )

    def _check_space(self) -> None:
        needed = self.output_bytes + _SMALL_FILES_BYTES
        needed += sum(map(len, self._small_files().values()))
        partial = partial_path(self._output)
        if self._resume and partial.is_dir():
            forms = {file.name: file.form.num_bytes for file in self._files}
            needed -= sum(forms.get(file.name, 0) for file in partial.iterdir())
        require_space(
            self._output.parent,
            needed,
            what="the converted model does not fit",
            do="free space, convert to another disk, or to fewer bits",
        )


class _Writer:
    """Writes files on a thread, one piece behind what is being made.

    Its errors come with the next piece, or at the end of ``with``.
    """

    _MAX_PENDING = 2

    def __init__(self, partial: PartialDirectory):
        self._partial = partial
        self._thread = ThreadPoolExecutor(1, "write")
        self._pending: collections.deque[Future] = collections.deque()
        self._files: list[NewFile] = []
        self._name = ""

    def begin(self, name: str) -> None:
        self._name = name
        self._files.append(NewFile(self._partial.path, name))

    def write(self, contents: bytes | np.ndarray) -> None:
        """Appends to the file; the array must not be changed any more."""
        self._submit(self._files[-1].write, contents)

    def end(self) -> None:
        self._submit(self._finish, self._files[-1], self._name)

    def _finish(self, file: NewFile, name: str) -> None:
        self._partial.add(name, file.finish())

    def _submit(self, task: Callable[..., object], *args: Any) -> None:
        while len(self._pending) >= self._MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(task, *args))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exc_info) -> None:
        try:
            self._thread.shutdown()
            if exc_info[0] is None:
                for task in self._pending:
                    task.result()
        finally:
            for file in self._files:
                file.discard()


def _check_place(output: Path, source: Path | None) -> None:
    """Raises RequestError unless a directory can be made here."""
    require_absent(output)
    parent = output.parent
    if not parent.is_dir():
        raise RequestError(
            "there is no directory to put the output into", where=parent, do="create it first"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError("the output cannot be written here", where=parent, got="read-only")
    if source is not None:
        inner, outer = output.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise RequestError(
                "the output and the model that is converted lie inside each other",
                where=output,
                got=f"the model in {source}",
                do="choose an --output outside of the model's directory",
            )


def _read_small(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{path.name} cannot be read", where=path.parent, got=error.strerror
        ) from None


def _explain(error: OSError, output: Path) -> JmoeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            "the disk is full",
            where=output.parent,
            got=error.strerror,
            do="free space, then run the same command with --resume: finished files are kept",
        )
    return RequestError(
        "the converted model cannot be written",
        where=output,
        got=error.strerror or str(error),
        do="check the disk and its permissions, then run the same command with --resume",
    )
