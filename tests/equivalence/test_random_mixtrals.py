"""Random Mixtral checkpoints of several shapes give what transformers gives, in float32."""

import numpy as np
import pytest

from jmoe.config import RopeConfig
from jmoe.models import families
from jmoe.models.rope import default_frequencies
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.json_files import read_config_json
from tests.equivalence import checkpoints
from tests.equivalence.measures import LONG_PROMPT, MAX_NMSE, PROMPT_LENGTHS


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_logits_of_every_position_equal_those_of_transformers(pair, length):
    assert pair.max_nmse(length) <= MAX_NMSE


def test_prompts_of_several_chunks_equal_transformers_which_takes_them_at_once(pair):
    assert pair.max_nmse(LONG_PROMPT) <= MAX_NMSE


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_continuation_equals_that_of_transformers(pair, length):
    assert pair.greedy(length) == pair.reference_greedy(length)


def test_greedy_continuations_of_an_unequal_batch_equal_those_of_transformers(pair):
    expected = [pair.reference_greedy(length) for length in PROMPT_LENGTHS]
    assert pair.greedy_batch() == expected


def test_greedy_continuation_after_several_chunks_equals_that_of_transformers(pair):
    if pair.engine.config.sliding_windows[0] is None:
        pytest.skip("covered by the checkpoint with a sliding window, whose cache is the hardest")
    assert pair.greedy(LONG_PROMPT) == pair.reference_greedy(LONG_PROMPT)


@pytest.mark.parametrize("length", [*PROMPT_LENGTHS, LONG_PROMPT])
def test_host_kernels_give_the_logits_of_transformers(host_pair, length):
    assert host_pair.max_nmse(length) <= MAX_NMSE


def test_host_kernels_continue_an_unequal_batch_like_transformers(host_pair):
    expected = [host_pair.reference_greedy(length) for length in PROMPT_LENGTHS]
    assert host_pair.greedy_batch() == expected


def test_both_spellings_of_the_rotary_settings_give_equal_configs(pair):
    config_json = read_config_json(pair.directory)
    if "rope_parameters" not in config_json:
        pytest.skip("this one is stored in the old spelling")
    old_json = checkpoints.with_old_rope_spelling(config_json)
    assert "rope_parameters" not in old_json
    assert families.config_from_json(old_json, "old") == pair.engine.config


def test_checkpoints_cover_the_shapes_they_are_named_for(pair):
    """A change of transformers' defaults must not quietly take a shape out of the tests."""
    config, config_json = pair.engine.config, read_config_json(pair.directory)
    tensors = Checkpoint.open(pair.directory).tensors
    match pair.name:
        case "gqa1-experts4":
            assert config.num_attention_heads == config.num_key_value_heads
            assert config.router.num_experts == 4
        case "gqa2-experts8-bf16-sharded":
            assert config.num_attention_heads == 2 * config.num_key_value_heads
            assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
            assert len({tensor.file for tensor in tensors.values()}) > 5
        case "multiquery-top1-f16":
            assert (config.num_key_value_heads, config.router.top_k) == (1, 1)
            assert {tensor.dtype for tensor in tensors.values()} == {"F16"}
        case "gqa4-window16-old-rope":
            assert config.num_attention_heads == 4 * config.num_key_value_heads
            assert set(config.sliding_windows) == {16}
            assert config_json["rope_theta"] == config.rope.theta == 5e5
            assert "rope_parameters" not in config_json
        case "head-dim24-tied-top3":
            assert config.head_dim * config.num_attention_heads != config.hidden_size
            assert "lm_head.weight" not in tensors
            assert config.router.top_k == 3
        case name:
            pytest.fail(f"nothing says what {name} is for")


@pytest.mark.parametrize("head_dim", [24, 32, 96, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rotary_frequencies_equal_those_of_transformers(head_dim, theta):
    """An error in the last place would grow with the position, and show only in long texts."""
    pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    hf_config = pytest.importorskip("transformers").MixtralConfig(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    expected = modeling.MixtralRotaryEmbedding(hf_config).inv_freq.numpy()
    got = default_frequencies(RopeConfig(theta=theta), head_dim)
    np.testing.assert_array_max_ulp(got, expected, maxulp=2)
    assert np.abs(got - expected).max() * 32768 < 1e-3
