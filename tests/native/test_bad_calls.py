"""Wrong calls of the operations are errors that say what is wrong, and never crashes."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.quant.layout import aligned_empty
from tests.native.bad_calls import MAKERS, Call, good_call, is_refused

_ROOT = Path(__file__).parents[2]


def refused(call: Call) -> str:
    """What the operation says is wrong, less the name of the type that it got."""
    text = is_refused(call)
    assert text.startswith(f"INVALID_ARGUMENT: {call.target}: "), text or "no error"
    return re.sub(r"type \S+ (?=\[)", "", text.split(": ", 2)[2].splitlines()[0])


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_calls_that_others_are_made_of_are_good(kernels, name):
    assert is_refused(good_call(name)) == ""


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("bits", 5, "bits is not 2, 3, 4 or 8"),
        ("bits", -4, "bits is not 2, 3, 4 or 8"),
        ("bits", 2, "codes has the wrong shape: [6, 64]"),
        ("group_size", 24, "group_size is not a power of two from 16 to 256"),
        ("group_size", 0, "group_size is not a power of two from 16 to 256"),
        ("group_size", 512, "group_size is not a power of two from 16 to 256"),
        ("group_size", 256, "the group size does not divide the columns"),
        ("group_size", 32, "scales has the wrong shape: [6, 8]"),
        ("symmetric", 2, "a flag is not 0 or 1"),
        ("symmetric", 1, "nested has the wrong type: [6, 8]"),
        ("nested", -1, "a flag is not 0 or 1"),
        ("nested", 0, "scales has the wrong type: [6, 8]"),
        ("activation_bits", 7, "activation_bits is not 8, 16 or 24"),
        ("num_threads", -1, "num_threads is negative"),
    ],
)
def test_attributes_of_linear(kernels, attribute, value, message):
    call = good_call("linear 4g16")
    call.attributes[attribute] = value
    assert refused(call) == message


@pytest.mark.parametrize("num_threads", [2**31 + 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_no_number_of_threads_is_too_many(kernels, name, num_threads):
    call = good_call(name)
    expected = call()
    call.attributes["num_threads"] = num_threads
    np.testing.assert_array_equal(call(), expected)


def test_three_bits_in_small_groups(kernels):
    call = good_call("linear 3g32")
    call.attributes["group_size"] = 16
    assert refused(call) == "3 bits in groups of 16 have no kernel"


@pytest.mark.parametrize(
    ("array", "changed", "message"),
    [
        ("x", np.ones((3, 128), np.float16), "x has the wrong type: [3, 128]"),
        ("x", np.ones(128, np.float32), "x has the wrong rank: [128]"),
        ("x", np.ones((3, 127), np.float32), "the group size does not divide the columns"),
        ("x", np.ones((3, 0), np.float32), "x has no columns"),
        ("x", np.ones((3, 144), np.float32), "codes has the wrong shape: [6, 64]"),
        ("codes", np.ones((6, 64), np.int8), "codes has the wrong type: [6, 64]"),
        ("codes", np.ones((1, 6, 64), np.uint8), "codes has the wrong rank: [1, 6, 64]"),
        ("scales", np.ones((5, 8), np.uint8), "scales has the wrong shape: [5, 8]"),
        ("zeros", np.ones((6, 7), np.uint8), "zeros has the wrong shape: [6, 7]"),
        ("zeros", np.ones(48, np.uint8), "zeros has the wrong rank: [48]"),
        ("nested", np.ones((6, 3, 4), np.float32), "nested does not divide the groups"),
        ("nested", np.ones((6, 0, 4), np.float32), "nested does not divide the groups"),
        ("nested", np.ones((6, 16, 4), np.float32), "nested does not divide the groups"),
        ("nested", np.ones((6, 1, 2), np.float32), "nested has the wrong shape: [6, 1, 2]"),
        ("nested", np.ones((6, 1), np.float32), "nested has the wrong rank: [6, 1]"),
        ("nested", None, "nested is missing"),
        ("codes", None, "codes has the wrong shape: [6, 8]"),
        ("more", np.ones(1, np.float32), "there are more arrays than the format has"),
    ],
)
def test_arrays_of_linear(kernels, array, changed, message):
    call = good_call("linear 4g16")
    if changed is None:
        del call.arrays[array]
    else:
        call.arrays[array] = changed
    assert refused(call) == message


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.ones((6, 9), np.float32), "the matrix has the wrong number of columns: [6, 9]"),
        (np.ones((1, 6, 128), np.float32), "the matrix has the wrong rank: [1, 6, 128]"),
        (np.ones((6, 128), np.float16), "the matrix has the wrong type: [6, 128]"),
        (np.ones((7, 128), np.float32), "the result has the wrong shape: [3, 6]"),
    ],
)
def test_plain_matrices_of_linear(kernels, w, message):
    call = good_call("linear f32")
    call.arrays["w"] = w
    assert refused(call) == message


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "read"])
def test_results_of_another_shape_or_type(kernels, name):
    (num_rows, *others), dtype = good_call(name).result
    for result in (
        ((num_rows - 1, *others), dtype),
        ((num_rows, *others, 1), dtype),
        ((num_rows, *others), "float16"),
        ((num_rows, *others), "bfloat16"),
    ):
        call = good_call(name)
        call.result = result
        assert refused(call).startswith("the result has ")


CODES, SCALES, ZEROS, NESTED = 4, 5, 6, 7  # places in a matrix's part of the layout


@pytest.mark.parametrize("matrix", [0, 1, 2])
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 5, "bits is not 2, 3, 4 or 8"),
        (0, 0, "plain experts are not floats"),
        (1, 24, "group_size is not a power of two from 16 to 256"),
        (1, 256, "the group size does not divide the columns"),
        (2, 2, "a flag is not 0 or 1"),
        (3, -1, "nested does not divide the groups"),
        (3, 3, "nested does not divide the groups"),
        (3, 2**32 + 1, "nested does not divide the groups"),
        (CODES, -64, "codes lie outside of the blob"),
        (CODES, 2**62, "codes lie outside of the blob"),
        (CODES, -(2**63), "codes lie outside of the blob"),
        (SCALES, 2**63 - 1, "scales lie outside of the blob"),
        (SCALES, -1, "scales lie outside of the blob"),
        (ZEROS, -(2**63), "zeros lie outside of the blob"),
        (NESTED, 2**40, "nested lie outside of the blob"),
        (NESTED, 6, "nested are misaligned in the blob"),
    ],
)
def test_layouts(kernels, matrix, place, value, message):
    call = good_call("experts 4g16")
    call.attributes["layout"][8 * matrix + place] = value
    assert refused(call) == message


def test_parts_end_with_the_blob(kernels):
    for place in (CODES, SCALES, ZEROS, NESTED):
        call = good_call("experts 4g16")
        call.attributes["layout"][place] = call.arrays["blobs"].shape[1] - 4
        assert refused(call).endswith(" lie outside of the blob")
    # The last part of the last expert's blob.
    call = good_call("experts bf16")
    call.arrays["blobs"] = call.arrays["blobs"][:, :-2]
    assert refused(call) == "values lie outside of the blob"
    call.arrays["blobs"] = call.arrays["blobs"][:, :-1]
    assert refused(call) == "blobs are not a multiple of four bytes"


def test_misaligned_parts_of_blobs(kernels):
    call = good_call("experts bf16")
    call.attributes["layout"][CODES] = 1
    assert refused(call) == "values are misaligned in the blob"
    call = good_call("experts mixed")
    call.attributes["layout"][16 + SCALES] += 1  # of w2, in bfloat16
    assert refused(call) == "scales are misaligned in the blob"


@pytest.mark.parametrize("length", [0, 1, 23, 25, 48])
def test_layouts_of_another_length(kernels, length):
    call = good_call("experts 4g16")
    call.attributes["layout"] = np.resize(call.attributes["layout"], length)
    assert refused(call) == "the layout does not have 24 numbers"


def test_gate_and_up_projections_of_two_formats(kernels):
    call = good_call("experts 4g16")
    call.attributes["layout"][[8, 9]] = 2, 32  # both fit into the room that there is
    assert refused(call) == "w1 and w3 are not of one format"


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("hidden_size", 32, "x has the wrong shape: [3, 64]"),
        ("hidden_size", 0, "hidden_size is out of range"),
        ("hidden_size", -64, "hidden_size is out of range"),
        ("intermediate_size", 0, "intermediate_size is out of range"),
        ("intermediate_size", 2**31, "intermediate_size is out of range"),
        ("intermediate_size", -(2**63), "intermediate_size is out of range"),
        ("intermediate_size", 2**30, "codes lie outside of the blob"),
        ("intermediate_size", 40, "the group size does not divide the columns"),
        ("activation_bits", 0, "activation_bits is not 8, 16 or 24"),
        ("num_threads", -(2**63), "num_threads is negative"),
    ],
)
def test_attributes_of_experts(kernels, attribute, value, message):
    call = good_call("experts 4g16")
    call.attributes[attribute] = value
    assert refused(call) == message


ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize("name", ["experts 4g16", "experts bf16", "experts_of_arrays"])
@pytest.mark.parametrize(
    ("array", "changed", "message"),
    [
        ("x", np.ones((3, 64), np.int32), "x has the wrong type: [3, 64]"),
        ("x", np.ones((2, 64), np.float32), "expert_ids has the wrong shape: [3, 2]"),
        ("expert_ids", ONES, "expert_ids has the wrong type: [3, 2]"),
        ("expert_ids", np.ones(6, np.int32), "expert_ids has the wrong rank: [6]"),
        ("expert_ids", np.ones((3, 1), np.int32), "weights has the wrong shape: [3, 2]"),
        ("weights", ONES.astype(jnp.bfloat16), "weights has the wrong type: [3, 2]"),
        ("weights", np.ones((2, 3), np.float32), "weights has the wrong shape: [2, 3]"),
        ("valid", np.ones(3, np.uint8), "valid has the wrong type: [3]"),
        ("valid", np.ones(4, bool), "valid has the wrong shape: [4]"),
    ],
)
def test_tokens_of_experts(kernels, name, array, changed, message):
    call = good_call(name)
    call.arrays[array] = changed
    assert refused(call) == message


@pytest.mark.parametrize(
    ("array", "changed", "message"),
    [
        ("w1", np.ones((32, 64), np.float32), "w1 has the wrong rank: [32, 64]"),
        ("w1", np.ones((0, 32, 64), np.float32), "there is no expert"),
        ("w1", np.ones((3, 32, 64), np.float16), "w1 has the wrong type: [3, 32, 64]"),
        ("w3", np.ones((2, 32, 64), np.float32), "w3 has the wrong shape: [2, 32, 64]"),
        ("w2", np.ones((3, 32, 64), np.float32), "w2 has the wrong shape: [3, 32, 64]"),
        ("w2", np.ones((3, 64, 32), jnp.bfloat16), "the weights are not of one type"),
    ],
)
def test_arrays_of_experts(kernels, array, changed, message):
    call = good_call("experts_of_arrays")
    call.arrays[array] = changed
    assert refused(call) == message


def test_blobs_of_another_type(kernels):
    call = good_call("experts 4g16")
    call.arrays["blobs"] = call.arrays["blobs"].view(np.int8)
    assert refused(call) == "blobs are not uint8, bfloat16 or float32"
    call.arrays["blobs"] = call.arrays["blobs"].view(np.float32)
    assert refused(call) == "blobs of few bits are not uint8"
    call.arrays["blobs"] = call.arrays["blobs"].view(np.uint8).reshape(-1)
    assert refused(call).startswith("blobs has the wrong rank: ")


def test_no_choice_of_experts_is_a_sum_of_none(kernels):
    for name in ("experts 4g16", "experts_of_arrays"):
        call = good_call(name)
        call.arrays["expert_ids"] = np.ones((3, 0), np.int32)
        call.arrays["weights"] = np.ones((3, 0), np.float32)
        np.testing.assert_array_equal(call(), 0)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_arrays_may_begin_anywhere(kernels, name):
    """JAX copies what is not aligned, so that kernels need not."""
    call = good_call(name)
    expected = call()
    for array_name, array in call.arrays.items():
        buffer = aligned_empty((array.nbytes + 1,), np.uint8)
        moved = buffer[1:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        call.arrays[array_name] = moved
    np.testing.assert_array_equal(call(), expected)


def test_random_calls_never_crash(kernels):
    result = subprocess.run(
        [sys.executable, "-m", "tests.native.bad_calls"],
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert "calls refused" in result.stdout
