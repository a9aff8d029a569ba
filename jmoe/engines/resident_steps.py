"""A batch in the resident engine: a chunk of a prompt, or a decode step, is one executable."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines import programs
from jmoe.engines.device_model import DeviceModel
from jmoe.engines.programs import DecodeState
from jmoe.engines.steps import BatchShape, Ending, Sampling
from jmoe.models import kv_cache
from jmoe.models.kv_cache import KVCache


class ResidentSteps:
    """See ``steps.Steps``."""

    runs_ahead = True

    def __init__(self, model: DeviceModel, shape: BatchShape):
        self._model = model
        self._shape = shape

    def prepare(
        self, lengths_B: jax.Array, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        model, shape = self._model, self._shape
        self._sampling = sampling
        self._cache = kv_cache.init_cache(
            model.config, shape.num_prompts, shape.capacity, model.dtype, model.device
        )
        hidden_shape = (shape.num_prompts, model.config.hidden_size)
        self._hidden_BD = model.put(np.zeros(hidden_shape, jnp.dtype(model.dtype)))
        self._seen_BV = None
        if shape.kind.penalized:
            self._seen_BV = model.put(np.zeros((shape.batch_size, model.config.vocab_size), bool))
        before = model.programs.num_compiled
        self._compile_prompts(lengths_B)
        self._compile(lengths_B, active_B)
        if model.programs.num_compiled > before:
            self._warm_up(active_B)

    def _compile_prompts(self, lengths_B: jax.Array) -> None:
        model, batch_size = self._model, self._shape.num_prompts
        int32 = jnp.int32
        start = jax.ShapeDtypeStruct((), int32)
        self._prefill_chunk = {
            size: model.programs.get(
                programs.prefill_chunk,
                model.parameters,
                self._cache,
                self._hidden_BD,
                jax.ShapeDtypeStruct((batch_size, size), int32),
                start,
                lengths_B,
                **model.static_arguments(batch_size * size),
            )
            for size in set(self._shape.chunks)
        }

    def _compile(self, lengths_B: jax.Array, active_B: jax.Array) -> None:
        model = self._model
        self._first_tokens = model.programs.get(
            programs.first_tokens,
            model.parameters,
            self._hidden_BD,
            lengths_B,
            self._seen_BV,
            *self._sampling,
            **model.model_arguments(),
            kind=self._shape.kind,
        )
        token_ids_B = lengths_B  # of the same shape and dtype
        self._decode_step = model.programs.get(
            programs.decode_step,
            model.parameters,
            DecodeState(self._cache, lengths_B, token_ids_B, self._seen_BV),
            active_B,
            *self._sampling,
            **model.static_arguments(self._shape.batch_size),
            kind=self._shape.kind,
        )

    def _warm_up(self, active_B: jax.Array) -> None:
        """Runs each program once, on prompts of one token: backends finish a program then.

        What that leaves in the cache lies beyond every sequence's length, and is overwritten.
        """
        put, batch_size = self._model.put, self._shape.num_prompts
        parameters = self._model.parameters
        lengths_B = np.ones(batch_size, np.int32)
        cache, hidden_BD = self._cache, self._hidden_BD
        for size, prefill_chunk in self._prefill_chunk.items():
            token_ids_BL = put(np.zeros((batch_size, size), np.int32))
            start = put(np.int32(0))
            cache, hidden_BD = prefill_chunk(
                parameters, cache, hidden_BD, token_ids_BL, start, put(lengths_B)
            )
        self._hidden_BD = hidden_BD
        self._warm_up_steps(cache, put(lengths_B), active_B)

    def _warm_up_steps(self, cache: KVCache, lengths_B: jax.Array, active_B: jax.Array) -> None:
        parameters, hidden_BD = self._model.parameters, self._hidden_BD
        token_ids_B, seen_BV = self._first_tokens(
            parameters, hidden_BD, lengths_B, self._seen_BV, *self._sampling
        )
        state = DecodeState(cache, lengths_B, token_ids_B, seen_BV)
        state, token_ids_B = self._decode_step(parameters, state, active_B, *self._sampling)
        token_ids_B.block_until_ready()
        self._cache = state.cache

    def prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        cache, hidden_BD = self._read_prompts(padded_BL, lengths_B)
        token_ids_B, seen_BV = self._first_tokens(
            self._model.parameters, hidden_BD, lengths_B, seen_BV, *self._sampling
        )
        return DecodeState(cache, lengths_B, token_ids_B, seen_BV), token_ids_B

    def _read_prompts(
        self, padded_BL: np.ndarray, lengths_B: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        """Returns the KV cache and the final hidden states of the prompts' last tokens."""
        model, cache, hidden_BD = self._model, self._cache, self._hidden_BD
        start = 0
        for size in self._shape.chunks:
            chunk_BL = model.put(padded_BL[:, start : start + size])
            cache, hidden_BD = self._prefill_chunk[size](
                model.parameters, cache, hidden_BD, chunk_BL, model.put(np.int32(start)), lengths_B
            )
            start += size
        del self._cache, self._hidden_BD, self._seen_BV
        return cache, hidden_BD

    def step(self, state: DecodeState, active_B: jax.Array) -> tuple[DecodeState, jax.Array]:
        state, token_ids_B = self._decode_step(
            self._model.parameters, state, active_B, *self._sampling
        )
        token_ids_B.copy_to_host_async()
        return state, token_ids_B

    def residency(self) -> None:
        return None

    def end(self) -> None:
        pass

    def close(self) -> None:
        pass
