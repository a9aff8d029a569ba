"""config.json to ModelConfig, and parameters to checkpoint tensors."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.config import RopeConfig
from jmoe.errors import ConfigError
from jmoe.models import decoder, families
from tests.models.configs import mixtral_json, small_config

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


@pytest.mark.parametrize(("name", "billions"), [("mixtral-8x7b", 46.70), ("mixtral-8x22b", 140.63)])
def test_known_models_have_their_published_size(name, billions):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    config = families.config_from_json(raw, name)
    shapes = [parameter.shape for parameter in decoder.abstract_parameters(config).values()]
    assert sum(map(math.prod, shapes)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_old_and_new_rope_spelling_mean_the_same():
    old = small_config(rope_theta=5e5, rope_scaling={"type": "default"})
    new = small_config(rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert old == new
    assert old.rope == RopeConfig(theta=5e5)


def test_defaults_are_those_of_transformers():
    config = small_config(
        rope_theta=None, rms_norm_eps=None, num_experts_per_tok=None, tie_word_embeddings=None
    )
    assert config.rope.theta == 1e6
    assert config.norm.eps == 1e-5
    assert config.router.top_k == 2
    assert config.head_dim == 8
    assert not config.tie_word_embeddings


def test_sliding_window_applies_to_every_layer():
    assert small_config(sliding_window=16).sliding_windows == (16, 16)
    assert small_config().sliding_windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"model_type": 7}, "model_type=7 is not supported"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is not usable"),
        ({"hidden_size": True}, "hidden_size is not usable"),
        ({"hidden_size": 0}, "hidden_size is not usable"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is not usable"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is not usable"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is not usable"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is not usable"),
        ({"rope_parameters": [1]}, "rope_parameters is not usable"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok exceeds the number of experts"),
        ({"num_attention_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "contradict"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_setting_that_would_change_results_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as caught:
        small_config(**changes)
    assert message in str(caught.value)
    assert "a test" in str(caught.value)


def test_settings_without_effect_pass():
    config = small_config(
        torch_dtype="bfloat16",
        router_aux_loss_coef=0.02,
        attention_bias=False,
        _name_or_path="somewhere",
        unsloth_version="2026.1",
    )
    assert config == small_config()


@given(
    st.dictionaries(
        st.sampled_from([*mixtral_json(), "rope_parameters", "quantization_config", "new"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-4, 300) | st.floats() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.text(max_size=4), inner, max_size=2)
            ),
            max_leaves=3,
        ),
        max_size=3,
    )
)
def test_no_config_fails_without_a_typed_error(changes):
    try:
        families.config_from_json(mixtral_json() | changes, "a test")
    except ConfigError as error:
        assert error.where is not None


def test_every_tensor_of_the_embedded_model_is_named_once():
    import jmoe

    directory = Path(jmoe.__file__).parent / "data" / "tiny-mixtral"
    config = families.config_from_json(
        json.loads((directory / "config.json").read_text()), directory
    )
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    expected, optional = families.tensor_shapes(config)
    assert set(expected) == set(index["weight_map"])
    assert not optional


def test_a_tied_head_may_be_stored_and_need_not_be():
    expected, optional = families.tensor_shapes(small_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in expected
    assert optional == {"lm_head.weight": (64, 32)}


def test_derived_tensors_of_old_checkpoints_are_ignored():
    config = small_config()
    assert families.is_ignored_tensor(config, "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not families.is_ignored_tensor(config, "model.layers.3.self_attn.q_proj.bias")
