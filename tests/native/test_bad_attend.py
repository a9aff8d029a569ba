"""Wrong calls of jmoe_attend and jmoe_read; test_bad_calls.py has the others, and random ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.native.bad_calls import Call, good_call
from tests.native.test_bad_calls import refused

pytestmark = pytest.mark.usefixtures("kernels")

B, L, H, P = 2, 3, 4, 8
G, M = 2, 5


def attend(*changes: tuple[str, tuple[int, ...]], dtype="float32") -> Call:
    call = good_call("attend")
    for name, shape in changes:
        of_array = "int32" if name == "start" else dtype
        call.arrays[name] = np.zeros(shape, jnp.dtype(of_array))
    return call


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (L, H, P), "q has the wrong rank: [3, 4, 8]"),
        ("q", (B, L, H, P, 1), "q has the wrong rank: [2, 3, 4, 8, 1]"),
        ("q", (B, L, H, P + 1), "k has the wrong shape: [2, 2, 5, 8]"),
        ("q", (B + 1, L, H, P), "k has the wrong shape: [2, 2, 5, 8]"),
        ("q", (B, L, H + 1, P), "the result has the wrong shape: [2, 3, 4, 8]"),
        ("q", (B, L + 1, H, P), "the result has the wrong shape: [2, 3, 4, 8]"),
        ("k", (), "k has the wrong rank: []"),
        ("k", (B, G * M, P), "k has the wrong rank: [2, 10, 8]"),
        ("k", (B, G, M, P - 1), "k has the wrong shape: [2, 2, 5, 7]"),
        ("k", (B, G, M + 1, P), "v has the wrong shape: [2, 2, 5, 8]"),
        ("v", (B, G, M - 1, P), "v has the wrong shape: [2, 2, 4, 8]"),
        ("v", (B, G, M), "v has the wrong rank: [2, 2, 5]"),
        ("start", (), "start_B has the wrong rank: []"),
        ("start", (B - 1,), "start_B has the wrong shape: [1]"),
        ("start", (B, 1), "start_B has the wrong rank: [2, 1]"),
    ],
)
def test_shapes(name, shape, message):
    assert refused(attend((name, shape))) == message


@pytest.mark.parametrize("name", ["q", "k", "v", "start"])
@pytest.mark.parametrize("dtype", ["float16", "int32", "uint8", "complex64", "float32"])
def test_types(name, dtype):
    call = good_call("attend")
    if call.arrays[name].dtype != dtype:
        call.arrays[name] = call.arrays[name].astype(dtype)
        assert " has the wrong type: " in refused(call)


def test_keys_and_values_of_two_types():
    call = attend(("v", (B, G, M, P)), dtype=jnp.bfloat16)
    assert refused(call) == "v has the wrong type: [2, 2, 5, 8]"


@pytest.mark.parametrize("num_kv_heads", [0, 3, 8])
def test_heads_that_cannot_be_grouped(num_kv_heads):
    shape = (B, num_kv_heads, M, P)
    call = attend(("k", shape), ("v", shape))
    assert refused(call) == "the key-value heads do not divide the query heads"


def test_too_large_heads():
    call = attend(("q", (1, 1, 1, 1025)), ("k", (1, 1, 2, 1025)), ("v", (1, 1, 2, 1025)))
    call.arrays["start"] = np.zeros(1, np.int32)
    call.result = ((1, 1, 1, 1025), "float32")
    assert refused(call) == "the head dimension is above 1024"


@pytest.mark.parametrize("name", ["window", "num_threads"])
def test_negative_attributes(name):
    for value in (-1, -(2**63)):
        call = good_call("attend")
        call.attributes[name] = value
        assert refused(call) == f"{name} is negative"


@pytest.mark.parametrize("result", [((2,), "int32"), ((1,), "uint32"), ((2, 1), "uint32")])
def test_reading_into_another_result(result):
    call = good_call("read")
    call.result = result
    assert refused(call).startswith("the result has the wrong ")
