"""A checkpoint loaded twice, by jmoe and by transformers, and the comparisons of the two."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from jmoe.engines.resident import ResidentEngine
from tests.equivalence import running
from tests.equivalence.checkpoints import RandomMixtral, write_random_mixtral
from tests.equivalence.measures import NEW_TOKENS, PROMPT_LENGTHS, nmse, random_prompt
from tests.equivalence.reference import Reference


class Pair:
    """One checkpoint in both implementations, in float32.

    Attributes:
      name: of the checkpoint.
      directory: its files, which both have read.
      engine: ours.
      reference: theirs.
    """

    def __init__(self, name: str, directory: Path, text_ids: Sequence[int] | None = None):
        """Loads both. Prompts are the beginning of text_ids, or random without them."""
        self.name = name
        self.directory = directory
        self.engine: ResidentEngine = running.load_engine(directory)
        self.reference = Reference(directory)
        self._text_ids = text_ids

    @classmethod
    def random(cls, spec: RandomMixtral, directory: Path) -> Self:
        """Writes a random checkpoint, and loads it."""
        write_random_mixtral(spec, directory)
        return cls(spec.name, directory)

    def with_host_kernels(self) -> Self:
        """The same checkpoint and reference, with ours computed by the host kernels."""
        pair = copy.copy(self)
        pair.engine = running.with_host_kernels(self.engine)
        return pair

    def prompt(self, length: int) -> list[int]:
        if self._text_ids is not None:
            return list(self._text_ids[:length])
        return random_prompt(length, self.engine.config.vocab_size)

    def max_nmse(self, length: int) -> float:
        """Largest error of the logits over all positions of a prompt."""
        prompt = self.prompt(length)
        return float(nmse(self.engine.logits(prompt), self.reference.logits(prompt)).max())

    def reference_greedy(self, length: int) -> list[int]:
        """What transformers makes of a prompt, on its own."""
        return self.reference.greedy(self.prompt(length))

    def greedy(self, length: int) -> list[int]:
        """What jmoe makes of a prompt, on its own."""
        return running.greedy(self.engine, [self.prompt(length)], NEW_TOKENS)[0]

    def greedy_batch(self) -> list[list[int]]:
        """What jmoe makes of prompts of all PROMPT_LENGTHS in one batch."""
        prompts = [self.prompt(length) for length in PROMPT_LENGTHS]
        return running.greedy(self.engine, prompts, NEW_TOKENS)
