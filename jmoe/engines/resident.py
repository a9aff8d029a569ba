"""The resident engine: all weights on one device, a whole decode step in one executable."""

from collections.abc import Sequence

import numpy as np

from jmoe.engines import programs
from jmoe.engines.batch import BatchRun
from jmoe.engines.beam_run import BeamRun
from jmoe.engines.beam_steps import ResidentBeamSteps
from jmoe.engines.device_model import DeviceModel
from jmoe.engines.memory import check_fits, remedy, smaller_plan
from jmoe.engines.prompts import check_prompts, pad_prompts
from jmoe.engines.resident_steps import ResidentSteps
from jmoe.engines.steps import BatchShape
from jmoe.generation.options import GenerationOptions
from jmoe.models import kv_cache
from jmoe.planning.chunks import longest_chunk, prompt_chunks
from jmoe.planning.need import MemoryNeed
from jmoe.planning.policy import Policy
from jmoe.store.disk_tier import DiskTier


class ResidentEngine(DeviceModel):
    """Runs batches of prompts, and scores texts.

    Attributes:
      disk: what keeps experts in host memory, if they are mapped and it computes from there. It
        knows no more than which are popular: nobody says here which expert comes next.
    """

    disk: DiskTier | None = None

    def longest_chunk(
        self, batch_size: int, num_positions: int, num_prompts: int | None = None
    ) -> int:
        """Longest piece in which prompts of such a batch are prefilled."""
        return longest_chunk(self.config, num_prompts or batch_size, num_positions)

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
        check_prompts(prompts, self.config, reserve=1)
        return BatchRun(self, prompts, options)

    def start_beams(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> BeamRun:
        """The same for options.num_beams beams of every prompt."""
        check_prompts(prompts, self.config, reserve=1)
        return BeamRun(self, prompts, options)

    def reserve(self, shape: BatchShape) -> None:
        """Checks that the KV cache of a batch fits (CapacityError)."""
        batch_size, capacity = shape.batch_size, shape.capacity
        check_fits(
            kv_cache.cache_bytes(self.config, batch_size, capacity, self.dtype),
            self.device,
            what=f"the KV cache of {batch_size} x {capacity} positions",
            do=f"{_fewer(shape)}, shorten them, or lower max_new_tokens",
        )

    def remedy(self, shape: BatchShape) -> str:
        """What to do if the device has no memory for a batch."""
        if self.device.platform == "cpu":
            return f"{_fewer(shape)}, shorten them, or use fewer bits"
        num_positions = min(shape.capacity, self.config.max_position_embeddings)
        size = {"batch_size": shape.batch_size, "num_positions": num_positions}
        need = MemoryNeed.of(self.config, self.dtype, self.quant, **size)
        plan = smaller_plan(
            self.config,
            self.dtype,
            self.quant,
            used_bytes=need.total_bytes,
            policy=Policy(mode="offload"),
            **size,
        )
        return remedy(self.config, plan)

    def steps(self, shape: BatchShape) -> ResidentSteps:
        return ResidentSteps(self, shape)

    def beam_steps(self, shape: BatchShape) -> ResidentBeamSteps:
        return ResidentBeamSteps(self, shape)

    def close(self) -> None:
        """Ends what the disk tier does; there is nothing else to be ended."""
        if self.disk is not None:
            self.disk.close()

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Scores the next token at every position of one sequence: float32 [L, V].

        Raises:
          RequestError: no token, an unknown one, or more than the model's context.
        """
        check_prompts([token_ids], self.config)
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


def _fewer(shape: BatchShape) -> str:
    return f"run fewer prompts{' or beams' if shape.num_beams > 1 else ''} at once"
