"""One batch of the resident engine on its way from prompts to tokens.

Prompts may differ in length. They are padded at the end and prefilled in chunks of bucketed
length; then every step makes one token of every sequence that still grows. The host is one
step behind: it dispatches a step before it waits for the tokens of the step before, so that
the device never waits for Python.
"""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines import programs
from jmoe.engines.device_model import DeviceModel
from jmoe.engines.memory import check_fits
from jmoe.engines.programs import DecodeState
from jmoe.generation.options import GenerationOptions
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.metrics import GenerationStats, Stopwatch
from jmoe.models import kv_cache
from jmoe.planning.chunks import longest_chunk, prompt_chunks


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Token ids int32 [B, length], padded with 0 at the end."""
    padded_BL = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(padded_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded_BL


class BatchRun:
    """Iterating gives each step's new token ids, int32 [B], until every sequence has ended.

    The caller says which sequences end, with ``finish``; entries of ended sequences are
    rubbish. A sequence that reaches its max_new_tokens must be finished by the caller too.

    Attributes:
      max_new_tokens: by sequence: what was asked for, or what the context has room for.
    """

    def __init__(
        self,
        model: DeviceModel,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
    ):
        config, put = model.config, model.put
        room = [config.max_position_embeddings - len(prompt) for prompt in prompts]
        self.max_new_tokens = [min(options.max_new_tokens, tokens) for tokens in room]
        self._model = model
        self._prompts = prompts
        self._kind = SamplingKind.of(options)
        self._chunks, capacity = self._plan_memory()

        self._active = np.ones(len(prompts), bool)
        self._active_B = put(self._active.copy())
        self._lengths_B = put(np.array([len(prompt) for prompt in prompts], np.int32))
        self._seen_BV = put(self._seen_in_prompts()) if self._kind.penalized else None
        self._sampling = (
            put(np.array([options.seed >> 32, options.seed & 0xFFFFFFFF], np.uint32)),
            SamplingValues(
                temperature=put(np.float32(options.temperature)),
                top_k=put(np.int32(options.top_k or config.vocab_size)),
                top_p=put(np.float32(options.top_p)),
                min_p=put(np.float32(options.min_p)),
                repetition_penalty=put(np.float32(options.repetition_penalty)),
            ),
        )
        cache = kv_cache.init_cache(config, len(prompts), capacity, model.dtype, model.device)
        hidden_BD = put(np.zeros((len(prompts), config.hidden_size), jnp.dtype(model.dtype)))
        before = model.programs.num_compiled
        stopwatch = Stopwatch()
        with stopwatch:
            self._compile(cache, hidden_BD)
            if model.programs.num_compiled > before:
                cache, hidden_BD = self._warm_up(cache, hidden_BD)
        self._num_compiled = model.programs.num_compiled - before
        self._compile_s = stopwatch.seconds
        self._prefill(cache, hidden_BD)

    def _plan_memory(self) -> tuple[list[int], int]:
        """Lengths of the prompt's chunks, and positions of the KV cache, if they fit."""
        model, batch_size = self._model, len(self._prompts)
        lengths = zip(self._prompts, self.max_new_tokens, strict=True)
        num_positions = max(len(prompt) + new_tokens for prompt, new_tokens in lengths)
        longest = longest_chunk(model.config, batch_size, num_positions)
        chunks = prompt_chunks(max(map(len, self._prompts)), longest)
        capacity = kv_cache.bucket_capacity(max(num_positions, sum(chunks)))
        check_fits(
            kv_cache.cache_bytes(model.config, batch_size, capacity, model.dtype),
            model.device,
            what=f"the KV cache of {batch_size} x {capacity} positions",
            do="run fewer prompts at once, shorten them, or lower max_new_tokens",
        )
        return chunks, capacity

    def _seen_in_prompts(self) -> np.ndarray:
        seen_BV = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
        for row, prompt in zip(seen_BV, self._prompts, strict=True):
            row[np.asarray(prompt)] = True
        return seen_BV

    def _compile(self, cache: kv_cache.KVCache, hidden_BD: jax.Array) -> None:
        model, batch_size = self._model, len(self._prompts)
        int32 = jnp.int32
        start = jax.ShapeDtypeStruct((), int32)
        self._prefill_chunk = {
            size: model.programs.get(
                programs.prefill_chunk,
                model.parameters,
                cache,
                hidden_BD,
                jax.ShapeDtypeStruct((batch_size, size), int32),
                start,
                self._lengths_B,
                **model.static_arguments(batch_size * size),
            )
            for size in set(self._chunks)
        }
        self._first_tokens = model.programs.get(
            programs.first_tokens,
            model.parameters,
            hidden_BD,
            self._lengths_B,
            self._seen_BV,
            *self._sampling,
            **model.model_arguments(),
            kind=self._kind,
        )
        token_ids_B = self._lengths_B  # of the same shape and dtype
        self._decode_step = model.programs.get(
            programs.decode_step,
            model.parameters,
            DecodeState(cache, self._lengths_B, token_ids_B, self._seen_BV),
            self._active_B,
            *self._sampling,
            **model.static_arguments(batch_size),
            kind=self._kind,
        )

    def _warm_up(
        self, cache: kv_cache.KVCache, hidden_BD: jax.Array
    ) -> tuple[kv_cache.KVCache, jax.Array]:
        """Runs each program once, on prompts of one token: backends finish a program then.

        What that leaves in the cache lies beyond every sequence's length, and is overwritten.
        """
        put, parameters = self._model.put, self._model.parameters
        lengths_B = np.ones(len(self._prompts), np.int32)
        for size, prefill_chunk in self._prefill_chunk.items():
            token_ids_BL = put(np.zeros((len(self._prompts), size), np.int32))
            start = put(np.int32(0))
            cache, hidden_BD = prefill_chunk(
                parameters, cache, hidden_BD, token_ids_BL, start, put(lengths_B)
            )
        token_ids_B, seen_BV = self._first_tokens(
            parameters, hidden_BD, put(lengths_B), self._seen_BV, *self._sampling
        )
        state = DecodeState(cache, put(lengths_B), token_ids_B, seen_BV)
        state, token_ids_B = self._decode_step(parameters, state, self._active_B, *self._sampling)
        token_ids_B.block_until_ready()
        return state.cache, hidden_BD

    def _prefill(self, cache: kv_cache.KVCache, hidden_BD: jax.Array) -> None:
        model = self._model
        padded_BL = pad_prompts(self._prompts, sum(self._chunks))
        started = time.perf_counter()
        start = 0
        for size in self._chunks:
            chunk_BL = model.put(padded_BL[:, start : start + size])
            cache, hidden_BD = self._prefill_chunk[size](
                model.parameters,
                cache,
                hidden_BD,
                chunk_BL,
                model.put(np.int32(start)),
                self._lengths_B,
            )
            start += size
        token_ids_B, seen_BV = self._first_tokens(
            model.parameters, hidden_BD, self._lengths_B, self._seen_BV, *self._sampling
        )
        self._first = np.asarray(token_ids_B)
        self._first_token_at = self._last_token_at = time.perf_counter()
        self._prefill_s = self._first_token_at - started
        self._decode_tokens = 0
        self._state = DecodeState(cache, self._lengths_B, token_ids_B, seen_BV)

    def __iter__(self) -> Iterator[np.ndarray]:
        token_ids_B = self._first
        started = 1
        pending = None
        while True:
            if pending is None and started < self._longest():
                pending, started = self._dispatch(), started + 1
            yield token_ids_B
            if pending is None or not self._active.any():
                return
            following = None
            if started < self._longest():
                following, started = self._dispatch(), started + 1
            token_ids_B = np.asarray(pending)
            pending = following
            self._last_token_at = time.perf_counter()
            self._decode_tokens += int(self._active.sum())

    def _longest(self) -> int:
        pairs = zip(self._active, self.max_new_tokens, strict=True)
        return max((limit for active, limit in pairs if active), default=0)

    def _dispatch(self) -> jax.Array:
        self._state, token_ids_B = self._decode_step(
            self._model.parameters, self._state, self._active_B, *self._sampling
        )
        token_ids_B.copy_to_host_async()
        return token_ids_B

    def finish(self, sequence: int) -> None:
        """Ends a sequence: it is not computed any more from the next dispatched step on."""
        self._active[sequence] = False
        if self._active.any():
            self._active_B = self._model.put(self._active.copy())

    def stats(self) -> GenerationStats:
        """Work and time so far."""
        return GenerationStats(
            num_sequences=len(self._prompts),
            prefill_tokens=sum(map(len, self._prompts)),
            prefill_s=self._prefill_s,
            new_tokens=len(self._prompts) + self._decode_tokens,
            decode_tokens=self._decode_tokens,
            decode_s=self._last_token_at - self._first_token_at,
            compile_s=self._compile_s,
            compiled_programs=self._num_compiled,
        )
