"""Decode steps as a loop over layers on the host, with a thread that copies experts."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.blank_experts import BlankExperts
from jmoe.engines.decode_loop import DecodeLoop
from jmoe.engines.expert_model import Supply
from jmoe.engines.forecast import NUM_TIMED
from jmoe.engines.layer_experts import LayerInputs
from jmoe.engines.prediction import GatePredictor, Predictor
from jmoe.engines.programs import DecodeState
from jmoe.engines.steps import BatchShape, Ending, Sampling
from jmoe.models.kv_cache import KVCache
from jmoe.planning.splitting import Held, Ways

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine


class OneByHost:
    """Has the host compute the first expert of each layer: to run each program once."""

    slots_pay = copies_pay = False

    def split(
        self,
        held: Held,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int],
        *,
        is_prompt: bool = False,
    ) -> Ways:
        return Ways(list(experts[1:]), [], list(experts[:1]))

    def in_time(self, layer: int, num_queued: int) -> bool:
        return False


class ThreadDecoder:
    """See ``steps.Decoder``."""

    num_waiting = 0
    runs_ahead = False  # the host works along: the next token would only delay this one

    def __init__(self, model: "OffloadEngine", shape: BatchShape, predictor: Predictor | None):
        if predictor is None and model.lookahead:
            predictor = GatePredictor(model.num_layers)
        self._model = model
        self._shape = shape
        self._loop = DecodeLoop(model, shape.batch_size, predictor, model.hybrid)

    def compile(
        self, cache: KVCache, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        model, loop = self._model, self._loop
        self._sampling = sampling
        batch_size = self._shape.batch_size
        int32_B = model.abstract((batch_size,), "int32")
        loop.compile(cache.layers, int32_B)
        self._last = {
            form: self._compile_last(inputs, int32_B, active_B)
            for form, inputs in loop.inputs.items()
        }

    def _compile_last(
        self, inputs: LayerInputs, lengths_B: jax.ShapeDtypeStruct, active_B: jax.Array
    ) -> jax.stages.Compiled:
        """The program behind the last layer's router."""
        model, shape = self._model, self._shape
        return model.program(
            layer_programs.last_experts,
            *inputs,
            model.ends,
            lengths_B,
            active_B,
            model.abstract_seen(shape.batch_size, shape.kind),
            *self._sampling,
            layer=0,
            kind=shape.kind,
        )

    def warm_up(self, state: DecodeState, active_B: jax.Array) -> DecodeState:
        blanks = BlankExperts(self._model)
        with self._loop.using(None):
            state, token_ids_B = self._step(blanks, state, active_B)
            if self._model.host_side is not None:
                token_ids_B.block_until_ready()
                times = []
                for _ in range(NUM_TIMED):
                    start = time.perf_counter()
                    state, token_ids_B = self._step(blanks, state, active_B)
                    token_ids_B.block_until_ready()
                    times.append(time.perf_counter() - start)
                self._model.step_s[self._shape.batch_size] = min(times)
        if (hybrid := self._model.hybrid) is not None:
            with self._loop.using(hybrid._replace(splitter=OneByHost())):
                state, token_ids_B = self._step(blanks, state, active_B)
        token_ids_B.block_until_ready()
        return state

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array, np.ndarray]:
        state, token_ids_B = self._step(self._model.experts, state, active_B)
        return state, token_ids_B, np.stack(self._loop.choices)

    def _step(
        self, experts: Supply, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        model = self._model
        caches = list(state.cache.layers)

        def finish(inputs: LayerInputs):
            return self._last[inputs.form](
                *inputs,
                model.ends,
                state.lengths_B,
                active_B,
                state.seen_BV,
                *self._sampling,
            )

        token_ids_B, lengths_B, seen_BV = self._loop.run(
            experts, caches, state.token_ids_B, state.lengths_B, active_B, finish
        )
        state = DecodeState(KVCache(tuple(caches)), lengths_B, token_ids_B, seen_BV)
        token_ids_B.copy_to_host_async()
        return state, token_ids_B
