"""What can be wrong with prompts, and how they are laid out."""

from collections.abc import Sequence

import numpy as np

from jmoe.config import ModelConfig
from jmoe.errors import RequestError


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Token ids int32 [B, length], padded with 0 at the end."""
    padded_BL = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(padded_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded_BL


def check_prompts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, *, reserve: int = 0
) -> None:
    """Raises RequestError unless all prompts are token ids that fit into the model's context.

    Args:
      prompts: of one batch.
      config: the model.
      reserve: positions that must be left for new tokens.
    """
    limit = config.max_position_embeddings - reserve
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else None
        if not prompt:
            raise RequestError("the prompt is empty", where=where, do="give it some text")
        if len(prompt) > limit:
            raise RequestError(
                "the prompt is longer than the model's context",
                where=where,
                got=f"{len(prompt)} tokens",
                expected=f"at most {limit}",
                do="shorten the prompt",
            )
        if not all(0 <= token_id < config.vocab_size for token_id in prompt):
            raise RequestError(
                "the prompt has a token id outside the model's vocabulary",
                where=where,
                expected=f"ids from 0 to {config.vocab_size - 1}",
            )
