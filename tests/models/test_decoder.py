"""The decoder as a whole: structure, chunks and steps agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models import decoder, kv_cache
from jmoe.models.experts import ExpertForm
from jmoe.models.random_weights import random_parameters
from jmoe.quant.formats import QuantFormat
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.quant_array import from_parts, validate
from jmoe.quant.spec import parse_spec
from tests.models.configs import small_config
from tests.quant.cases import nmse, reference_dequantize


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def forward(config, parameters, token_ids_BL, start_B, valid_BL, cache, form, quant=None):
    model = decoder.rebuild(config, "float32", parameters, quant)
    hidden, cache, routings = model(token_ids_BL, start_B, valid_BL, cache, form)
    return model.logits(hidden), cache, routings


BLOCKS = ExpertForm("blocks", 4)


def run(config, parameters, token_ids, sizes, form=BLOCKS, quant=None):
    """Logits of one sequence that goes through the model in pieces of these sizes."""
    cache = kv_cache.init_cache(config, 1, 128, "float32")
    logits, start = [], 0
    for size in sizes:
        piece = jnp.asarray(token_ids[start : start + size])[None]
        valid = jnp.ones((1, size), bool)
        out, cache, _ = forward(
            config, parameters, piece, jnp.array([start]), valid, cache, form, quant
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


SPECS = {
    "attention and experts": "attention=4g16,experts=2g16",
    "mixed experts": "attention=3g16,experts=3g16,experts_down=4g16f",
    "everything": "attention=8g32sf,experts=4g16s,embeddings=4g32f,head=3g32",
    "head only": "head=8g16",
    "nothing": "bf16",
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("text", SPECS.values(), ids=list(SPECS))
def test_random_parameters_are_those_that_are_described(text, tied):
    config = small_config(tie_word_embeddings=tied)
    quant = parse_spec(text)
    expected = decoder.abstract_parameters(config, "bfloat16", quant)
    parameters = random_parameters(config, "bfloat16", quant=quant)
    for (path, shape), parameter in zip(expected.items(), parameters, strict=True):
        assert (parameter.shape, parameter.dtype) == (shape.shape, shape.dtype), path
    again = random_parameters(config, "bfloat16", quant=quant)
    other = random_parameters(config, "bfloat16", seed=1, quant=quant)
    assert all(np.array_equal(a, b) for a, b in zip(parameters, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parameters, other, strict=True))


def dequantized(config, parameters, quant):
    """The plain parameters that quantized ones stand for, in their order."""
    given = dict(
        zip(decoder.abstract_parameters(config, "float32", quant), parameters, strict=True)
    )
    formats = {"embed_tokens": quant.embeddings, "lm_head": quant.head}
    layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
    plain = []
    for path in decoder.abstract_parameters(config, "float32"):
        module, _, name = path.rpartition(".")
        if name in MATRICES:
            experts = []
            for blob in np.asarray(given[f"{module}.blobs"]).view(np.uint8):
                parts = layout.host_views(np.ascontiguousarray(blob))[name]
                fmt = layout.format(name)
                if isinstance(fmt, QuantFormat):
                    experts.append(reference_dequantize(from_parts(parts, fmt)))
                else:
                    experts.append(parts["values"].astype(np.float32))
            plain.append(jnp.asarray(np.stack(experts), jnp.float32))
        elif path in given:
            plain.append(given[path])
        else:
            prefix = f"{path}."
            parts = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
            fmt = formats.get(path, quant.attention)
            assert isinstance(fmt, QuantFormat)
            array = from_parts(parts, fmt)
            validate(array)
            plain.append(jnp.asarray(reference_dequantize(array), jnp.float32))
    return tuple(plain)


@pytest.mark.parametrize(
    ("text", "tied", "form"),
    [
        (SPECS["attention and experts"], False, BLOCKS),
        (SPECS["attention and experts"], False, ExpertForm("reduce")),
        (SPECS["mixed experts"], False, ExpertForm("blocks", 2, 1000)),
        (SPECS["everything"], False, BLOCKS),
        (SPECS["everything"], True, BLOCKS),
        (SPECS["head only"], False, BLOCKS),
        (SPECS["nothing"], False, BLOCKS),
    ],
)
def test_a_quantized_decoder_is_the_plain_one_with_dequantized_weights(text, tied, form):
    config = small_config(tie_word_embeddings=tied, num_hidden_layers=1)
    quant = parse_spec(text)
    parameters = random_parameters(config, "float32", quant=quant)
    token_ids = np.random.default_rng(0).integers(0, 64, 4)
    got = run(config, parameters, token_ids, [4], form, quant)
    expected = run(config, dequantized(config, parameters, quant), token_ids, [4])
    assert nmse(got, expected) < 1e-10
