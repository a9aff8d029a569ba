"""Beams in the offload engine, whose decode steps go either way.

All beams of all prompts are the tokens of a layer: each expert that any of them chose is moved at
most once, and applied to all that chose it.
"""

import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jmoe.engines import beam_programs
from jmoe.engines.beam_steps import BeamCache
from jmoe.engines.compiled_decoder import step_static
from jmoe.engines.expert_model import Supply
from jmoe.engines.layer_experts import LayerInputs
from jmoe.engines.offload_steps import OffloadSteps
from jmoe.engines.programs import DecodeState
from jmoe.engines.steps import BatchShape, Decoder, Ending, Sampling
from jmoe.engines.thread_decoder import ThreadDecoder
from jmoe.models import kv_cache
from jmoe.models.kv_cache import KVCache
from jmoe.residency.array_cache import abstract_cache

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine


class OffloadBeamSteps(OffloadSteps):
    """See ``steps.BeamSteps``."""

    def _by_thread(self) -> Decoder:
        return BeamThreadDecoder(self._model, self._shape, self._predictor)

    def _by_program(self) -> Decoder:
        return BeamCompiledDecoder(self._model, self._shape)

    def _compile_cache(self, cache: KVCache) -> KVCache:
        self._beam_cache = BeamCache(self._compile, cache, self._shape)
        return self._beam_cache.abstract

    def _compile(self, program: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
        compiled = self._model.programs.get(program, *args, **static)
        self._model.last_programs.append(compiled)
        return compiled

    def _compile_first(self, hidden_BD: jax.ShapeDtypeStruct, lengths_B: jax.Array) -> None:
        model = self._model
        self._first_logits = model.program(
            beam_programs.first_offload_logits, model.ends, hidden_BD, layer=0
        )

    def _first(
        self, hidden_BD: jax.Array, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        logits_BV = self._first_logits(self._model.ends, hidden_BD)
        caches, self._caches = self._caches, []
        cache = self._beam_cache.widen(KVCache(tuple(caches)))
        return DecodeState(cache, lengths_B, lengths_B, None), logits_BV

    def _warm_up_steps(self, state: DecodeState, active_B: jax.Array) -> None:
        model, shape = self._model, self._shape
        cache = self._beam_cache.warm_up(state.cache, model.put)
        ones_B = model.put(np.ones(shape.batch_size, np.int32))
        zeros_B = model.put(np.zeros(shape.batch_size, np.int32))
        state = self._decoder.warm_up(DecodeState(cache, ones_B, zeros_B, None), active_B)
        for array in jax.tree.leaves(state.cache):
            array.delete()  # there is no room for those of the prompts besides
        prompts = kv_cache.init_cache(
            model.config, shape.num_prompts, shape.capacity, model.dtype, model.device
        )
        self._caches = list(prompts.layers)

    def follow(self, cache: KVCache, copies: jax.Array) -> KVCache:
        return self._beam_cache.follow(cache, copies)


class BeamThreadDecoder(ThreadDecoder):
    """See ``steps.Decoder``: returns logits in the place of tokens."""

    def _compile_last(
        self, inputs: LayerInputs, lengths_B: jax.ShapeDtypeStruct, active_B: jax.Array
    ) -> jax.stages.Compiled:
        model = self._model
        return model.program(beam_programs.last_offload_logits, *inputs, model.ends, layer=0)

    def _step(
        self, experts: Supply, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        caches, ends = list(state.cache.layers), self._model.ends

        def finish(inputs: LayerInputs) -> jax.Array:
            return self._last[inputs.form](*inputs, ends)

        logits_BV = self._loop.run(
            experts, caches, state.token_ids_B, state.lengths_B, active_B, finish
        )
        cache = KVCache(tuple(caches))
        return DecodeState(cache, state.lengths_B, state.token_ids_B, None), logits_BV


class BeamCompiledDecoder:
    """See ``steps.Decoder``: one step in a call, which returns logits in the place of tokens."""

    num_waiting = 0
    runs_ahead = False

    def __init__(self, model: "OffloadEngine", shape: BatchShape):
        self._model = model
        self._shape = shape
        self._is_watched = model.recorder is not None or model.experts.timeline is not None

    def compile(
        self, cache: KVCache, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        model = self._model
        static = step_static(model, self._shape)
        int32_B = model.abstract((self._shape.batch_size,), "int32")
        self._program = model.programs.get(
            beam_programs.cached_step_logits,
            model.ends,
            model.layers,
            model.host_blobs,
            cache,
            int32_B,
            int32_B,
            abstract_cache(static.cache, model.layout.num_items, model.layout.dtype),
            active_B,
            static=static,
        )
        model.last_programs.append(self._program)

    def warm_up(self, state: DecodeState, active_B: jax.Array) -> DecodeState:
        # With no sequence active it needs no expert.
        none_B = self._model.put(np.zeros(active_B.shape, bool))
        state, logits_BV, _ = self._call(state, none_B)
        logits_BV.block_until_ready()
        return state

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array, np.ndarray | None]:
        start = time.perf_counter()
        state, logits_BV, chosen_LBK = self._call(state, active_B)
        if not self._is_watched:
            return state, logits_BV, None
        choices_LNTW = np.asarray(chosen_LBK)[:, None]
        timeline = self._model.experts.timeline
        if timeline is not None:
            timeline.span("device", "a token of every beam", start, time.perf_counter())
        return state, logits_BV, choices_LNTW

    def _call(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        model = self._model
        slots = model.slots
        assert slots is not None
        cache, slots.state, logits_BV, chosen_LBK = self._program(
            model.ends,
            model.layers,
            model.host_blobs,
            state.cache,
            state.lengths_B,
            state.token_ids_B,
            slots.state,
            active_B,
        )
        state = DecodeState(cache, state.lengths_B, state.token_ids_B, None)
        return state, logits_BV, chosen_LBK
