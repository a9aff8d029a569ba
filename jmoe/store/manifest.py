"""The manifest of a converted store: what is in the directory, and whether it still is.

A store is a directory with these files, all of which but the manifest are listed in it:

* ``experts-00000.safetensors``, one per layer: a tensor ``blobs``, U8 [num_experts, bytes of a
  blob]. The header is padded with spaces, so that data start at a multiple of 4096 in the file.
* ``shared.safetensors``: all other parameters by their path, data at a multiple of 4096 too, and
  every tensor at a multiple of 64. Where that leaves a gap, a U8 tensor fills it whose name starts
  with PADDING_PREFIX and which nobody reads.
* ``config.json``, and those of SIDE_FILES that the source had.
* ``manifest.json``, written last: a directory that has one is complete.

Neither times nor paths are in it: two conversions of one source are equal byte by byte. The
container is that of https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from jmoe.errors import CheckpointError, ConfigError
from jmoe.quant.solver import METHODS, Method
from jmoe.quant.spec import QuantSpec, parse_spec
from jmoe.store.checkpoint import INDEX_NAME, SINGLE_NAME
from jmoe.store.json_files import read_json_object
from jmoe.store.reading import OnBytes, ignore_bytes
from jmoe.store.safetensors_file import first_few, printable

FORMAT = "jmoe-store"
FORMAT_VERSION = 1

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.json"
SHARED_NAME = "shared.safetensors"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
BLOBS_NAME = "blobs"
PADDING_PREFIX = "_padding"

# While a conversion is under way: its directory ends so, and holds this journal.
PARTIAL_SUFFIX = ".partial"
PROGRESS_NAME = "progress.json"

DATA_ALIGNMENT = 4096  # of the data section in a file: a page
TENSOR_ALIGNMENT = 64  # of a tensor in a file

CONVERT_AGAIN = "convert the model again"

_FILE_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH_CHUNK_BYTES = 1 << 22


def experts_name(layer: int) -> str:
    """Name of the file that holds a layer's experts."""
    return f"experts-{layer:05}.safetensors"


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    num_bytes: int
    sha256: str  # of the contents, in lower-case hexadecimal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a store says of itself.

    Attributes:
      quant: formats of the components.
      method: how the codes were found.
      source: what was converted, as the source describes itself; JSON.
      config_sha256: of the store's config.json.
      files: every other file of the store by name, config.json included.
    """

    quant: QuantSpec
    method: Method
    source: Mapping[str, Any]
    config_sha256: str
    files: Mapping[str, FileEntry]

    def to_json(self) -> dict[str, Any]:
        """The contents of manifest.json; files in the order of their names."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "quant": self.quant.to_json(),
            "method": self.method,
            "source": dict(self.source),
            "config_sha256": self.config_sha256,
            "files": {
                name: {"bytes": entry.num_bytes, "sha256": entry.sha256}
                for name, entry in sorted(self.files.items())
            },
        }

    def to_bytes(self) -> bytes:
        """``to_json`` as the file holds it."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads and validates a store's manifest; looks at no other file.

        Raises:
          CheckpointError: there is none, it is not JSON, incomplete, of another program, or of a
            version that this one does not know.
        """
        require_complete(directory)
        path = directory / MANIFEST_NAME
        try:
            raw = read_json_object(path)
        except CheckpointError as error:
            raise CheckpointError(
                error.what, where=error.where, got=error.got, do=CONVERT_AGAIN
            ) from None
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"{MANIFEST_NAME} is not that of a converted store",
                where=directory,
                got=_shown(raw.get("format", "no format")),
                expected=FORMAT,
                do="name a directory that convert.py wrote, or one in Hugging Face format",
            )
        version = raw.get("format_version")
        if type(version) is not int:
            raise _malformed(directory, "format_version", version)
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            raise CheckpointError(
                f"the store is of a {'newer' if newer else 'former'} format version",
                where=directory,
                got=version,
                expected=FORMAT_VERSION,
                do=f"update jmoe, or {CONVERT_AGAIN}" if newer else CONVERT_AGAIN,
            )
        return cls(
            quant=_parse_quant(directory, raw.get("quant")),
            method=_parse(directory, raw, "method", lambda value: value in METHODS),
            source=_parse(directory, raw, "source", lambda value: isinstance(value, dict)),
            config_sha256=_parse(directory, raw, "config_sha256", _is_sha256),
            files=_parse_files(directory, raw.get("files")),
        )

    def check_config(self, directory: Path) -> None:
        """Raises CheckpointError if config.json is not the one that was converted."""
        sha256 = hash_file(directory / CONFIG_NAME)
        if sha256 != self.config_sha256:
            raise CheckpointError(
                f"{CONFIG_NAME} was changed after the conversion",
                where=directory,
                got=f"sha256 {sha256}",
                expected=f"sha256 {self.config_sha256}, as {MANIFEST_NAME} says",
                do=f"put the former {CONFIG_NAME} back, or {CONVERT_AGAIN}",
            )

    def check_files(self, directory: Path, num_layers: int) -> None:
        """Compares names and sizes of the files with the manifest.

        Args:
          directory: the store.
          num_layers: how many layers config.json speaks of.

        Raises:
          CheckpointError: the manifest does not list what a store of so many layers has, or
            files are missing or of another size.
        """
        needed = {CONFIG_NAME, SHARED_NAME, *map(experts_name, range(num_layers))}
        listed = {name for name in self.files if name not in SIDE_FILES}
        if needed != listed:
            missing, extra = sorted(needed - listed), sorted(listed - needed)
            raise CheckpointError(
                f"{MANIFEST_NAME} does not list the files of a store of {num_layers} layers",
                where=directory,
                got=first_few([f"no {name}" for name in missing] + extra),
                do=CONVERT_AGAIN,
            )
        for name, entry in self.files.items():
            try:
                num_bytes = os.stat(directory / name).st_size
            except FileNotFoundError:
                raise CheckpointError(
                    f"{name} is missing, which {MANIFEST_NAME} lists",
                    where=directory,
                    do=f"copy the whole directory again, or {CONVERT_AGAIN}",
                ) from None
            except OSError as error:
                raise CheckpointError(
                    f"{name} cannot be read", where=directory, got=error.strerror
                ) from None
            if num_bytes != entry.num_bytes:
                cut = num_bytes < entry.num_bytes
                raise CheckpointError(
                    f"{name} is {'truncated' if cut else 'longer than it was'}",
                    where=directory,
                    got=f"{num_bytes} bytes",
                    expected=f"{entry.num_bytes} bytes, as {MANIFEST_NAME} says",
                    do=f"copy the whole directory again, or {CONVERT_AGAIN}",
                )

    def check_contents(self, directory: Path, on_bytes: OnBytes = ignore_bytes) -> None:
        """Reads every file and compares its hash with the manifest.

        Args:
          directory: the store.
          on_bytes: told how many bytes were read, piece by piece.

        Raises:
          CheckpointError: naming the first file whose contents differ or that cannot be read.
        """
        for name, entry in self.files.items():
            sha256 = hash_file(directory / name, on_bytes)
            if sha256 != entry.sha256:
                raise CheckpointError(
                    f"{name} does not hold what the conversion wrote",
                    where=directory,
                    got=f"sha256 {sha256}",
                    expected=f"sha256 {entry.sha256}, as {MANIFEST_NAME} says",
                    do=f"copy the whole directory again, or {CONVERT_AGAIN}",
                )

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry.num_bytes for entry in self.files.values())


def is_store(directory: Path) -> bool:
    """Whether a model directory is a converted store rather than in Hugging Face format."""
    return os.path.exists(directory / MANIFEST_NAME)


def require_complete(directory: Path) -> None:
    """Raises CheckpointError if a directory is what an interrupted conversion left behind."""
    has_manifest, has_journal, has_weights = (
        any(os.path.exists(directory / name) for name in names)
        for names in ((MANIFEST_NAME,), (PROGRESS_NAME,), (INDEX_NAME, SINGLE_NAME))
    )
    if directory.absolute().name.endswith(PARTIAL_SUFFIX):
        interrupted = has_manifest or has_journal
    else:
        interrupted = has_journal and not (has_manifest or has_weights)
    if interrupted:
        raise CheckpointError(
            "the conversion of this model was interrupted or is still under way",
            where=directory,
            do="run convert.py with the same flags and --resume",
        )


def check_quant(manifest: Manifest, requested: str | None) -> None:
    """Refuses a store that is in other formats than the user asked for.

    Args:
      manifest: of the store.
      requested: a quantization in text form; None is whatever the store has.

    Raises:
      ConfigError: they differ, or there is no such quantization.
    """
    if requested is None:
        return
    spec = parse_spec(requested)
    if _formats(spec) != _formats(manifest.quant):
        raise ConfigError(
            "the store is in another quantization than the one asked for",
            got=f"{manifest.quant} in the store",
            expected=str(spec),
            do="leave --quant out, or convert the original model to that quantization",
        )


def hash_file(path: Path, on_bytes: OnBytes = ignore_bytes) -> str:
    """SHA-256 of a file in hexadecimal (CheckpointError if it cannot be read)."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                on_bytes(count)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read", where=path.parent, got=error.strerror
        ) from None
    return digest.hexdigest()


def _formats(spec: QuantSpec) -> tuple[object, ...]:
    return spec.attention, *spec.experts_formats, spec.embeddings, spec.head


def _parse_quant(directory: Path, value: Any) -> QuantSpec:
    if not isinstance(value, dict) or not value:
        raise _malformed(directory, "quant", value)
    try:
        return parse_spec(",".join(f"{name}={fmt}" for name, fmt in value.items()))
    except ConfigError as error:
        raise CheckpointError(
            f"{MANIFEST_NAME} names a quantization that jmoe does not know",
            where=directory,
            got=f"{_shown(value)}: {error.what}",
            do=f"update jmoe, or {CONVERT_AGAIN}",
        ) from None


def _parse_files(directory: Path, value: Any) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise _malformed(directory, "files", value)
    files = {}
    for name, entry in value.items():
        match entry:
            case {"bytes": int(num_bytes), "sha256": str(sha256)} if (
                type(num_bytes) is int and num_bytes >= 0 and _is_sha256(sha256)
            ):
                pass
            case _:
                raise _malformed(directory, f"files, {printable(name)}", entry)
        if not _FILE_NAME.fullmatch(name) or name in (MANIFEST_NAME, PROGRESS_NAME):
            raise CheckpointError(
                f"{MANIFEST_NAME} lists something that is not a file of a store",
                where=directory,
                got=printable(name),
                expected="plain file names",
                do="do not use this directory unless you trust its source",
            )
        files[name] = FileEntry(num_bytes, sha256)
    return files


def _parse(directory: Path, raw: dict, key: str, is_valid: Callable[[Any], bool]) -> Any:
    value = raw.get(key)
    if not is_valid(value):
        raise _malformed(directory, key, value)
    return value


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _malformed(directory: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{MANIFEST_NAME} is damaged: {key} is {'missing' if value is None else 'malformed'}",
        where=directory,
        got=None if value is None else _shown(value),
        do=CONVERT_AGAIN,
    )


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value)[:200])
