"""The experts of a layer in one call, against float64 on the stored weights and against XLA's."""

import functools
import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models.experts import ExpertForm, Experts
from jmoe.models.router import Routing
from jmoe.native import choice, ops
from jmoe.native.choice import HostKernels
from jmoe.quant.formats import QuantFormat
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.spec import parse_spec
from tests.models.configs import small_config
from tests.quant.cases import nmse, random_expert_blobs

NUM_EXPERTS = 5
# NMSE of a layer's output in float32: errors of gate, up and down projections add up.
MAX_NMSE = {8: 1e-3, 16: 2e-8, 24: 2e-12}
# What rounding the output to bfloat16 adds.
BFLOAT16_NMSE = 1e-5
# Tokens and experts of each: one expert has one token, a few or many, in blocks that are not full.
ASSIGNMENTS = [(1, 2), (2, 1), (5, 4), (17, 2), (64, 1)]

# Every number of bits with every size of groups; flat and symmetric ones in turn.
FORMATS = [
    QuantFormat(bits=bits, group_size=size, symmetric=(i + j) % 3 == 0, nested=(i + j) % 2 == 0)
    for i, bits in enumerate((8, 4, 3, 2))
    for j, size in enumerate((16, 32, 64, 128, 256))
]
SPECS = [
    *(f"experts={fmt}" for fmt in FORMATS if choice.supports(fmt)),
    "bf16",
    "f32",
    # Other codes, groups and second-level parameters of w2.
    "experts=3g32,experts_down=4g64",
    "experts=2g16s,experts_down=8g64f",
    "experts=8g16f,experts_down=2g64s",
    "experts=4g256,experts_down=3g64sf",
]
# A format of each kind, for what does not depend on formats much.
SOME_SPECS = ("experts=4g64", "experts=3g32,experts_down=4g64", "experts=8g64sf", "bf16", "f32")


# By group size: numbers of groups that fill no vector, and of rows that fill no tile.
HIDDEN_SIZES = {16: 80, 32: 96, 64: 192, 128: 128, 256: 256}
INTERMEDIATE_SIZES = {16: 112, 32: 160, 64: 64, 128: 256, 256: 256}


class Case(NamedTuple):
    spec: str
    layout: ExpertLayout
    blobs: np.ndarray
    weights: Mapping[str, np.ndarray]  # in float64


@functools.cache
def case(text: str) -> Case:
    spec = parse_spec(text)
    up, _, down = (getattr(fmt, "group_size", 16) for fmt in spec.experts_formats)
    layout = ExpertLayout.of(HIDDEN_SIZES[up], INTERMEDIATE_SIZES[down], spec)
    return Case(text, layout, *random_expert_blobs(layout, NUM_EXPERTS))


class Assigned(NamedTuple):
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    valid: np.ndarray


@functools.cache
def assign(num_tokens: int, top_k: int, hidden_size: int, dtype: str = "float32") -> Assigned:
    generator = np.random.default_rng(num_tokens)
    x = generator.standard_normal((num_tokens, hidden_size), np.float32)
    ids = np.stack([generator.permutation(NUM_EXPERTS)[:top_k] for _ in range(num_tokens)])
    weights = generator.uniform(0.1, 1, size=(num_tokens, top_k)).astype(np.float32)
    valid = np.ones(num_tokens, bool)
    return Assigned(x.astype(jnp.dtype(dtype)), ids.astype(np.int32), weights, valid)


def reference(weights: Mapping[str, np.ndarray], assigned: Assigned) -> np.ndarray:
    """In float64: every token by every expert, of which the chosen ones count."""
    x = assigned.x.astype(np.float64)
    share = np.zeros((len(x), NUM_EXPERTS))
    for k, e in itertools.product(range(assigned.ids.shape[1]), range(NUM_EXPERTS)):
        share[:, e] += (assigned.ids[:, k] == e) * assigned.weights[:, k].astype(np.float64)
    share *= assigned.valid[:, None]
    out = np.zeros(x.shape)
    for e in np.flatnonzero(share.any(axis=0)):
        gate = x @ weights["w1"][e].T
        hidden = gate / (1 + np.exp(-gate)) * (x @ weights["w3"][e].T)
        out += share[:, e, None] * (hidden @ weights["w2"][e].T)
    return out


@functools.partial(jax.jit, static_argnames=("layout", "all_bits", "num_threads"))
def from_blobs(all_assigned, blobs, layout, all_bits=(24,), num_threads=0):
    """One program for many calls: compiling takes longer than running."""
    return [
        {
            bits: ops.experts(a.x, a.ids, a.weights, a.valid, blobs, layout, bits, num_threads)
            for bits in all_bits
        }
        for a in all_assigned
    ]


@functools.partial(jax.jit, static_argnames="num_threads")
def from_arrays(all_assigned, w1, w3, w2, num_threads=0):
    return [
        ops.experts_of_arrays(a.x, a.ids, a.weights, a.valid, w1, w3, w2, num_threads)
        for a in all_assigned
    ]


def call(assigned: Assigned, case: Case, bits: int = 24, num_threads: int = 0) -> np.ndarray:
    return np.array(from_blobs([assigned], case.blobs, case.layout, (bits,), num_threads)[0][bits])


@functools.cache
def expected_outputs(text: str, dtype: str) -> list[np.ndarray]:
    one = case(text)
    return [
        reference(one.weights, assign(*shape, one.layout.hidden_size, dtype))
        for shape in ASSIGNMENTS
    ]


def check(results, all_expected, max_nmse: float) -> None:
    """Compares the outputs of all tokens together: some come out small, of large parts."""
    assert [y.shape for y in results] == [expected.shape for expected in all_expected]
    assert nmse(np.concatenate(results), np.concatenate(all_expected)) < max_nmse


@pytest.mark.parametrize("text", SPECS)
def test_every_format(isa, text):
    _, layout, blobs, _ = case(text)
    all_assigned = [assign(*shape, layout.hidden_size) for shape in ASSIGNMENTS]
    results = from_blobs(all_assigned, blobs, layout, tuple(MAX_NMSE))
    for bits, max_nmse in MAX_NMSE.items():
        y = [of_bits[bits] for of_bits in results]
        check(y, expected_outputs(text, "float32"), max_nmse)


@pytest.mark.parametrize("text", SOME_SPECS)
def test_bfloat16_activations(isa, text):
    _, layout, blobs, _ = case(text)
    all_assigned = [assign(*shape, layout.hidden_size, "bfloat16") for shape in ASSIGNMENTS]
    y = [of_bits[24] for of_bits in from_blobs(all_assigned, blobs, layout)]
    assert all(one.dtype == jnp.bfloat16 for one in y)
    check(y, expected_outputs(text, "bfloat16"), BFLOAT16_NMSE)


def dense_weights(hidden: int, width: int, dtype: str) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(NUM_EXPERTS, width, hidden)] * 2 + [(NUM_EXPERTS, hidden, width)]
    stacks = [generator.standard_normal(shape, np.float32) * shape[-1] ** -0.5 for shape in shapes]
    return [stack.astype(jnp.dtype(dtype)) for stack in stacks]


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "width"), [(3, 1), (37, 67), (160, 48)])
def test_experts_of_arrays(isa, hidden, width, dtype, x_dtype):
    stacks = dense_weights(hidden, width, dtype)
    weights = {name: w.astype(np.float64) for name, w in zip(MATRICES, stacks, strict=True)}
    all_assigned = [assign(*shape, hidden, x_dtype) for shape in ASSIGNMENTS]
    max_nmse = BFLOAT16_NMSE if x_dtype == "bfloat16" else MAX_NMSE[24]
    y = from_arrays(all_assigned, *stacks)
    assert all(one.dtype == x_dtype for one in y)
    check(y, [reference(weights, assigned) for assigned in all_assigned], max_nmse)


# The layer of a model: on the host, and through XLA.

FORM = ExpertForm("blocks", 4)


@functools.partial(jax.jit, static_argnums=3)
def run_layer(parts, x_TD, routing, form):
    return nnx.merge(*parts)(x_TD, routing, jnp.ones(len(x_TD), bool), form)


@pytest.mark.parametrize("text", [None, *SOME_SPECS])
def test_a_layer_on_the_host_equals_xla(isa, text):
    spec = None if text is None else parse_spec(text)
    _, layout, blobs, _ = case(text or "f32")
    config = small_config(
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        num_local_experts=NUM_EXPERTS,
    )
    x, ids, weights, _ = assign(5, 2, layout.hidden_size)
    routing = Routing(jnp.asarray(weights), jnp.asarray(ids), jnp.zeros((5, NUM_EXPERTS)))
    outputs = []
    for host in (None, HostKernels(activation_bits=24)):
        experts = Experts(config, "float32", spec, host)
        assert experts.host == host
        if text is None:
            stacks = dense_weights(layout.hidden_size, layout.intermediate_size, "float32")
            for name, stack in zip(MATRICES, stacks, strict=True):
                setattr(experts, name, nnx.Param(jnp.asarray(stack)))
        else:
            experts.blobs = nnx.Param(jnp.asarray(blobs))
        outputs.append(np.asarray(run_layer(nnx.split(experts), jnp.asarray(x), routing, FORM)))
    assert nmse(outputs[1], outputs[0].astype(np.float64)) < 1e-11


# Which experts count.


@pytest.mark.parametrize("text", SOME_SPECS)
def test_experts_that_no_token_chose_are_not_used(isa, text):
    _, layout, blobs, weights = case(text)
    assigned = assign(17, 2, layout.hidden_size)
    chosen = assigned._replace(ids=assigned.ids % 2 * 3)  # experts 0 and 3, some of them twice
    damaged = blobs.copy()
    for e in (1, 2, 4):
        damaged[e].view(np.uint8)[:] = 0xFF  # NaN in every float type
    results = from_blobs([chosen, chosen], damaged, layout)
    y = np.asarray(results[0][24])
    np.testing.assert_array_equal(y, call(chosen, Case(text, layout, blobs, weights)))
    assert nmse(y, reference(weights, chosen)) < MAX_NMSE[24]


@pytest.mark.parametrize("text", SOME_SPECS)
def test_tokens_that_are_not_valid_come_out_as_zeros(isa, text):
    one = case(text)
    assigned = assign(17, 2, one.layout.hidden_size)
    valid = np.arange(17) % 3 != 0
    some = assigned._replace(valid=valid, x=np.where(valid[:, None], assigned.x, np.nan))
    y = call(some, one)
    np.testing.assert_array_equal(y[~valid], 0)
    # Fewer tokens of an expert may be multiplied in another form, so not the same bits.
    assert nmse(y[valid], reference(one.weights, assigned)[valid]) < MAX_NMSE[24]
    none = assigned._replace(valid=np.zeros(17, bool))
    np.testing.assert_array_equal(call(none, one), 0)


@pytest.mark.parametrize("text", SOME_SPECS)
def test_ids_that_no_expert_has_count_as_none(isa, text):
    one = case(text)
    assigned = assign(17, 2, one.layout.hidden_size)
    ids = assigned.ids.copy()
    ids[[0, 2, 3, 4, 5], [0, 1, 0, 0, 1]] = -1, NUM_EXPERTS, 2**31 - 1, -(2**31), NUM_EXPERTS + 1
    ids[7] = -1
    y = call(assigned._replace(ids=ids), one)
    expected = reference(one.weights, assigned._replace(ids=ids))
    np.testing.assert_array_equal(y[7], 0)
    others = np.arange(17) != 7
    assert nmse(y[others], expected[others]) < MAX_NMSE[24]
    # Not even if their weight is no number.
    weights = np.where((ids >= 0) & (ids < NUM_EXPERTS), assigned.weights, np.nan)
    np.testing.assert_array_equal(call(assigned._replace(ids=ids, weights=weights), one), y)


@pytest.mark.parametrize("text", SOME_SPECS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64])
def test_all_tokens_choose_one_expert(isa, text, num_tokens):
    one = case(text)
    assigned = assign(num_tokens, 2, one.layout.hidden_size)
    ids = np.stack([np.full(num_tokens, 4), np.full(num_tokens, -1)], axis=1).astype(np.int32)
    same = assigned._replace(ids=ids)
    check([call(same, one)], [reference(one.weights, same)], MAX_NMSE[24])
    # And a second time.
    twice = assigned._replace(ids=np.full_like(ids, 4))
    check([call(twice, one)], [reference(one.weights, twice)], MAX_NMSE[24])


@pytest.mark.parametrize("text", SOME_SPECS)
def test_no_tokens(isa, text):
    one = case(text)
    hidden_size = one.layout.hidden_size
    empty = Assigned(*(a[:0] for a in assign(2, 1, hidden_size)))
    assert call(empty, one).shape == (0, hidden_size)


@pytest.mark.parametrize("text", SOME_SPECS)
def test_outputs_are_added_in_top_k_order(isa, text):
    one = case(text)
    x, _, _, valid = assign(1, 1, one.layout.hidden_size)
    # Powers of two: products with them are exact, also where they are not rounded on their own.
    powers = 2.0 ** np.array([10, -3, 0, 9], np.float32)[None]
    parts = [
        call(Assigned(x, np.array([[e]], np.int32), np.ones((1, 1), np.float32), valid), one)
        for e in range(NUM_EXPERTS)
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [4, 0, 3, 1]):
        ids = np.array([order], np.int32)
        expected = np.zeros_like(x)
        for e, power in zip(order, powers[0], strict=True):
            expected += parts[e] * power
        np.testing.assert_array_equal(call(Assigned(x, ids, powers, valid), one), expected)


@pytest.mark.parametrize("text", SOME_SPECS)
def test_a_token_never_depends_on_its_neighbours(isa, text):
    one = case(text)
    assigned = assign(17, 2, one.layout.hidden_size)
    x = assigned.x.copy()
    x[5] = np.nan
    x[9, 0] = np.inf
    before, after = call(assigned, one), call(assigned._replace(x=x), one)
    assert np.all(np.isnan(after[5])) and np.all(np.isnan(after[9]))
    after[[5, 9]] = before[[5, 9]]
    np.testing.assert_array_equal(after, before)


# Threads.


def threading_case(text: str) -> tuple[list[Assigned], Case]:
    one = case(text)
    shapes = [(1, 2), (17, 2), (64, 1)]
    return [assign(*shape, one.layout.hidden_size) for shape in shapes], one


@pytest.mark.parametrize("text", SOME_SPECS)
def test_any_number_of_threads_gives_the_same_bits(isa, text):
    all_assigned, (_, layout, blobs, _) = threading_case(text)
    expected = from_blobs(all_assigned, blobs, layout, (8, 24), 1)
    for num_threads in (2, 5, 0):
        results = from_blobs(all_assigned, blobs, layout, (8, 24), num_threads)
        jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_any_number_of_threads_gives_the_same_bits_of_arrays(isa):
    stacks = dense_weights(160, 111, "bfloat16")
    all_assigned = [assign(17, 2, 160), assign(1, 2, 160, "bfloat16")]
    expected = from_arrays(all_assigned, *stacks, 1)
    for num_threads in (2, 5, 0):
        results = from_arrays(all_assigned, *stacks, num_threads)
        jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_calls_at_the_same_time_give_the_same_bits(isa):
    cases = [threading_case(text) for text in SOME_SPECS]

    def run(i: int) -> list:
        all_assigned, (_, layout, blobs, _) = cases[i % len(cases)]
        return from_blobs(all_assigned, blobs, layout, (8, 24), 5)

    expected = [run(i) for i in range(len(cases))]
    with ThreadPoolExecutor(8) as threads:
        for i, results in enumerate(threads.map(run, range(60))):
            jax.tree.map(np.testing.assert_array_equal, results, expected[i % len(cases)])
