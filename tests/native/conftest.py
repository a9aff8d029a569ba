"""The kernels of every instruction set that this machine has."""

import ctypes
from collections.abc import Iterator

import pytest

from jmoe import native
from jmoe.native import library

# All that there are. Not asked of the library: collecting tests must not start JAX.
ISAS = ("vnni", "avx512", "avx2", "portable")


@pytest.fixture
def kernels() -> ctypes.CDLL:
    """The library; skips the test where there is none."""
    found = library.library()
    if found is None:
        pytest.skip(native.status().reason)
    return found


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> Iterator[str]:
    """An instruction set that is in use for one test."""
    before = kernels.jmoe_isa()
    if kernels.jmoe_set_isa(request.param.encode()) != 0:
        offered = kernels.jmoe_isas().decode()
        pytest.skip(f"{request.param} is not among the instruction sets here: {offered}")
    yield request.param
    assert kernels.jmoe_set_isa(before) == 0
