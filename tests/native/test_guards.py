"""Kernels stay within their arrays: called next to memory that no process may touch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jmoe.native import library

_SOURCE = Path(__file__).with_name("guards.cpp")
_HEADERS = Path(library.__file__).parent / "csrc"

# Each calls every kernel for another shape; the same ones in every run.
NUM_ROUNDS = 150


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program; skips where there is no compiler, or not the kernels' headers."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not _HEADERS.is_dir():
        pytest.skip(f"{_HEADERS} is not installed")
    program = tmp_path_factory.mktemp("guards") / "guards"
    command = [compiler, "-std=c++17", "-O1", f"-I{_HEADERS}", _SOURCE, "-o", program, "-ldl"]
    # Without the sanitizers that a library under test may need.
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=environ)
    return program


@pytest.mark.parametrize("seed", [1, 2])
def test_kernels_stay_within_their_arrays(kernels, isa, guards, seed):
    command = [guards, kernels._name, isa, str(seed), str(NUM_ROUNDS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stderr, result.stdout) == ("", f"{NUM_ROUNDS} rounds\n")
    assert result.returncode == 0
