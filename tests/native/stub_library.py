"""Small libraries with the symbols of the real one, or without some, to be refused or loaded."""

import os
import shutil
import subprocess
from pathlib import Path

import jax.ffi
import pytest

from jmoe.native import library

_SOURCE = r"""
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

static const char* isa = "vnni";

EXPORT int jmoe_abi_version() { return ABI_VERSION; }
EXPORT const char* jmoe_isas() { return "vnni,portable"; }
EXPORT const char* jmoe_isa() { return isa; }
EXPORT int jmoe_set_isa(const char* name) {
  if (std::strcmp(name, "vnni") != 0 && std::strcmp(name, "portable") != 0) return 1;
  isa = std::strcmp(name, "vnni") == 0 ? "vnni" : "portable";
  return 0;
}

#ifdef HANDLERS
// What XLA accepts, if it accepts the version.
#include "xla/ffi/api/c_api.h"
#ifdef FFI_MINOR
#undef XLA_FFI_API_MINOR
#define XLA_FFI_API_MINOR FFI_MINOR
#endif
#include "xla/ffi/api/ffi.h"
#pragma GCC visibility push(default)
static xla::ffi::Error nothing() { return xla::ffi::Error::Success(); }
#define HANDLER(name) XLA_FFI_DEFINE_HANDLER_SYMBOL(name, nothing, xla::ffi::Ffi::Bind())
#else
#define HANDLER(name) EXPORT void name() {}
#endif

"""


def compile_stub(
    directory: Path,
    *flags: str,
    abi_version: int = library.ABI_VERSION,
    targets: tuple[str, ...] = library.TARGETS,
) -> Path:
    """Compiles a library; skips the test where there is no compiler.

    Args:
      directory: where to.
      flags: -DHANDLERS for operations that can be registered, with -DFFI_MINOR=N for another
        version of XLA's interface.
      abi_version: what the library says its own interface is.
      targets: the operations that it has.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, path = directory / "stub.cpp", directory / "stub.so"
    source.write_text(_SOURCE + "".join(f"HANDLER({target});\n" for target in targets))
    fixed = ("-std=c++17", "-w", "-shared", "-fPIC", f"-isystem{jax.ffi.include_dir()}")
    flags = (*fixed, f"-DABI_VERSION={abi_version}", *flags)
    subprocess.run(
        [compiler, *flags, str(source), "-o", str(path)],
        check=True,
        # Without the sanitizers that a library under test may need.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    return path
