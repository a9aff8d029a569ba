"""The resident engine: all weights on one device, a whole decode step in one executable."""

from collections.abc import Sequence

import numpy as np

from jmoe.engines import programs
from jmoe.engines.batch import BatchRun, pad_prompts
from jmoe.engines.device_model import DeviceModel
from jmoe.errors import RequestError
from jmoe.generation.options import GenerationOptions
from jmoe.models import kv_cache
from jmoe.planning.chunks import longest_chunk, prompt_chunks


class ResidentEngine(DeviceModel):
    """Runs batches of prompts, and scores texts."""

    def start(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> BatchRun:
        """Checks a batch, reserves its KV cache, compiles what it needs, and prefills it.

        Args:
          prompts: token ids of each sequence; lengths may differ.
          options: for all of them.

        Raises:
          RequestError: a prompt is empty, has an unknown token, or leaves no room for a new
            token in the model's context.
          CapacityError: the KV cache does not fit into memory.
        """
        self._check_prompts(prompts, reserve=1)
        return BatchRun(self, prompts, options)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Scores the next token at every position of one sequence: float32 [L, V].

        Raises:
          RequestError: no token, an unknown one, or more than the model's context.
        """
        self._check_prompts([token_ids], reserve=0)
        chunks = prompt_chunks(len(token_ids), longest_chunk(self.config, 1, len(token_ids)))
        padded_BL = pad_prompts([token_ids], sum(chunks))
        capacity = kv_cache.bucket_capacity(sum(chunks))
        cache = kv_cache.init_cache(self.config, 1, capacity, self.dtype, self.device)
        lengths_B = self.put(np.array([len(token_ids)], np.int32))
        logits, start = [], 0
        for size in chunks:
            chunk_BL = self.put(padded_BL[:, start : start + size])
            args = (self.parameters, cache, chunk_BL, self.put(np.int32(start)), lengths_B)
            score = self.programs.get(programs.score_chunk, *args, **self.static_arguments(size))
            cache, logits_BLV = score(*args)
            logits.append(np.asarray(logits_BLV)[0])
            start += size
        return np.concatenate(logits)[: len(token_ids)]

    def _check_prompts(self, prompts: Sequence[Sequence[int]], *, reserve: int) -> None:
        limit = self.config.max_position_embeddings - reserve
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
            if not all(0 <= token_id < self.config.vocab_size for token_id in prompt):
                raise RequestError(
                    "the prompt has a token id outside the model's vocabulary",
                    where=where,
                    expected=f"ids from 0 to {self.config.vocab_size - 1}",
                )
