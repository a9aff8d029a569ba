"""One batch on its way from prompts to tokens, in any engine.

Prompts may differ in length. They are padded at the end and prefilled in chunks of bucketed
length; then every step makes one token of every sequence that still grows. Where a step is one
program, the host is one step behind: it dispatches a step before it waits for the tokens of the
step before, so that the device never waits for Python.
"""

import time
from collections.abc import Generator, Sequence
from typing import Protocol

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.memory import ExplainShortage
from jmoe.engines.programs import ProgramCache
from jmoe.engines.prompts import pad_prompts
from jmoe.engines.steps import BatchShape, Ending, Steps
from jmoe.generation.options import GenerationOptions
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.metrics import GenerationStats, Stopwatch
from jmoe.models import kv_cache
from jmoe.planning.chunks import prompt_chunks


class Engine(Protocol):
    """What a batch runs in."""

    config: ModelConfig
    dtype: str
    device: jax.Device
    programs: ProgramCache

    def longest_chunk(self, batch_size: int, num_positions: int) -> int:
        """Longest piece in which prompts of such a batch are prefilled (CapacityError)."""
        ...

    def put(self, array: np.ndarray | np.generic) -> jax.Array: ...

    def reserve(self, shape: BatchShape) -> None:
        """Makes room for a batch (CapacityError)."""
        ...

    def remedy(self, shape: BatchShape) -> str:
        """What to do if the device has no memory for a batch."""
        ...

    def steps(self, shape: BatchShape) -> Steps: ...


class BatchRun:
    """Iterating gives each step's new token ids, int32 [B], until every sequence has ended.

    The caller says which sequences end, with ``finish``; entries of ended sequences are
    rubbish. A sequence that reaches its max_new_tokens must be finished by the caller too.

    Attributes:
      max_new_tokens: by sequence: what was asked for, or what the context has room for.
    """

    def __init__(
        self,
        model: Engine,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
    ):
        config, put = model.config, model.put
        room = [config.max_position_embeddings - len(prompt) for prompt in prompts]
        self.max_new_tokens = [min(options.max_new_tokens, tokens) for tokens in room]
        self._model = model
        self._prompts = prompts
        shape = self._shape = self._plan(SamplingKind.of(options))
        model.reserve(shape)

        self._active = np.ones(len(prompts), bool)
        self._active_B = put(self._active.copy())
        lengths_B = put(np.array([len(prompt) for prompt in prompts], np.int32))
        seen_BV = put(self._seen_in_prompts()) if shape.kind.penalized else None
        sampling = (
            put(np.array([options.seed >> 32, options.seed & 0xFFFFFFFF], np.uint32)),
            SamplingValues(
                temperature=put(np.float32(options.temperature)),
                top_k=put(np.int32(options.top_k or config.vocab_size)),
                top_p=put(np.float32(options.top_p)),
                min_p=put(np.float32(options.min_p)),
                repetition_penalty=put(np.float32(options.repetition_penalty)),
            ),
        )
        lengths = [len(p) + n for p, n in zip(prompts, self.max_new_tokens, strict=True)]
        ending = Ending(tuple(options.stop_token_ids), np.array(lengths))
        before = model.programs.num_compiled
        stopwatch = Stopwatch()
        self._steps = model.steps(shape)
        try:
            with stopwatch, self._explaining("making a KV cache and compiling", copies=False):
                self._steps.prepare(lengths_B, self._active_B, sampling, ending)
            self._num_compiled = model.programs.num_compiled - before
            self._compile_s = stopwatch.seconds
            with self._explaining("prefilling"):
                self._prefill(pad_prompts(prompts, sum(shape.chunks)), lengths_B, seen_BV)
            self._decoding = self._explaining("decoding")
        except BaseException:
            self._steps.end()
            raise

    def _plan(self, kind: SamplingKind) -> BatchShape:
        model, batch_size = self._model, len(self._prompts)
        lengths = zip(self._prompts, self.max_new_tokens, strict=True)
        num_positions = max(len(prompt) + new_tokens for prompt, new_tokens in lengths)
        longest = model.longest_chunk(batch_size, num_positions)
        chunks = prompt_chunks(max(map(len, self._prompts)), longest)
        return BatchShape(
            batch_size=batch_size,
            chunks=tuple(chunks),
            capacity=kv_cache.bucket_capacity(max(num_positions, sum(chunks))),
            kind=kind,
        )

    def _explaining(self, doing: str, *, copies: bool = True) -> ExplainShortage:
        model, shape = self._model, self._shape
        return ExplainShortage(
            f"{doing} ({shape.batch_size} x {shape.capacity} positions)",
            model.device,
            lambda: model.remedy(shape),
            copies_experts=copies,
        )

    def _seen_in_prompts(self) -> np.ndarray:
        seen_BV = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
        for row, prompt in zip(seen_BV, self._prompts, strict=True):
            row[np.asarray(prompt)] = True
        return seen_BV

    def _prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> None:
        started = time.perf_counter()
        self._state, token_ids_B = self._steps.prefill(padded_BL, lengths_B, seen_BV)
        self._first = np.asarray(token_ids_B)
        self._prefill_s = time.perf_counter() - started
        self._decode_tokens, self._decode_s = 0, 0.0

    def __iter__(self) -> Generator[np.ndarray, None, None]:
        try:
            yield from self._tokens()
        except BaseException:
            # Without waiting for the link: this may be Ctrl-C, or GeneratorExit in a finalizer, on
            # any thread and in the middle of anything.
            self._steps.end()
            raise
        self.close()

    def _tokens(self) -> Generator[np.ndarray, None, None]:
        ahead = self._steps.runs_ahead
        token_ids_B = self._first
        started = 1
        pending = None
        since = time.perf_counter()
        while True:
            if ahead and pending is None and started < self._longest():
                pending, started = self._dispatch(), started + 1
            yield token_ids_B
            if not self._active.any():
                return
            if not ahead and started < self._longest():
                since = time.perf_counter()  # the caller had the last token, nothing was computed
                pending, started = self._dispatch(), started + 1
            if pending is None:
                return
            following = None
            if ahead and started < self._longest():
                following, started = self._dispatch(), started + 1
            with self._decoding:
                token_ids_B = np.asarray(pending).reshape(-1)
            pending = following
            now = time.perf_counter()
            self._decode_s, since = self._decode_s + now - since, now
            self._decode_tokens += int(self._active.sum())

    def _longest(self) -> int:
        pairs = zip(self._active, self.max_new_tokens, strict=True)
        return max((limit for active, limit in pairs if active), default=0)

    def _dispatch(self) -> jax.Array | np.ndarray:
        with self._decoding:
            self._state, token_ids_B = self._steps.step(self._state, self._active_B)
        return token_ids_B

    def finish(self, sequence: int) -> None:
        """Ends a sequence: it is not computed any more from the next dispatched step on."""
        self._active[sequence] = False
        if self._active.any():
            self._active_B = self._model.put(self._active.copy())

    def close(self) -> None:
        """Ends the batch, also before its last token; may be called again."""
        self._steps.close()

    def stats(self) -> GenerationStats:
        """Work and time so far."""
        return GenerationStats(
            num_sequences=len(self._prompts),
            prefill_tokens=sum(map(len, self._prompts)),
            prefill_s=self._prefill_s,
            new_tokens=len(self._prompts) + self._decode_tokens,
            decode_tokens=self._decode_tokens,
            decode_s=self._decode_s,
            compile_s=self._compile_s,
            compiled_programs=self._num_compiled,
            residency=self._steps.residency(),
        )
