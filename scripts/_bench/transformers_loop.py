"""The bare loop that drives a model of transformers, in this process or in one of its own.

Nothing here knows of jmoe, and torch is imported when it is needed.
"""

import time
from typing import Any


def run_model(model: Any, prompts: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and of new_tokens steps after it: the most probable tokens.

    Args:
      model: the torch module.
      prompts: token ids int64 [B, L], a tensor.
      new_tokens: decode steps.
    """
    import torch

    with torch.inference_mode():
        started = time.perf_counter()
        output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        token_ids = output.logits[:, -1:].argmax(-1)
        token_ids.tolist()
        first_token_at = time.perf_counter()
        for _ in range(new_tokens):
            output = model(
                input_ids=token_ids, past_key_values=output.past_key_values, use_cache=True
            )
            token_ids = output.logits[:, -1:].argmax(-1)
            token_ids.tolist()
        return first_token_at - started, time.perf_counter() - first_token_at


def restore_frequencies(model: Any) -> None:
    """For a model from the meta device: its rotary embedding has no values, and is no weight."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
