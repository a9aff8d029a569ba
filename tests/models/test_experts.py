"""Both forms of the experts against a plain loop, and the layout of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.models.experts import ExpertForm, Experts, choose_form, combine, plan_blocks
from jmoe.models.linear import ACCELERATOR_TILE_BYTES, CPU_TILE_BYTES
from jmoe.models.router import Routing
from jmoe.quant.spec import parse_spec
from tests.models.configs import small_config
from tests.quant.cases import nmse, random_expert_blobs

# A row of these weights has 128 or 192 bytes: tiles of 16 rows, and of one.
FORMS = [
    ExpertForm("reduce"),
    *(ExpertForm("blocks", rows) for rows in (1, 3, 4, 16)),
    *(ExpertForm("blocks", 4, tile_bytes) for tile_bytes in (2048, 100, 10**9)),
    ExpertForm("blocks", 4, None, reduce=True),
]


def reference(experts: Experts, x_TD: np.ndarray, routing: Routing) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    weights = {"w1": experts.w1, "w3": experts.w3, "w2": experts.w2}
    weights = {name: np.asarray(w[...], np.float64) for name, w in weights.items()}
    return reference_of(weights, x_TD, routing)


def reference_of(weights: dict[str, np.ndarray], x_TD: np.ndarray, routing: Routing) -> np.ndarray:
    w1, w3, w2 = weights["w1"], weights["w3"], weights["w2"]
    out = np.zeros(x_TD.shape)
    for t, x in enumerate(np.asarray(x_TD, np.float64)):
        for k, e in enumerate(np.asarray(routing.expert_ids_TK)[t]):
            gate = w1[e] @ x
            hidden = gate / (1 + np.exp(-gate)) * (w3[e] @ x)
            out[t] += float(routing.weights_TK[t, k]) * (w2[e] @ hidden)
    return out


def make(num_tokens: int, top_k: int, seed: int = 0):
    config = small_config(num_experts_per_tok=top_k)
    experts = Experts(config, "float32", None)
    generator = np.random.default_rng(seed)
    for name, shape in {"w1": (4, 48, 32), "w3": (4, 48, 32), "w2": (4, 32, 48)}.items():
        values = generator.normal(size=shape) * shape[-1] ** -0.5
        setattr(experts, name, nnx.Param(jnp.asarray(values, jnp.float32)))
    x_TD = jnp.asarray(generator.normal(size=(num_tokens, 32)), jnp.float32)
    ids = np.stack([generator.permutation(4)[:top_k] for _ in range(num_tokens)])
    weights = generator.uniform(size=(num_tokens, top_k))
    probs = jnp.zeros((num_tokens, 4))
    return (
        experts,
        x_TD,
        Routing(jnp.asarray(weights, jnp.float32), jnp.asarray(ids, jnp.int32), probs),
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 2), (3, 1), (11, 4), (17, 2)])
def test_every_form_equals_a_loop_over_tokens(form, num_tokens, top_k):
    experts, x_TD, routing = make(num_tokens, top_k)
    out = experts(x_TD, routing, jnp.ones(num_tokens, bool), form)
    expected = reference(experts, np.asarray(x_TD), routing)
    error = np.sum((np.asarray(out) - expected) ** 2) / np.sum(expected**2)
    assert error < 1e-12


BLOB_SPECS = (
    "bf16",
    "f32",
    "experts=8g16sf",
    "experts=4g16",
    "experts=2g16",
    "experts=3g16,experts_down=4g16f",
)
BLOB_FORMS = [
    ExpertForm("reduce"),
    ExpertForm("blocks", 4),
    ExpertForm("blocks", 4, 2048),
    ExpertForm("blocks", 4, None, True),
]
# Of float32 sums; dense blobs and their weights are exact in both.
MAX_BLOB_NMSE = 1e-11


@pytest.mark.parametrize("form", BLOB_FORMS, ids=str)
@pytest.mark.parametrize("text", BLOB_SPECS)
def test_experts_in_blobs_equal_their_dequantized_weights(text, form):
    spec = parse_spec(text)
    num_tokens = 4 if form.kind == "reduce" else 11
    _, x_TD, routing = make(num_tokens, 2)
    experts = Experts(small_config(), "float32", spec)
    assert experts.layout is not None
    blobs, weights = random_expert_blobs(experts.layout, 4)
    experts.blobs = nnx.Param(jnp.asarray(blobs))
    out = run_experts(nnx.split(experts), x_TD, routing, form)
    expected = reference_of(weights, np.asarray(x_TD), routing)
    assert nmse(out, expected) < MAX_BLOB_NMSE


@functools.partial(jax.jit, static_argnums=3)
def run_experts(parts, x_TD, routing, form):
    return nnx.merge(*parts)(x_TD, routing, jnp.ones(len(x_TD), bool), form)


def test_padding_changes_nothing_for_real_tokens():
    experts, x_TD, routing = make(9, 2)
    valid = jnp.array([True, False, True, True, False, True, True, False, True])
    form = ExpertForm("blocks", 4)
    every = np.asarray(experts(x_TD, routing, jnp.ones(9, bool), form))
    some = np.asarray(experts(x_TD, routing, valid, form))
    np.testing.assert_array_equal(some[valid], every[valid])
    np.testing.assert_array_equal(some[~np.asarray(valid)], 0)


def test_a_token_never_depends_on_its_neighbours():
    experts, x_TD, routing = make(12, 2)
    form = ExpertForm("blocks", 4)
    valid = jnp.ones(12, bool)
    before = np.asarray(experts(x_TD, routing, valid, form))
    after = np.asarray(experts(x_TD.at[5:].set(jnp.nan), routing, valid, form))
    np.testing.assert_array_equal(before[:5], after[:5])


def test_outputs_are_added_in_top_k_order():
    # In float32, (1 + 1e8) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows.
    y_TKD = jnp.array([[[1.0], [1e8], [-1e8]], [[1e8], [-1e8], [1.0]]])
    out = jax.jit(combine)(y_TKD, jnp.ones((2, 3)))
    np.testing.assert_array_equal(np.asarray(out), [[0.0], [1.0]])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.permutations(range(5)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 6),
    st.data(),
)
def test_block_plan_places_every_assignment_once(permutations, top_k, block_rows, data):
    ids_TK = np.array(permutations, np.int32)[:, :top_k]
    num_tokens = len(ids_TK)
    valid_T = np.array(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    plan = plan_blocks(jnp.asarray(ids_TK), jnp.asarray(valid_T), 5, block_rows)
    token_of_row = np.asarray(plan.token_of_row)
    row_of_assignment = np.asarray(plan.row_of_assignment).reshape(num_tokens, top_k)
    num_rows = len(token_of_row)
    assert num_rows == len(plan.expert_of_block) * block_rows
    assert int(plan.num_blocks) * block_rows <= num_rows

    used = set()
    for t in range(num_tokens):
        for k in range(top_k):
            row = row_of_assignment[t, k]
            if not valid_T[t]:
                assert row == num_rows
                continue
            assert token_of_row[row] == t
            assert plan.expert_of_block[row // block_rows] == ids_TK[t, k]
            assert row // block_rows < plan.num_blocks
            used.add(int(row))
    assert len(used) == top_k * valid_T.sum()
    padding = set(range(num_rows)) - used
    assert all(token_of_row[row] == num_tokens for row in padding)


def test_few_tokens_on_an_accelerator_read_experts_in_place():
    config = small_config()
    assert choose_form(1, config, "gpu") == ExpertForm("reduce")
    assert choose_form(1, config, "cpu") == ExpertForm("blocks", 1, CPU_TILE_BYTES)
    assert choose_form(8, config, "gpu") == ExpertForm("blocks", 4, None, True)
    assert choose_form(4096, config, "gpu") == ExpertForm("blocks", 128, ACCELERATOR_TILE_BYTES)
