"""Quantizing: how far a weight may be from what was stored, whatever the weights are."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.errors import ConfigError
from jmoe.quant.quant_array import dequantize, validate
from jmoe.quant.solver import METHODS, check_method, quantize
from tests.quant import cases
from tests.quant.cases import quant_format

# Float32 arithmetic of the solver, in steps of the stored scale.
ROUNDING = 1e-3

METHODS_AND_FORMATS = [("rtn", fmt) for fmt in cases.FORMATS] + [
    ("hqq", fmt) for fmt in cases.HQQ_FORMATS
]


def assert_errors_are_within_half_a_step(w, array):
    """Of every weight that the codes of its group can reach."""
    fmt = array.format
    scales, zeros = (values[..., None] for values in cases.read_parameters(array))
    w = cases.by_group(w.astype(np.float64), fmt)
    error = np.abs(w - cases.by_group(cases.reference_dequantize(array), fmt))
    half = scales * (0.5 + ROUNDING)
    reached = (w >= -zeros * scales - half) & (w <= (fmt.max_code - zeros) * scales + half)
    assert np.all(scales >= 0)
    assert np.all(error[reached] <= np.broadcast_to(half, w.shape)[reached] + cases.TINY)


def assert_clipping_is_what_second_level_rounding_costs(w, array):
    """Round-to-nearest covers the whole group, up to the rounding of scale and zero point."""
    fmt = array.format
    scales, zeros = cases.read_parameters(array)
    if array.nested is None:
        scale_error, zero_error = scales * 2**-8, np.abs(zeros) * 2**-8
    else:
        nested = np.asarray(array.nested, np.float64)
        steps = np.repeat(nested, scales.shape[-1] // nested.shape[-2], axis=-2)
        scale_error = steps[..., 0] * 0.501
        zero_error = 0 * zeros if array.zeros is None else steps[..., 2] * 0.501
    # Zero points are at most one range outside of the codes.
    bound = scales * (0.5 + zero_error + ROUNDING) + 2.1 * fmt.max_code * scale_error
    w = cases.by_group(w.astype(np.float64), fmt)
    error = np.abs(w - cases.by_group(cases.reference_dequantize(array), fmt)).max(axis=-1)
    # Where the scale is below the smallest number, so is the group but for max_code.
    assert np.all(error <= bound + 2 * fmt.max_code * cases.TINY)


@pytest.mark.parametrize(("method", "fmt"), METHODS_AND_FORMATS, ids=str)
def test_errors_of_special_weights_are_bounded(method, fmt):
    array, finite = cases.quantized_special(fmt, method)
    assert bool(finite)
    validate(array)
    assert array.shape == (cases.STACK, cases.ROWS, cases.COLUMNS)
    w = cases.special_weights()
    assert_errors_are_within_half_a_step(w, array)
    if method == "rtn":
        assert_clipping_is_what_second_level_rounding_costs(w, array)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([("rtn", quant_format(text)) for text in ("4g64", "4g32s")])
    | st.sampled_from([("hqq", fmt) for fmt in cases.HQQ_FORMATS[:3]]),
    st.integers(0, 2**32 - 1),
    st.floats(-25, 25),
    st.floats(-3, 3),
    st.floats(0, 6),
)
def test_errors_of_any_weights_are_bounded(method_and_format, seed, log_size, shift, spread):
    """Weights of any size, off centre by any share of it, and of groups of unequal size."""
    method, fmt = method_and_format
    generator = np.random.default_rng(seed)
    shape = (cases.STACK, cases.ROWS, cases.COLUMNS // 16, 16)
    sizes = np.exp(generator.normal(size=(*shape[:-1], 1)) * spread / 3 + log_size)
    w = sizes * (shift + generator.standard_t(3, size=shape))
    w = w.reshape(cases.special_weights().shape).astype(np.float32)
    array, finite = quantize(jnp.asarray(w), fmt, method)
    assert bool(finite)
    assert_errors_are_within_half_a_step(w, array)
    if method == "rtn":
        assert_clipping_is_what_second_level_rounding_costs(w, array)


@pytest.mark.parametrize("text", ["4g64", "2g16", "8g64sf"])
def test_zero_stays_zero_and_a_constant_is_kept(text):
    fmt = quant_format(text)
    names = list(cases.special_rows(np.random.default_rng(0)))
    for method in METHODS if fmt in cases.HQQ_FORMATS else METHODS[:1]:
        array, _ = cases.quantized_special(fmt, method)
        back = np.asarray(cases.decode(array))
        assert np.all(back[:, names.index("all zero")] == 0)
        for name in ("constant", "constant and negative"):
            w = cases.special_weights()[:, names.index(name)]
            # The stored scale of a flat format has eight bits.
            np.testing.assert_allclose(back[:, names.index(name)], w, rtol=4e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_numbers_are_reported(bad, method):
    w = cases.special_weights().copy()
    w[1, 3, 17] = bad
    assert not bool(quantize(jnp.asarray(w), quant_format("4g64"), method).finite)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["4g64", "3g16"])
def test_rows_do_not_depend_on_each_other(method, text):
    """Quantized in pieces or in another order, rows have the same bits."""
    fmt = quant_format(text)
    whole = cases.quantized_special(fmt, method).array.parts()
    w = cases.special_weights()
    pieces = [quantize(jnp.asarray(w[:, first : first + 7]), fmt, method) for first in (0, 7)]
    turned = quantize(jnp.asarray(w[::-1, ::-1]), fmt, method)
    for name, part in whole.items():
        together = np.concatenate([piece.array.parts()[name] for piece in pieces], axis=1)
        np.testing.assert_array_equal(together, part)
        np.testing.assert_array_equal(turned.array.parts()[name][::-1, ::-1], part)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_quantized_as_well_as_among_others(method):
    """Of a few thousand weights XLA makes other code, and HQQ's sums may round otherwise."""
    fmt = quant_format("4g64")
    w = cases.special_weights()
    together = cases.reference_dequantize(cases.quantized_special(fmt, method).array)
    for row in range(cases.ROWS):
        alone = cases.reference_dequantize(quantize(jnp.asarray(w[1, [row]]), fmt, method).array)
        if method == "rtn":
            np.testing.assert_array_equal(alone, together[1, [row]])
        else:
            errors = [np.sum((back - w[1, [row]]) ** 2) for back in (alone, together[1, [row]])]
            assert errors[0] == pytest.approx(errors[1], rel=0.05, abs=1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_quantized_as_their_float32_values(dtype):
    fmt = quant_format("4g64")
    normal = np.random.default_rng(0).normal(size=cases.special_weights().shape)
    narrow = jnp.asarray(normal, dtype)
    array, _ = quantize(narrow, fmt, "rtn")
    expected, _ = quantize(narrow.astype(jnp.float32), fmt, "rtn")
    for name, part in expected.parts().items():
        np.testing.assert_array_equal(array.parts()[name], part)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_is_nowhere_worse_than_round_to_nearest_by_its_own_measure(bits):
    """Group by group: squared errors weighted by the squares of the weights.

    Rows of one group each, so that no second-level rounding comes between.
    """
    fmt = quant_format(f"{bits}g64")
    generator = np.random.default_rng(bits)
    w = generator.standard_t(4, (512, 64)).astype(np.float32)
    w[:8] *= np.float32(1e-3)
    w[8:16] += np.float32(20)

    def measure(method):
        back = cases.reference_dequantize(quantize(jnp.asarray(w), fmt, method).array)
        return np.sum(w.astype(np.float64) ** 2 * (w - back) ** 2, axis=-1)

    rtn, hqq = measure("rtn"), measure("hqq")
    assert np.all(hqq <= rtn * (1 + 1e-4))
    # And it is no mere copy: of few bits it gains a good deal.
    assert np.mean(hqq < rtn * 0.99) > (0.3 if bits < 8 else 0.1)


def test_symmetric_formats_leave_hqq_nothing_to_choose():
    fmt = quant_format("4g32s")
    w = jnp.asarray(cases.special_weights())
    rtn, hqq = (quantize(w, fmt, method).array.parts() for method in METHODS)
    for name, part in rtn.items():
        np.testing.assert_array_equal(hqq[name], part)


def test_odd_rows_and_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match="does not divide the rows"):
        quantize(jnp.zeros((4, 100)), quant_format("4g64"), "rtn")
    with pytest.raises(ConfigError, match="unknown quantization method"):
        check_method("gptq")
    for method in METHODS:
        check_method(method)


@pytest.mark.parametrize("method", METHODS)
def test_small_groups_survive_beside_zeros_and_an_outlier(method):
    w = 1e-3 * np.random.default_rng(0).standard_normal((1, 512), np.float32)
    w[0, :16], w[0, 16] = 0, 3
    fmt = quant_format("4g16")
    kept = np.asarray(dequantize(quantize(jnp.asarray(w), fmt, method).array))[0, 32:]
    assert np.abs(kept - w[0, 32:]).max() < 3 / 15 / 255  # half a step of their scale's codes
    assert np.count_nonzero(kept) > 400
