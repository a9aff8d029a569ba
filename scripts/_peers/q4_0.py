"""What a model in Q4_0 takes: 4-bit codes in blocks of 32, with a float16 scale each.

Source: ggml's documentation of the format; 18 bytes hold 32 weights. The standard library only:
the worker of llama.cpp imports it in a Python of its own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = 32
BLOCK_BYTES = 18


class Tensor(NamedTuple):
    """A tensor of a GGUF file; ``shape`` as numpy has it, the rows' length last."""

    name: str
    shape: tuple[int, ...]
    quantized: bool  # else float32

    @property
    def num_weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_weights // BLOCK * BLOCK_BYTES if self.quantized else 4 * self.num_weights


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors of a Mixtral in llama.cpp's names, projections, experts and head in Q4_0.

    Args:
      config: config.json as Hugging Face has it.
    """
    hidden, width = config["hidden_size"], config["intermediate_size"]
    experts, vocabulary = config["num_local_experts"], config["vocab_size"]
    queries = config["num_attention_heads"] * head_dim(config)
    keys = config["num_key_value_heads"] * head_dim(config)
    yield Tensor("token_embd.weight", (vocabulary, hidden), True)
    yield Tensor("output_norm.weight", (hidden,), False)
    yield Tensor("output.weight", (vocabulary, hidden), True)
    for i in range(config["num_hidden_layers"]):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
        }.items():
            quantized = "norm" not in name and name != "ffn_gate_inp"
            yield Tensor(f"blk.{i}.{name}.weight", shape, quantized)


def total_bytes(config: dict[str, Any]) -> int:
    """Of all tensors."""
    return sum(tensor.num_bytes for tensor in tensors(config))


def bytes_per_token(config: dict[str, Any]) -> float:
    """Of the weights that a decode step reads: of the experts as many as a token uses."""
    share = config["num_experts_per_tok"] / config["num_local_experts"]
    return sum(
        tensor.num_bytes * (share if "_exps" in tensor.name else 1)
        for tensor in tensors(config)
        if tensor.name != "token_embd.weight"
    )


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
