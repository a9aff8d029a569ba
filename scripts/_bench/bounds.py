"""What a test cannot be faster than: its work at the least, at the speed of the ceiling.

Decoding is bounded by reading the weights in use once per step, processing a prompt by its
products. Small models can exceed the first: weights that stay in a cache are not read from memory.
Host kernels can exceed the second: it is XLA's product in the model's dtype, and theirs may be in
8 bits.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from _bench.statistics import summarize
from jmoe.config import ModelConfig
from jmoe.engines.resident import ResidentEngine
from jmoe.models import kv_cache
from jmoe.models.decoder import abstract_parameters, rebuild
from jmoe.quant.spec import QuantSpec


def decode_work(engine: ResidentEngine, tokens_BL: np.ndarray, first: int) -> dict[str, Any]:
    """The work of decode steps from position ``first`` on, through these tokens."""
    experts, counted = float(engine.config.router.top_k), "exact"
    if len(tokens_BL) > 1:
        # The last token was chosen, and not taken through the model.
        experts, counted = experts_per_layer(engine, tokens_BL[:, :-1], first), "measured"
    num_bytes = weight_bytes_per_step(engine.config, engine.dtype, experts, engine.quant)
    return {
        "bound_by": "read",
        "work_per_token": num_bytes / len(tokens_BL),
        "weight_bytes_per_step": num_bytes,
        "experts_per_layer": experts,
        "experts_counted": counted,
    }


def prefill_work(engine: ResidentEngine, num_tokens: int) -> dict[str, Any]:
    """The work of prompts of so many tokens, in a batch of any size."""
    flop = prefill_flop(engine.config, num_tokens)
    return {"bound_by": "matmul", "work_per_token": flop / num_tokens, "flop_per_prompt": flop}


def compare_with_bound(
    work: Mapping[str, Any], tok_per_s: Sequence[float], ceilings: Sequence[float]
) -> dict[str, Any]:
    """What the bound allows, and the share of it that was reached, repetition by repetition.

    Args:
      work: from ``decode_work`` or ``prefill_work``.
      tok_per_s: measured speeds.
      ceilings: bytes or FLOP per second that the machine reached beside each of them.
    """
    bounds = [ceiling / work["work_per_token"] for ceiling in ceilings]
    shares = [speed / bound for speed, bound in zip(tok_per_s, bounds, strict=True)]
    achieved = {"read": "read_bytes_per_s", "matmul": "matmul_flop_per_s"}[work["bound_by"]]
    return {
        "bound_tok_per_s": summarize(bounds).to_json(),
        "share_of_bound": summarize(shares).to_json(),
        achieved: summarize(tok_per_s).median * work["work_per_token"],
    }


def weight_bytes_per_step(
    config: ModelConfig, dtype: str, experts_per_layer: float, quant: QuantSpec | None = None
) -> float:
    """Bytes of weights that a decode step must read, each expert in use once.

    Args:
      config: the model.
      dtype: of the weights that are not quantized.
      experts_per_layer: distinct experts that the tokens of a step use, on average.
      quant: formats of the others.
    """
    share = experts_per_layer / config.router.num_experts
    return sum(
        parameter.size * parameter.dtype.itemsize * (share if ".experts." in path else 1)
        for path, parameter in abstract_parameters(config, dtype, quant).items()
        if path.split(".")[0] != "embed_tokens" or config.tie_word_embeddings
    )


def prefill_flop(config: ModelConfig, num_tokens: int) -> float:
    """FLOP of one prompt: products with the weights in use, and causal attention.

    Scores of the vocabulary are needed once, for the last token.
    """
    share = config.router.top_k / config.router.num_experts
    per_token = sum(
        parameter.size * (share if ".experts." in path else 1)
        for path, parameter in abstract_parameters(config).items()
        if path.startswith("layers.") and parameter.ndim > 1
    )
    num_scores = num_tokens * (num_tokens + 1) // 2
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * heads * num_scores * config.num_hidden_layers
    return 2 * (per_token * num_tokens + attention + config.vocab_size * config.hidden_size)


def experts_per_layer(engine: ResidentEngine, tokens_BL: np.ndarray, first: int) -> float:
    """Distinct experts that the sequences of a batch use at once, measured.

    The tokens go through the model once more, all positions in one program.

    Args:
      engine: the model.
      tokens_BL: prompts with what was generated from them.
      first: the position of the first decode step.

    Returns:
      The mean over positions from ``first`` on and over layers.
    """
    batch_size, length = tokens_BL.shape
    cache = kv_cache.init_cache(engine.config, batch_size, length, engine.dtype, engine.device)
    arguments = (engine.parameters, cache, engine.put(tokens_BL.astype(np.int32)))
    static = engine.static_arguments(tokens_BL.size)
    program = engine.programs.get(_route_all, *arguments, **static)
    steps = np.swapaxes(np.asarray(program(*arguments))[:, :, first:], 1, 2)
    steps = steps.reshape(-1, batch_size * engine.config.router.top_k)
    return float(np.mean([len(np.unique(ids)) for ids in steps]))


@functools.partial(jax.jit, static_argnames=("config", "dtype", "quant", "host", "form"))
def _route_all(parameters, cache, tokens_BL, *, config, dtype, quant, host, form) -> Any:
    """Expert ids of every layer (N), sequence and position."""
    model = rebuild(config, dtype, parameters, quant, host)
    start_B = jnp.zeros(tokens_BL.shape[0], jnp.int32)
    valid_BL = jnp.ones(tokens_BL.shape, bool)
    _, _, routings = model(tokens_BL, start_B, valid_BL, cache, form)
    return jnp.stack([r.expert_ids_TK.reshape(*tokens_BL.shape, -1) for r in routings])
