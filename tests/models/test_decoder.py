"""The decoder as a whole: structure, chunks and steps agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models import decoder, kv_cache
from jmoe.models.experts import ExpertForm
from jmoe.models.random_weights import random_parameters
from tests.models.configs import small_config


@functools.partial(jax.jit, static_argnums=(0, 6))
def forward(config, parameters, token_ids_BL, start_B, valid_BL, cache, form):
    model = decoder.rebuild(config, "float32", parameters)
    hidden, cache, routings = model(token_ids_BL, start_B, valid_BL, cache, form)
    return model.logits(hidden), cache, routings


BLOCKS = ExpertForm("blocks", 4)


def run(config, parameters, token_ids, sizes, form=BLOCKS):
    """Logits of one sequence that goes through the model in pieces of these sizes."""
    cache = kv_cache.init_cache(config, 1, 128, "float32")
    logits, start = [], 0
    for size in sizes:
        piece = jnp.asarray(token_ids[start : start + size])[None]
        out, cache, _ = forward(
            config, parameters, piece, jnp.array([start]), jnp.ones((1, size), bool), cache, form
        )
        logits.append(np.asarray(out)[0])
        start += size
    return np.concatenate(logits)


@pytest.mark.parametrize("window", [None, 5])
def test_pieces_of_any_size_give_the_same_logits(window):
    config = small_config(sliding_window=window)
    parameters = random_parameters(config, "float32")
    token_ids = np.random.default_rng(0).integers(0, 64, 24)
    whole = run(config, parameters, token_ids, [24])
    for sizes in ([12, 12], [8, 15, 1], [1] * 24):
        pieces = run(config, parameters, token_ids, sizes)
        np.testing.assert_allclose(pieces, whole, rtol=1e-3, atol=2e-5)


def test_a_window_hides_what_lies_before_it():
    config = small_config(sliding_window=4, num_hidden_layers=1)
    parameters = random_parameters(config, "float32")
    token_ids = np.random.default_rng(0).integers(0, 64, 12)
    other = token_ids.copy()
    other[0] = (other[0] + 1) % 64
    before, after = (run(config, parameters, ids, [12]) for ids in (token_ids, other))
    np.testing.assert_array_equal(before[4:], after[4:])
    assert not np.allclose(before[:4], after[:4])


def test_forms_of_the_experts_agree_through_the_whole_model():
    config = small_config()
    parameters = random_parameters(config, "float32")
    token_ids = np.random.default_rng(0).integers(0, 64, 3)
    blocks = run(config, parameters, token_ids, [3])
    reduce = run(config, parameters, token_ids, [1, 1, 1], ExpertForm("reduce"))
    np.testing.assert_allclose(reduce, blocks, rtol=1e-3, atol=2e-5)


def test_parameters_come_in_the_order_of_their_names():
    config = small_config(num_hidden_layers=12)
    parameters = random_parameters(config, "bfloat16")
    expected = decoder.abstract_parameters(config, "bfloat16")
    assert [p.shape for p in parameters] == [p.shape for p in expected.values()]
    model = decoder.rebuild(config, "bfloat16", parameters)
    by_name = dict(zip(expected, parameters, strict=True))
    assert model.layers[11].experts.w2[...] is by_name["layers.11.experts.w2"]
    assert model.layers[2].attention.q_proj[...] is by_name["layers.2.attention.q_proj"]


def test_tied_embeddings_have_no_head():
    tied = decoder.abstract_parameters(small_config(tie_word_embeddings=True))
    assert "lm_head" not in tied
    assert "lm_head" in decoder.abstract_parameters(small_config())


def test_the_description_of_a_model_allocates_nothing():
    config = small_config(hidden_size=8192, intermediate_size=65536, num_local_experts=64)
    shapes = decoder.abstract_parameters(config)
    assert shapes["layers.0.experts.w1"].shape == (64, 65536, 8192)
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in shapes.values())
