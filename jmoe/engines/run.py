"""What all batches have in common on their way from prompts to tokens, in any engine.

Prompts may differ in length. They are padded at the end and prefilled in chunks of bucketed
length; what follows is the business of ``batch`` and ``beam_run``.
"""

import abc
import time
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.disk_meter import DiskMeter
from jmoe.engines.memory import ExplainShortage
from jmoe.engines.programs import ProgramCache
from jmoe.engines.prompts import pad_prompts
from jmoe.engines.steps import BatchShape, BeamSteps, Ending, Sampling, Steps
from jmoe.generation.options import GenerationOptions
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.metrics import GenerationStats, Stopwatch
from jmoe.models import kv_cache
from jmoe.planning.chunks import prompt_chunks
from jmoe.store.disk_tier import DiskTier


class Engine(Protocol):
    """What a batch runs in."""

    config: ModelConfig
    dtype: str
    device: jax.Device
    programs: ProgramCache

    @property
    def disk(self) -> DiskTier | None:
        """What brings experts into host memory, if they are mapped."""
        ...

    def longest_chunk(
        self, batch_size: int, num_positions: int, num_prompts: int | None = None
    ) -> int:
        """Longest piece in which prompts of such a batch are prefilled (CapacityError)."""
        ...

    def put(self, array: Any) -> jax.Array: ...

    def reserve(self, shape: BatchShape) -> None:
        """Makes room for a batch (CapacityError)."""
        ...

    def remedy(self, shape: BatchShape) -> str:
        """What to do if the device has no memory for a batch."""
        ...

    def steps(self, shape: BatchShape) -> Steps: ...

    def beam_steps(self, shape: BatchShape) -> BeamSteps: ...


class Run(abc.ABC):
    """A batch. Making one takes its prompts through; iterating takes the steps.

    Attributes:
      max_new_tokens: by prompt: what was asked for, or what the context has room for.
    """

    def __init__(
        self,
        model: Engine,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
    ):
        room = [model.config.max_position_embeddings - len(prompt) for prompt in prompts]
        self.max_new_tokens = [min(options.max_new_tokens, tokens) for tokens in room]
        self._model = model
        self._prompts = prompts
        self._options = options
        shape = self._shape = self._plan()
        model.reserve(shape)

        self._active = np.ones(shape.batch_size, bool)
        self._active_B = model.put(self._active.copy())
        self._steps = self._make_steps()
        self._disk = DiskMeter(model.disk)
        before = model.programs.num_compiled
        stopwatch = Stopwatch()
        try:
            with stopwatch, self._explaining("making a KV cache and compiling", copies=False):
                self._prepare()
            self._num_compiled = model.programs.num_compiled - before
            self._compile_s = stopwatch.seconds
            self._disk.begin()
            started = time.perf_counter()
            with self._explaining("prefilling"):
                self._prefill(pad_prompts(prompts, sum(shape.chunks)))
            self._prefill_s = time.perf_counter() - started
            self._disk.prefilled()
            self._decode_tokens, self._decode_steps, self._decode_s = 0, 0, 0.0
            self._decoding = self._explaining("decoding")
        except BaseException:
            self._steps.end()
            raise

    @abc.abstractmethod
    def _make_steps(self) -> Steps: ...

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Compiles what the batch needs, and runs each new program once."""

    @abc.abstractmethod
    def _prefill(self, padded_NL: np.ndarray) -> None:
        """Takes the prompts through, and waits for the first tokens."""

    @abc.abstractmethod
    def _take_steps(self) -> Generator[Any, None, None]:
        """Yields what the caller gets, until nothing is left to do."""

    def _plan(self) -> BatchShape:
        model, num_prompts = self._model, len(self._prompts)
        batch_size = num_prompts * self._options.num_beams
        lengths = zip(self._prompts, self.max_new_tokens, strict=True)
        num_positions = max(len(prompt) + new_tokens for prompt, new_tokens in lengths)
        longest = model.longest_chunk(batch_size, num_positions, num_prompts)
        chunks = prompt_chunks(max(map(len, self._prompts)), longest)
        return BatchShape(
            batch_size=batch_size,
            chunks=tuple(chunks),
            capacity=kv_cache.bucket_capacity(max(num_positions, sum(chunks))),
            kind=SamplingKind.of(self._options),
            num_beams=self._options.num_beams,
        )

    def _explaining(self, doing: str, *, copies: bool = True) -> ExplainShortage:
        model, shape = self._model, self._shape
        return ExplainShortage(
            f"{doing} ({shape.batch_size} x {shape.capacity} positions)",
            model.device,
            lambda: model.remedy(shape),
            copies_experts=copies,
        )

    def _prompt_lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt in self._prompts], np.int32)

    def _sampling(self) -> Sampling:
        options, put = self._options, self._model.put
        return (
            put(np.array([options.seed >> 32, options.seed & 0xFFFFFFFF], np.uint32)),
            SamplingValues(
                temperature=put(np.float32(options.temperature)),
                top_k=put(np.int32(options.top_k or self._model.config.vocab_size)),
                top_p=put(np.float32(options.top_p)),
                min_p=put(np.float32(options.min_p)),
                repetition_penalty=put(np.float32(options.repetition_penalty)),
            ),
        )

    def _ending(self) -> Ending:
        pairs = zip(self._prompts, self.max_new_tokens, strict=True)
        lengths = np.array([len(prompt) + new_tokens for prompt, new_tokens in pairs])
        stop_token_ids = tuple(self._options.stop_token_ids)
        return Ending(stop_token_ids, np.repeat(lengths, self._shape.num_beams))

    def _seen_in_prompts(self) -> np.ndarray:
        """Which tokens every prompt has: bool [N, V]."""
        seen_NV = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
        for row, prompt in zip(seen_NV, self._prompts, strict=True):
            row[np.asarray(prompt)] = True
        return seen_NV

    def __iter__(self) -> Generator[Any, None, None]:
        try:
            yield from self._take_steps()
        except BaseException:
            # Without waiting for the link: this may be Ctrl-C, or GeneratorExit in a finalizer, on
            # any thread and in the middle of anything.
            self._steps.end()
            raise
        self.close()

    def close(self) -> None:
        """Ends the batch, also before its last token; may be called again."""
        self._steps.close()
        self._disk.end()

    def stats(self) -> GenerationStats:
        """Work and time so far."""
        shape = self._shape
        return GenerationStats(
            num_sequences=shape.batch_size,
            num_beams=shape.num_beams,
            prefill_tokens=sum(map(len, self._prompts)),
            prefill_s=self._prefill_s,
            new_tokens=shape.batch_size + self._decode_tokens,
            decode_tokens=self._decode_tokens,
            decode_steps=self._decode_steps,
            decode_s=self._decode_s,
            compile_s=self._compile_s,
            compiled_programs=self._num_compiled,
            residency=self._steps.residency(),
            disk=self._disk.stats(),
        )
