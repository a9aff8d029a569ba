"""The library of host kernels: found, checked, loaded, or a true reason why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmoe import native
from jmoe.native import library
from tests.native.stub_library import compile_stub

_ROOT = Path(__file__).parents[2]


def _run(program: str, **environ: str) -> str:
    """What a fresh process prints: one process loads the library once."""
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith("JMOE_")}
    imports = "from jmoe import native\nfrom jmoe.native import library"
    result = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{program}"],
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"} | environ,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _reason(**environ: str) -> str:
    return _run("print(native.status().reason)", **environ).rstrip("\n")


def _cause(function, *args) -> str:
    with pytest.raises(library._UnavailableError) as caught:
        function(*args)
    return f"{caught.value.cause}: {caught.value.do}" if caught.value.do else caught.value.cause


# The library of this checkout.


def test_an_available_library_has_every_operation():
    status = native.status()
    if not status.available:
        assert library.library() is None
        pytest.skip(status.reason)
    found = library.library()
    assert found is not None
    assert all(hasattr(found, target) for target in library.TARGETS)
    assert status.isa in found.jmoe_isas().decode().split(",")
    assert status.reason.startswith("host kernels: ")
    native.require()


def test_every_supported_instruction_set_can_be_named():
    if not native.status().available:
        pytest.skip(native.status().reason)
    found = library.library()
    assert found is not None
    *_, last = found.jmoe_isas().decode().split(",")
    assert last == "portable"  # which every machine has
    environ = {name: os.environ[name] for name in os.environ if name == "JMOE_NATIVE_LIBRARY"}
    assert _run("print(native.status().isa)", JMOE_ISA=last, **environ) == "portable\n"


# Which file.


def test_switched_off():
    assert _reason(JMOE_NATIVE="0") == (
        "host kernels: not available (switched off by JMOE_NATIVE=0); a CPU computes through XLA, "
        "more slowly"
    )


def test_a_switch_that_is_neither_on_nor_off_is_told(tmp_path: Path):
    cause = _cause(library._find, tmp_path, {"JMOE_NATIVE": "off"})
    assert cause == "JMOE_NATIVE=off is neither 0 nor 1"


def test_a_named_file_that_is_not_there_is_told(tmp_path: Path):
    (tmp_path / "_kernels.so").touch()
    named = tmp_path / "other.so"
    environ = {"JMOE_NATIVE_LIBRARY": str(named)}
    cause = _cause(library._find, tmp_path, environ)
    assert cause == f"JMOE_NATIVE_LIBRARY={named} is not a file"
    named.touch()
    assert library._find(tmp_path, environ) == named
    assert library._find(tmp_path, {"JMOE_NATIVE": "1"}) == tmp_path / "_kernels.so"


def test_a_library_that_was_never_built_is_told(tmp_path: Path):
    assert _cause(library._find, tmp_path, {}) == (
        "not built: install jmoe again (pip install -e .)"
    )


def test_why_an_install_built_none_is_repeated(tmp_path: Path):
    failure = tmp_path / "_kernels.failed.txt"
    failure.write_text("no compiler was found\ninstall one\n")
    assert _cause(library._find, tmp_path, {}) == "no compiler was found: install one"
    failure.write_text("compiling failed\n\n$ cmake\nerror: 1\nerror: 2\n")
    cause = _cause(library._find, tmp_path, {})
    assert cause == f"compiling failed: see {failure}, then install jmoe again"
    for damaged in (b"", b"\xff\xfe"):
        failure.write_bytes(damaged)
        assert "\n" not in _cause(library._find, tmp_path, {})


# What is in it.


def test_a_file_that_is_no_library_is_told(tmp_path: Path):
    path = tmp_path / "text.so"
    path.write_text("not an ELF file")
    assert _cause(library._open, path).startswith(f"cannot be loaded: {path}: ")


def test_a_library_of_something_else_is_told(tmp_path: Path):
    path = compile_stub(tmp_path, "-Djmoe_abi_version=other")
    assert _cause(library._open, path) == f"{path} is not a library of jmoe's kernels"


def test_a_library_of_another_version_is_told(tmp_path: Path):
    path = compile_stub(tmp_path, abi_version=library.ABI_VERSION + 1)
    assert _cause(library._open, path) == (
        f"{path} has interface {library.ABI_VERSION + 1}, this version of jmoe needs "
        f"{library.ABI_VERSION}: install jmoe again"
    )


def test_a_library_without_an_operation_is_told(tmp_path: Path):
    *others, last = library.TARGETS
    path = compile_stub(tmp_path, targets=tuple(others))
    assert _cause(library._open, path) == (
        f"incomplete: {path}: undefined symbol: {last}: install jmoe again"
    )


def test_a_sound_library_is_loaded_once_for_all_threads(tmp_path: Path):
    program = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as threads:
    found = list(threads.map(lambda _: (native.status(), library.library()), range(64)))
assert len({(id(status), id(lib)) for status, lib in found}) == 1
native.require()
print(native.status().reason)
"""
    stub = str(compile_stub(tmp_path, "-DHANDLERS"))
    printed = _run(program, JMOE_NATIVE_LIBRARY=stub)
    assert printed == "host kernels: AVX-512 with VNNI\n"


def test_an_instruction_set_by_name(tmp_path: Path):
    found = library._open(compile_stub(tmp_path))
    assert library._choose_isa(found, "") == "vnni"
    assert library._choose_isa(found, "portable") == "portable"
    assert _cause(library._choose_isa, found, "avx2") == (
        "JMOE_ISA=avx2 is not among vnni, portable here"
    )


def test_an_unknown_instruction_set_is_not_replaced_by_another(tmp_path: Path):
    program = """
import jmoe
try:
    native.require()
except jmoe.ConfigError as error:
    print(error)
print(library.library(), native.status().available)
"""
    stub = str(compile_stub(tmp_path))
    assert _run(program, JMOE_NATIVE_LIBRARY=stub, JMOE_ISA="neon").splitlines() == [
        "the host kernels are not available",
        "  got: JMOE_ISA=neon is not among vnni, portable here",
        "None False",
    ]


def test_a_library_for_a_later_jax_leaves_this_one_working(tmp_path: Path):
    program = """
import jax.numpy as jnp
print(native.status().reason)
print(jnp.ones(2) + 1)
"""
    stub = str(compile_stub(tmp_path, "-DHANDLERS", "-DFFI_MINOR=999"))
    reason, computed = _run(program, JMOE_NATIVE_LIBRARY=stub).splitlines()
    assert "refused by jaxlib " in reason
    assert "built for version 0.999 of XLA's FFI, this one has 0." in reason
    assert computed == "[2. 2.]"


def test_without_a_cpu_backend_they_cannot_be_used(tmp_path: Path):
    reason = _reason(JAX_PLATFORMS="nonsense", JMOE_NATIVE_LIBRARY=str(compile_stub(tmp_path)))
    assert "JAX has no CPU backend here: JAX_PLATFORMS=nonsense" in reason
