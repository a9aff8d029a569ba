"""Hardware files: presets by name, files that the user names, and one kept for this machine.

Presets lie in configs/hardware: beside the package in a source checkout, inside it once it is
installed. What was measured is kept in a directory of the user's, a file for each machine:
JMOE_CACHE_DIR, or jmoe in XDG_CACHE_HOME, or ~/.cache/jmoe.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jmoe.errors import ConfigError
from jmoe.planning.hardware import HardwareSpec
from jmoe.store.json_files import json_lines, read_json_object
from jmoe.store.safetensors_writer import write_file

_PACKAGE = Path(__file__).parents[1]
_DIRECTORIES = (
    _PACKAGE / "configs" / "hardware",
    _PACKAGE.parent / "configs" / "hardware",
)


def preset_names() -> tuple[str, ...]:
    """Names such as rtx4090-ddr5, in alphabetical order."""
    found = (path.stem for directory in _DIRECTORIES for path in directory.glob("*.json"))
    return tuple(sorted(set(found)))


def load_preset(name: str) -> HardwareSpec:
    """A machine that people plan for (ConfigError: there is none of this name)."""
    if name not in preset_names():
        raise ConfigError(
            "there is no hardware of this name",
            got=repr(name[:100]),
            expected=f"one of {', '.join(preset_names())}; or a hardware file",
        )
    paths = (directory / f"{name}.json" for directory in _DIRECTORIES)
    return read_spec(next(path for path in paths if path.is_file()))


def read_spec(path: str | os.PathLike[str]) -> HardwareSpec:
    """Reads a hardware file.

    Raises:
      ConfigError: there is none, or it is damaged, of another version, or not of a machine.
    """
    path = Path(path)
    try:
        return HardwareSpec.from_json(read_json_object(path, ConfigError))
    except ConfigError as error:
        raise ConfigError(
            error.what,
            where=path,
            got=error.got,
            expected=error.expected,
            do="name another hardware file, or measure this machine (--recalibrate)",
        ) from None


def read_named(text: str, fingerprint: str | None = None) -> HardwareSpec:
    """What --hardware says: a preset, or a file.

    Args:
      text: the name of a preset, or a path.
      fingerprint: of this machine, if a measured file must be of it. One without a fingerprint
        is of any machine.

    Raises:
      ConfigError: there is no such hardware, it is not usable, or was measured on another machine
        or with other libraries.
    """
    if not os.path.exists(text):
        return load_preset(text)
    spec = read_spec(text)
    if fingerprint is not None and spec.fingerprint not in ("", fingerprint):
        raise ConfigError(
            "the hardware file was measured on another machine, or with other libraries",
            where=text,
            got=spec.fingerprint,
            expected=fingerprint,
            do="leave it out, so that this machine is measured; or empty its fingerprint, to take "
            "it as it is",
        )
    return spec


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where measurements of this machine are kept."""
    if named := environ.get("JMOE_CACHE_DIR"):
        return Path(named)
    base = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification says to ignore relative ones
        return Path(base) / "jmoe"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # a container's user without a name
        return Path(tempfile.gettempdir()) / f"jmoe-{os.getuid()}"
    return Path(home) / ".cache" / "jmoe"


def cache_path(fingerprint: str, directory: Path) -> Path:
    """The file of a machine."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    return directory / f"hardware-{digest}.json"


def load_cached(fingerprint: str, directory: Path) -> tuple[HardwareSpec | None, str | None]:
    """What was measured on this machine before.

    Returns:
      None if there is nothing to be used; and if there is something else, a sentence about it.
    """
    path = cache_path(fingerprint, directory)
    if not os.path.lexists(path):
        return None, None
    try:
        spec = read_spec(path)
    except ConfigError as error:
        got = f" ({error.got})" if error.got is not None else ""
        return None, f"calibration ignored: {error.what}{got}, in {path}"
    if spec.fingerprint != fingerprint:
        return None, f"calibration ignored: {path} is of another machine ({spec.fingerprint})"
    return spec, None


def save_cached(spec: HardwareSpec, directory: Path) -> str | None:
    """Keeps what was measured; returns a sentence if the file system refuses."""
    path = cache_path(spec.fingerprint, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory, path.name, to_text(spec).encode())
    except OSError as error:
        return f"calibration not kept: {path}: {error.strerror or error}"
    return None


def to_text(spec: HardwareSpec) -> str:
    """The contents of a hardware file, a line for each field."""
    return json_lines(spec.to_json())
