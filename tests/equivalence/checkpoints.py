"""Small random Mixtral checkpoints, made by transformers; and a larger one made without it.

The shapes differ where implementations go wrong: grouping of heads, windows, head width,
number of experts, tied head, stored type, sharding, spelling of config.json.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jmoe.models import families
from jmoe.store.json_files import read_config_json

# Weights of this deviation make hidden states of order one, logits far from flat, and a
# router that prefers some experts clearly.
WEIGHT_STD = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RandomMixtral:
    """One checkpoint: what differs from the defaults of ``_DEFAULTS``, and how it is stored."""

    name: str
    changes: dict[str, Any]
    stored_dtype: str = "float32"
    max_shard_size: str = "1GB"
    old_rope_spelling: bool = False

    def __str__(self) -> str:
        return self.name


_DEFAULTS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": WEIGHT_STD,
}

RANDOM_MIXTRALS = (
    RandomMixtral(
        name="gqa1-experts4",
        changes={"num_key_value_heads": 4, "num_local_experts": 4, "num_hidden_layers": 3},
    ),
    RandomMixtral(
        name="gqa2-experts8-bf16-sharded",
        changes={"num_key_value_heads": 2},
        stored_dtype="bfloat16",
        max_shard_size="60KB",
    ),
    RandomMixtral(
        name="multiquery-top1-f16",
        changes={"num_key_value_heads": 1, "num_experts_per_tok": 1, "vocab_size": 257},
        stored_dtype="float16",
    ),
    RandomMixtral(
        name="gqa4-window16-old-rope",
        changes={
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        old_rope_spelling=True,
    ),
    RandomMixtral(
        name="head-dim24-tied-top3",
        changes={
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 24,
            "hidden_size": 80,
            "intermediate_size": 56,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        },
    ),
)


def write_random_mixtral(spec: RandomMixtral, directory: Path) -> None:
    """Writes config.json and weights; the same on every call. Needs torch and transformers."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**(_DEFAULTS | spec.changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they start as ones, which would hide a missing product
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, spec.stored_dtype))
    model.save_pretrained(directory, max_shard_size=spec.max_shard_size)
    if spec.old_rope_spelling:
        config_json = with_old_rope_spelling(read_config_json(directory))
        (directory / "config.json").write_text(json.dumps(config_json))


def with_old_rope_spelling(config_json: dict[str, Any]) -> dict[str, Any]:
    """The same settings as transformers 4 wrote them."""
    old = {key: value for key, value in config_json.items() if key != "rope_parameters"}
    theta = config_json["rope_parameters"]["rope_theta"]
    return old | {"rope_theta": theta, "rope_scaling": None, "torch_dtype": old.pop("dtype")}


def write_large_mixtral(directory: Path, tokenizer_json: Path) -> int:
    """Writes a bfloat16 checkpoint of about 400 MB, complete enough for ``jmoe.load``.

    A parameter of stacked experts is eight times as large as its largest tensor, so that a
    second copy of either shows.

    Returns:
      Bytes of the largest tensor.
    """
    config_json = {
        "model_type": "mixtral",
        "vocab_size": 4096,  # the tokenizer's
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e4,
    }
    (directory / "config.json").write_text(json.dumps(config_json))
    (directory / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    shapes, _ = families.tensor_shapes(families.config_from_json(config_json, directory))
    tensors = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return max(tensor.nbytes for tensor in tensors.values())
