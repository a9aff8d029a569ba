"""Mixtral: config.json to ModelConfig, and checkpoint names to the parameter tree.

Defaults are those of the class MixtralConfig in transformers.
Source: Mixtral of Experts, https://arxiv.org/abs/2401.04088.
"""

from jmoe.config import ModelConfig, NormConfig, RopeConfig, RouterConfig
from jmoe.models.families.fields import ConfigFields
from jmoe.models.families.rope import read_rope

# Parameter -> tensor. {layer} counts layers; {expert} makes the parameter a stack of tensors.
TENSOR_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "layers.{layer}.input_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.attention.q_proj": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.{layer}.attention.k_proj": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.{layer}.attention.v_proj": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.{layer}.attention.o_proj": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.{layer}.post_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.{layer}.router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "layers.{layer}.experts.w1": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "layers.{layer}.experts.w3": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "layers.{layer}.experts.w2": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

# Left in old checkpoints by transformers < 4.31; derived from rope_theta.
IGNORED_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def read_config(fields: ConfigFields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    num_attention_heads = fields.integer("num_attention_heads")
    num_hidden_layers = fields.integer("num_hidden_layers", maximum=1000)
    window = fields.integer("sliding_window", None)
    return ModelConfig(
        model_type="mixtral",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", 8),
        head_dim=fields.integer("head_dim", hidden_size // num_attention_heads),
        max_position_embeddings=fields.integer("max_position_embeddings", 131072),
        hidden_act=fields.choice("hidden_act", ("silu",), "silu"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        sliding_windows=(window,) * num_hidden_layers,
        norm=NormConfig(eps=fields.number("rms_norm_eps", 1e-5)),
        rope=RopeConfig(theta=read_rope(fields, default_theta=1e6)),
        router=RouterConfig(
            num_experts=fields.integer("num_local_experts", 8, maximum=4096),
            top_k=fields.integer("num_experts_per_tok", 2),
            norm_topk_prob=True,
        ),
    )
