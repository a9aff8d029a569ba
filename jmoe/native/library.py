"""Finds, checks and loads the library of host kernels, and says why where there is none.

Environment:
  JMOE_NATIVE=0 switches the kernels off.
  JMOE_NATIVE_LIBRARY=FILE loads this library instead of the one that installing jmoe built.
  JMOE_ISA=NAME uses this instruction set instead of the best one: vnni, avx512, avx2 or portable.
"""

import ctypes
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax

from jmoe.errors import ConfigError

# Counts up whenever the arguments of an operation change; jmoe_abi_version() in csrc/cpu.cpp.
ABI_VERSION = 1

# XLA's handlers: symbols of the library, and the names under which XLA knows them.
TARGETS = (
    "jmoe_linear",
    "jmoe_experts",
    "jmoe_experts_of_arrays",
    "jmoe_attend",
    "jmoe_read",
)

_DIRECTORY = Path(__file__).parent
_ISA_NAMES = {
    "vnni": "AVX-512 with VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "portable": "portable C++",
}
_REINSTALL = "install jmoe again"
_API_VERSIONS = re.compile(
    r"handler's API version \(([\d.]+)\).* framework's API version \(([\d.]+)\)"
)
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Whether the host kernels can be used in this process.

    Attributes:
      available: whether ``library`` returns one, and its operations are registered with XLA.
      isa: the instruction set in use; None if they are not available.
      cause: why they are not available; else empty.
      do: what would make them available; empty if they are, or if nothing is wrong.
    """

    available: bool
    isa: str | None
    cause: str = ""
    do: str = ""

    @property
    def reason(self) -> str:
        """All of it in one line, for people."""
        if self.available:
            return f"host kernels: {_ISA_NAMES.get(self.isa or '', self.isa)}"
        line = (
            f"host kernels: not available ({self.cause}); a CPU computes through XLA, more slowly"
        )
        return f"{line}: {self.do}" if self.do else line


class _UnavailableError(Exception):
    def __init__(self, cause: str, do: str = ""):
        super().__init__(cause)
        self.cause = cause
        self.do = do


def status() -> Status:
    """Loads the library on the first call, and says what came of it. Raises nothing.

    Initializes JAX's backends: what has to be set before that must be set before this.
    """
    return _load()[0]


def library() -> ctypes.CDLL | None:
    """The library, its operations registered with XLA; None if it is not available."""
    return _load()[1]


def require() -> None:
    """Raises ConfigError if the kernels are not available."""
    found = status()
    if not found.available:
        raise ConfigError(
            "the host kernels are not available", got=found.cause, do=found.do or None
        )


def _load() -> tuple[Status, ctypes.CDLL | None]:
    with _lock:  # a cache alone would let two threads load at once
        return _load_once()


@functools.cache
def _load_once() -> tuple[Status, ctypes.CDLL | None]:
    try:
        found = _open(_find(_DIRECTORY, os.environ))
        isa = _choose_isa(found, os.environ.get("JMOE_ISA", ""))
        _register(found)
    except _UnavailableError as error:
        return Status(False, None, error.cause, error.do), None
    return Status(True, isa), found


def _find(directory: Path, environ: Mapping[str, str]) -> Path:
    """The file to load; raises _UnavailableError if there is none, or it is not wanted."""
    wanted = environ.get("JMOE_NATIVE", "1")
    if wanted == "0":
        raise _UnavailableError("switched off by JMOE_NATIVE=0")
    if wanted not in ("", "1"):
        raise _UnavailableError(f"JMOE_NATIVE={wanted} is neither 0 nor 1")
    if named := environ.get("JMOE_NATIVE_LIBRARY"):
        if not Path(named).is_file():
            raise _UnavailableError(f"JMOE_NATIVE_LIBRARY={named} is not a file")
        return Path(named)
    path = directory / "_kernels.so"
    if path.is_file():
        return path
    failure = directory / "_kernels.failed.txt"  # of hatch_build.py: why, what to do, output
    try:
        cause, do = (failure.read_text(errors="replace") + "\n\n").split("\n")[:2]
    except OSError:
        raise _UnavailableError("not built", f"{_REINSTALL} (pip install -e .)") from None
    raise _UnavailableError(cause, do or f"see {failure}, then {_REINSTALL}")


def _open(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise _UnavailableError(f"cannot be loaded: {_one_line(error)}", _REINSTALL) from None
    try:
        abi_version = found.jmoe_abi_version()
    except AttributeError:
        raise _UnavailableError(f"{path} is not a library of jmoe's kernels") from None
    if abi_version != ABI_VERSION:
        cause = f"{path} has interface {abi_version}, this version of jmoe needs {ABI_VERSION}"
        raise _UnavailableError(cause, _REINSTALL)
    try:
        for function in (found.jmoe_isas, found.jmoe_isa):
            function.restype = ctypes.c_char_p
        found.jmoe_set_isa.argtypes = [ctypes.c_char_p]
        for target in TARGETS:
            getattr(found, target)
    except AttributeError as error:
        raise _UnavailableError(f"incomplete: {_one_line(error)}", _REINSTALL) from None
    return found


def _choose_isa(found: ctypes.CDLL, name: str) -> str:
    """Selects an instruction set by name, or leaves the best one; returns what is in use.

    A name that this processor does not have is no reason to take another one: whoever names one
    wants to measure or to test it.
    """
    if name and found.jmoe_set_isa(os.fsencode(name)) != 0:
        names = found.jmoe_isas().decode().replace(",", ", ")
        raise _UnavailableError(f"JMOE_ISA={name} is not among {names} here")
    return found.jmoe_isa().decode()


def _register(found: ctypes.CDLL) -> None:
    # A handler is registered, and perhaps refused, when there is a CPU client. If there is none yet
    # the refusal comes while JAX makes one, which then fails as a whole.
    try:
        jax.devices("cpu")
    except (RuntimeError, AssertionError):
        platforms = os.environ.get("JAX_PLATFORMS")
        raise _UnavailableError(f"JAX has no CPU backend here: JAX_PLATFORMS={platforms}") from None
    try:
        for target in TARGETS:
            handler = jax.ffi.pycapsule(getattr(found, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except Exception as error:  # of whatever type the version of jaxlib has
        text = _one_line(error)
        if versions := _API_VERSIONS.search(text):
            built, has = versions.groups()
            text = f"built for version {built} of XLA's FFI, this one has {has}"
        cause = f"refused by jaxlib {version('jaxlib')}: {text}"
        raise _UnavailableError(cause, _REINSTALL) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
