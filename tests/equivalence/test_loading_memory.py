"""Loading needs the memory of the model and of one tensor, not of two models."""

import sys

import pytest

from jmoe.api import EMBEDDED_MODEL
from tests.equivalence import peak_memory
from tests.equivalence.checkpoints import write_large_mixtral

# For the tokenizer, the configuration and the allocator; a second copy of one stacked
# parameter would take four times as much.
SLACK_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    largest_tensor_bytes = write_large_mixtral(directory, EMBEDDED_MODEL / "tokenizer.json")
    yield directory, largest_tensor_bytes
    (directory / "model.safetensors").unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_loading_is_the_model_and_one_tensor(large, dtype):
    directory, largest_tensor_bytes = large
    figures = peak_memory.measure(directory, dtype)
    needed_bytes = figures["peak_bytes"] - figures["baseline_bytes"]
    assert needed_bytes >= figures["model_bytes"]
    assert needed_bytes <= figures["model_bytes"] + largest_tensor_bytes + SLACK_BYTES
