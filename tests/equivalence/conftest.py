"""Models that the whole session shares: compiling their programs is what takes the time."""

import pytest

import jmoe
from jmoe import native
from jmoe.api import EMBEDDED_MODEL
from tests.equivalence.checkpoints import RANDOM_MIXTRALS


@pytest.fixture(scope="session")
def llm():
    """The embedded model in float32."""
    return jmoe.load(dtype="float32")


@pytest.fixture(scope="session")
def embedded_reference():
    """The embedded model in transformers, float32."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.equivalence.reference import Reference

    return Reference(EMBEDDED_MODEL)


@pytest.fixture(scope="session", params=RANDOM_MIXTRALS, ids=str)
def pair(request, tmp_path_factory):
    """A random checkpoint in jmoe and in transformers; one at a time."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.equivalence.comparing import Pair

    return Pair.random(request.param, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def host_pair(pair):
    """The same, computed by the host kernels."""
    if not native.status().available:
        pytest.skip(native.status().reason)
    return pair.with_host_kernels()
