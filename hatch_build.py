"""Builds the host kernels (jmoe/native/csrc) while jmoe is installed.

A wheel carries the library. An editable install puts it into the source tree, where every
environment that runs from there finds it.

Installing never fails because of the kernels. Without a C++ compiler, without CMake, or if
anything goes wrong, there is no library, and a text file in its place says why: pip shows nothing
of a build that succeeds, so jmoe.native.library says it when jmoe runs.

A library that an editable install has put into the source tree is taken again, by later installs
and wheels, as long as neither it nor anything that it was made from has changed.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PLACE = "jmoe/native"
_SOURCES = "jmoe/native/csrc"
_LIBRARY = "_kernels.so"
_FAILURE = "_kernels.failed.txt"
_FINGERPRINT = "_kernels.fingerprint.txt"


class _NotBuiltError(Exception):
    """Why there is no library.

    Args:
      cause: half a sentence.
      do: the remedy; empty if only the output can tell.
      output: what the failed command printed.
    """

    def __init__(self, cause: str, do: str, output: str = ""):
        super().__init__(cause)
        self.do = do
        self.output = output


class KernelsHook(BuildHookInterface):
    """Called by hatchling for every wheel, editable or not.

    Settings: ``headers`` lists what has to be installed to take XLA's headers from.
    """

    _scratch: tempfile.TemporaryDirectory | None = None

    def dependencies(self) -> list[str]:
        """What the build needs from PyPI, besides hatchling."""
        if not _has_compiler() or _is_current(Path(self.root)):
            return []  # nothing will be built
        wanted = list(self.config["headers"])
        if platform.machine() in ("x86_64", "aarch64", "arm64"):  # there are wheels of both
            if not shutil.which("cmake"):
                wanted.append("cmake>=3.16")
            if not shutil.which("make") and not shutil.which("ninja"):
                wanted.append("ninja")
        return wanted

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        editable = version == "editable"
        built = root / _PLACE / _LIBRARY if _is_current(root) else self._build(root, editable)
        if editable:
            return
        build_data["force_include"][str(built)] = f"{_PLACE}/{built.name}"
        if built.name == _LIBRARY:
            # For any Python, on this kind of machine.
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"

    def _build(self, root: Path, editable: bool) -> Path:
        """Returns the library, or the text that is there instead."""
        self._scratch = tempfile.TemporaryDirectory(prefix="jmoe-kernels-")
        scratch = Path(self._scratch.name)
        place = root / _PLACE if editable else scratch / "wheel"
        place.mkdir(exist_ok=True)
        try:
            _build(root / _SOURCES, scratch / "build", place)
        except Exception as error:  # whatever it is: jmoe works without kernels
            if not isinstance(error, _NotBuiltError):
                error = _NotBuiltError("an error of hatch_build.py", "", repr(error))
            self.app.display_warning(f"host kernels not built: {error}")
            with contextlib.suppress(OSError):  # a source tree may be read-only
                # A library of an earlier install is not what these sources say.
                (place / _LIBRARY).unlink(missing_ok=True)
                # For library.py: a line each, then what is of use to people only.
                (place / _FAILURE).write_text(f"{error}\n{error.do}\n{error.output}")
            return place / _FAILURE
        if editable:
            (place / _FINGERPRINT).write_text(_fingerprint(root))
        return place / _LIBRARY

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._scratch:
            self._scratch.cleanup()


def _has_compiler() -> bool:
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return any(shutil.which(name) for name in named or ("c++", "g++", "clang++"))


def _is_current(root: Path) -> bool:
    """Whether the source tree has a library, made from these sources, that can be loaded here."""
    place = root / _PLACE
    try:
        if (place / _FINGERPRINT).read_text() != _fingerprint(root):
            return False
        ctypes.CDLL(str(place / _LIBRARY))
    except OSError:
        return False
    return True


def _fingerprint(root: Path) -> str:
    """Of the library in the source tree, and of everything that decides how it comes out."""
    contents = hashlib.sha256()
    for name in ("CXX", "CXXFLAGS", "LDFLAGS"):
        contents.update(f"{name}={os.environ.get(name)}\n".encode())
    contents.update(f"{sysconfig.get_platform()}\n".encode())
    files = [path for path in sorted((root / _SOURCES).rglob("*")) if path.is_file()]
    files += [root / name for name in ("hatch_build.py", "pyproject.toml", f"{_PLACE}/{_LIBRARY}")]
    for path in files:
        contents.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        contents.update(path.read_bytes())
    return contents.hexdigest()


def _build(sources: Path, build: Path, place: Path) -> None:
    """Configures and builds in a directory of its own."""
    if not _has_compiler():
        raise _NotBuiltError(
            "no C++ compiler was found when jmoe was installed",
            "install one, such as g++, and install jmoe again",
        )
    cmake = shutil.which("cmake")
    if cmake is None:
        raise _NotBuiltError(
            "no CMake was found when jmoe was installed", "install it, and jmoe again"
        )
    try:
        import jax.ffi
    except ImportError:
        raise _NotBuiltError(
            "no jax was found when jmoe was installed", "install jmoe again, now that there is one"
        ) from None
    generator = [] if shutil.which("make") or not shutil.which("ninja") else ["-G", "Ninja"]
    settings = {"JMOE_FFI_INCLUDE": jax.ffi.include_dir(), "JMOE_OUTPUT_DIRECTORY": place}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    _run(
        "CMake failed when jmoe was installed",
        [cmake, "-S", str(sources), "-B", str(build), *generator, *defines],
    )
    _run(
        "compiling failed when jmoe was installed",
        [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
    )


def _run(failure: str, command: list[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise _NotBuiltError(failure, "", f"$ {shlex.join(command)}\n{done.stdout}")
