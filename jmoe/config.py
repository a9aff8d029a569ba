"""What a model is: immutable, hashable descriptions, filled in by ``models/families``.

Field names are Hugging Face's. A family's synonyms (``num_local_experts``,
``rope_parameters``, ``block_sparse_moe``) are read there and never reach this module.
Every choice between two ways to compute is a field here: the decoder picks its parts from
the configuration, never from the name of a family.
"""

import dataclasses
from typing import Literal

from jmoe.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    kind: Literal["rms"] = "rms"
    eps: float  # added to the mean square, in float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    kind: Literal["default"] = "default"
    theta: float  # base of the geometric series of wavelengths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    kind: Literal["softmax"] = "softmax"
    num_experts: int
    top_k: int  # experts per token
    norm_topk_prob: bool  # renormalise the top_k weights to sum to one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One Mixture-of-Experts decoder.

    Invariants, checked at construction (ConfigError): all sizes positive; query heads a
    multiple of key-value heads; even head_dim; 1 <= top_k <= num_experts; one sliding
    window entry per layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: Literal["silu"] = "silu"  # of the gate projection
    tie_word_embeddings: bool = False
    # By layer: a token sees this many positions, itself included; None is all of them.
    sliding_windows: tuple[int | None, ...]
    norm: NormConfig
    rope: RopeConfig
    router: RouterConfig

    def __post_init__(self):
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        } | {"num_experts": self.router.num_experts, "num_experts_per_tok": self.router.top_k}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} must be at least 1", got=size)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "num_attention_heads must be a multiple of num_key_value_heads",
                got=f"{self.num_attention_heads} and {self.num_key_value_heads}",
            )
        if self.head_dim % 2:
            raise ConfigError("head_dim must be even (rotary embedding)", got=self.head_dim)
        if self.router.top_k > self.router.num_experts:
            raise ConfigError(
                "num_experts_per_tok exceeds the number of experts",
                got=f"{self.router.top_k} of {self.router.num_experts} experts",
            )
        if len(self.sliding_windows) != self.num_hidden_layers:
            raise ConfigError(
                "sliding_windows needs one entry per layer",
                got=len(self.sliding_windows),
                expected=self.num_hidden_layers,
            )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ConfigError("a sliding window must be at least 1", got=self.sliding_windows)
