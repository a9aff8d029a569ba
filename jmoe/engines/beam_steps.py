"""Beams in the resident engine, and their KV cache in any engine."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines import beam_programs
from jmoe.engines.device_model import DeviceModel
from jmoe.engines.programs import DecodeState
from jmoe.engines.resident_steps import ResidentSteps
from jmoe.engines.steps import BatchShape
from jmoe.models import kv_cache
from jmoe.models.kv_cache import KVCache

# Compiles a program for arguments of these shapes, with these static arguments.
Compile = Callable[..., jax.stages.Compiled]


class BeamCache:
    """From the KV cache of prompts to that of their beams, and from one step to the next."""

    def __init__(self, compile_program: Compile, prompts: KVCache, shape: BatchShape):
        """Compiles the programs.

        Args:
          compile_program: for the device that the cache is on.
          prompts: their KV cache, or its shape.
          shape: of the batch.
        """
        num_beams = shape.num_beams
        widen = functools.partial(_widened, num_beams=num_beams)
        self.abstract: KVCache = jax.tree.map(widen, prompts)
        self._repeat = compile_program(
            beam_programs.repeat_layer, prompts.layers[0], num_beams=num_beams
        )
        copies = jax.ShapeDtypeStruct((1 + shape.batch_size, 3), jnp.int32)
        self._follow = compile_program(beam_programs.follow_parents, self.abstract, copies)
        self._no_copies = np.array([[0, 1, 0]] + [[0, 0, 0]] * shape.batch_size, np.int32)

    def widen(self, prompts: KVCache) -> KVCache:
        """Repeats every prompt's row for its beams, and frees those of the prompts."""
        layers = []
        for layer in prompts.layers:
            layers.append(self._repeat(layer))
            # One after the other: there is room for one layer twice, and not for all.
            jax.tree.map(lambda array: array.delete(), layer)
        return KVCache(tuple(layers))

    def follow(self, cache: KVCache, copies: jax.Array) -> KVCache:
        """See ``beam_programs.follow_parents``. Donates: cache."""
        return self._follow(cache, copies)

    def warm_up(self, cache: KVCache, put: Callable[[Any], jax.Array]) -> KVCache:
        """Runs the program once, without copying anything. Donates: cache."""
        return self._follow(cache, put(self._no_copies))


class ResidentBeamSteps(ResidentSteps):
    """See ``steps.BeamSteps``."""

    runs_ahead = False  # the host chooses every token

    def __init__(self, model: DeviceModel, shape: BatchShape):
        super().__init__(model, shape)
        assert not shape.kind.penalized

    def _compile(self, lengths_B: jax.Array, active_B: jax.Array) -> None:
        model = self._model
        self._beam_cache = BeamCache(model.programs.get, self._cache, self._shape)
        self._first_logits = model.programs.get(
            beam_programs.first_logits,
            model.parameters,
            self._hidden_BD,
            **model.model_arguments(),
        )
        int32_B = jax.ShapeDtypeStruct(active_B.shape, jnp.int32)
        self._step_logits = model.programs.get(
            beam_programs.step_logits,
            model.parameters,
            self._beam_cache.abstract,
            int32_B,
            int32_B,
            active_B,
            **model.static_arguments(self._shape.batch_size),
        )

    def _warm_up_steps(self, cache: KVCache, lengths_B: jax.Array, active_B: jax.Array) -> None:
        model, shape = self._model, self._shape
        self._first_logits(model.parameters, self._hidden_BD)
        cache = self._beam_cache.warm_up(self._beam_cache.widen(cache), model.put)
        ones_B = model.put(np.ones(shape.batch_size, np.int32))
        _, logits_BV = self._step_logits(model.parameters, cache, ones_B, ones_B, active_B)
        logits_BV.block_until_ready()
        self._cache = kv_cache.init_cache(
            model.config, shape.num_prompts, shape.capacity, model.dtype, model.device
        )

    def prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        cache, hidden_BD = self._read_prompts(padded_BL, lengths_B)
        logits_BV = self._first_logits(self._model.parameters, hidden_BD)
        return DecodeState(self._beam_cache.widen(cache), lengths_B, lengths_B, None), logits_BV

    def step(self, state: DecodeState, active_B: jax.Array) -> tuple[DecodeState, jax.Array]:
        cache, logits_BV = self._step_logits(
            self._model.parameters, state.cache, state.lengths_B, state.token_ids_B, active_B
        )
        return DecodeState(cache, state.lengths_B, state.token_ids_B, None), logits_BV

    def follow(self, cache: KVCache, copies: jax.Array) -> KVCache:
        return self._beam_cache.follow(cache, copies)


def _widened(array: jax.Array | jax.ShapeDtypeStruct, num_beams: int) -> Any:
    shape = (array.shape[0] * num_beams, *array.shape[1:])
    return jax.ShapeDtypeStruct(shape, array.dtype)
