"""Small configurations for tests of the maths."""

from typing import Any

from jmoe.config import ModelConfig
from jmoe.models import families


def mixtral_json(**changes: Any) -> dict[str, Any]:
    """A small config.json of a Mixtral; a change to None removes the setting."""
    settings = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 64,
    }
    return {key: value for key, value in (settings | changes).items() if value is not None}


def small_config(**changes: Any) -> ModelConfig:
    return families.config_from_json(mixtral_json(**changes), "a test")
