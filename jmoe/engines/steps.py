"""What a batch asks of an engine: to take its prompts through, and then token after token."""

import dataclasses
from typing import Protocol

import jax
import numpy as np

from jmoe.engines.programs import DecodeState
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.metrics import ResidencyStats
from jmoe.models.kv_cache import KVCache

# Seed, and temperature and limits, as arrays on the device: arguments of sampling programs.
Sampling = tuple[jax.Array, SamplingValues]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The sizes of a batch, which programs are compiled for.

    Attributes:
      batch_size: sequences in decode steps: beams count one by one.
      chunks: lengths of the pieces in which prompts are prefilled, padding included.
      capacity: positions of the KV cache.
      kind: how tokens are chosen.
      num_beams: sequences of each prompt.
    """

    batch_size: int
    chunks: tuple[int, ...]
    capacity: int
    kind: SamplingKind
    num_beams: int = 1

    @property
    def num_prompts(self) -> int:
        return self.batch_size // self.num_beams


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """When sequences end, for programs that make several tokens.

    Attributes:
      stop_token_ids: tokens that end one.
      lengths_B: tokens, prompt and new ones, at which each one ends.
    """

    stop_token_ids: tuple[int, ...]
    lengths_B: np.ndarray


class Steps(Protocol):
    """One batch in an engine. Made by ``Engine.steps``.

    Attributes:
      runs_ahead: whether to dispatch a step before the tokens of the one before are read. Good
        where a step is one program; where the host works along it would delay every token.
    """

    runs_ahead: bool

    def prepare(
        self, lengths_B: jax.Array, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        """Compiles what the batch needs, and runs each new program once."""
        ...

    def prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        """Takes prompts through the model; returns the state and every sequence's first token."""
        ...

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array | np.ndarray]:
        """One token of every active sequence, int32, B of them. Donates: state."""
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


class BeamSteps(Steps, Protocol):
    """A batch of beams in an engine, whose tokens the caller chooses.

    ``prefill`` returns logits instead of tokens, [prompts, V], and a state of all beams, in which
    those of a prompt are equal; ``step`` returns logits [B, V]. The caller puts tokens and lengths
    into the state before each step.
    """

    def follow(self, cache: KVCache, copies: jax.Array) -> KVCache:
        """Lets beams go on from others: see ``beam_programs.follow_parents``. Donates: cache."""
        ...


class Decoder(Protocol):
    """One of several ways in which the same batch can take its decode steps.

    Attributes:
      runs_ahead: as of ``Steps``.
    """

    runs_ahead: bool

    @property
    def num_waiting(self) -> int:
        """Steps whose tokens are made and not handed out: the state is that of the last one."""
        ...

    def compile(
        self, cache: KVCache, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None: ...

    def warm_up(self, state: DecodeState, active_B: jax.Array) -> DecodeState:
        """Runs new programs once. Donates: state, whose KV cache is overwritten afterwards."""
        ...

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array | np.ndarray, np.ndarray | None]:
        """See ``Steps.step``. Donates: state.

        Returns:
          The state, the token ids, and the experts that were chosen and predicted: int32
          [L, 1 + N, T, W], as ``DecodeLoop.choices``; None if nobody records them.
        """
        ...
