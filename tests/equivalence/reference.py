"""The other side of the comparison: transformers, in float32 on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import MixtralForCausalLM

from tests.equivalence.measures import NEW_TOKENS

transformers.utils.logging.disable_progress_bar()
# For models as small as these, more threads are slower, and much slower on a busy machine.
torch.set_num_threads(1)


class Reference:
    """A checkpoint as transformers runs it, with its default attention and experts."""

    def __init__(self, directory: Path, dtype: str = "float32"):
        self._model: Any = MixtralForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        )
        # Nothing of the checkpoint's own generation_config.json: greedy and without an end.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )
        self._continuations: dict[tuple[int, ...], list[int]] = {}

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Scores of the next token at every position: float32 [L, V]."""
        with torch.no_grad():
            return self._model(torch.tensor([token_ids])).logits[0].float().numpy()

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        """The most probable continuation of one prompt, by NEW_TOKENS; made only once."""
        if tuple(prompt) not in self._continuations:
            prompt_ids = torch.tensor([prompt])
            out = self._model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
            self._continuations[tuple(prompt)] = out[0, len(prompt) :].tolist()
        return self._continuations[tuple(prompt)]

    def beams(
        self, prompt: Sequence[int], *, stop_token_ids: Sequence[int] = (), **settings: Any
    ) -> list[tuple[list[int], float]]:
        """The sequences that beam search returns for one prompt, and their scores.

        Args:
          prompt: token ids.
          stop_token_ids: that end a sequence.
          settings: of ``generate``, by their names there.
        """
        prompt_ids = torch.tensor([prompt])
        out = self._model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            eos_token_id=list(stop_token_ids) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        new_tokens = out.sequences[:, len(prompt) :].tolist()
        lengths = (out.beam_indices >= 0).sum(dim=1).tolist()  # without padding
        scores = out.sequences_scores.tolist()
        return [
            (token_ids[:length], score)
            for token_ids, length, score in zip(new_tokens, lengths, scores, strict=True)
        ]
