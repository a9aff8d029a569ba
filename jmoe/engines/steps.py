"""What a batch asks of an engine: to take its prompts through, and then token after token."""

import dataclasses
from typing import Protocol

import jax
import numpy as np

from jmoe.engines.programs import DecodeState
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.metrics import ResidencyStats

# Seed, and temperature and limits, as arrays on the device: arguments of sampling programs.
Sampling = tuple[jax.Array, SamplingValues]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The sizes of a batch, which programs are compiled for.

    Attributes:
      batch_size: sequences.
      chunks: lengths of the pieces in which prompts are prefilled, padding included.
      capacity: positions of the KV cache.
      kind: how tokens are chosen.
    """

    batch_size: int
    chunks: tuple[int, ...]
    capacity: int
    kind: SamplingKind


class Steps(Protocol):
    """One batch in an engine. Made by ``Engine.steps``.

    Attributes:
      runs_ahead: whether to dispatch a step before the tokens of the one before are read. Good
        where a step is one program; where the host works along it would delay every token.
    """

    runs_ahead: bool

    def prepare(self, lengths_B: jax.Array, active_B: jax.Array, sampling: Sampling) -> None:
        """Compiles what the batch needs, and runs each new program once."""
        ...

    def prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        """Takes prompts through the model; returns the state and every sequence's first token."""
        ...

    def step(self, state: DecodeState, active_B: jax.Array) -> tuple[DecodeState, jax.Array]:
        """One token of every active sequence. Donates: state."""
        ...

    def residency(self) -> ResidencyStats | None:
        """What moved between host and device, of engines that move experts."""
        ...

    def end(self) -> None:
        """Ends the batch without waiting for anything: on any thread, at any time."""
        ...

    def close(self) -> None:
        """Ends the batch, and waits until nothing of it is under way; may be called again."""
        ...
