"""Decode steps as calls of one program that holds the expert cache, too."""

import collections
import time
from typing import TYPE_CHECKING

import jax
import numpy as np

from jmoe.engines.compiled_programs import Limits, Made, StepStatic, decode_tokens
from jmoe.engines.programs import DecodeState
from jmoe.engines.steps import BatchShape, Ending, Sampling
from jmoe.models.kv_cache import KVCache
from jmoe.residency.array_cache import abstract_cache

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine

# Stop ids that a program has room for; more take the next power of two.
MIN_STOP_IDS = 4


class CompiledDecoder:
    """See ``steps.Decoder``. Of the tokens that a call made, each step hands out one."""

    def __init__(self, model: "OffloadEngine", shape: BatchShape, num_tokens: int):
        """Args:
        model: whose slots nobody else uses meanwhile.
        shape: of the batch.
        num_tokens: to make in one call.
        """
        # Who looks at experts or times of every call has to wait for it.
        is_watched = model.recorder is not None or model.experts.timeline is not None
        self.runs_ahead = num_tokens == 1 and not is_watched
        self._model = model
        self._shape = shape
        self._num_tokens = num_tokens
        # Of the last call, not handed out yet: token ids by sequence, and the experts chosen.
        self._waiting: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def compile(
        self, cache: KVCache, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        model, shape = self._model, self._shape
        self._sampling = sampling
        stop_ids = list(ending.stop_token_ids)
        room = max(MIN_STOP_IDS, 1 << (len(stop_ids) - 1).bit_length() if stop_ids else 0)
        self._limits = Limits(
            stop_ids=model.put(np.array(stop_ids + [-1] * (room - len(stop_ids)), np.int32)),
            lengths_B=model.put(ending.lengths_B.astype(np.int32)),
        )
        int32_B = model.abstract((shape.batch_size,), "int32")
        seen_BV = model.abstract_seen(shape.batch_size, shape.kind)
        self._program = compile_decode(
            model,
            DecodeState(cache, int32_B, int32_B, seen_BV),  # type: ignore[arg-type]
            active_B,
            self._limits,
            None,
            sampling,
            shape,
            self._num_tokens,
        )

    def warm_up(self, state: DecodeState, active_B: jax.Array) -> DecodeState:
        # With no sequence active the program ends at once, and needs no expert.
        none_B = self._model.put(np.zeros(active_B.shape, bool))
        state, made = self._call(state, none_B)
        made.num_steps.block_until_ready()
        return state

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array | np.ndarray, np.ndarray | None]:
        if not self._waiting:
            start = time.perf_counter()
            state, made = self._call(state, active_B)
            if self.runs_ahead:
                made.token_ids_NB.copy_to_host_async()
                return state, made.token_ids_NB, None
            num_steps = int(made.num_steps)
            timeline = self._model.experts.timeline
            if timeline is not None:
                timeline.span("device", f"{num_steps} tokens", start, time.perf_counter())
            chosen_NLBK = np.asarray(made.chosen_NLBK)[:num_steps]
            tokens_NB = np.asarray(made.token_ids_NB)[:num_steps]
            self._waiting.extend(zip(tokens_NB, chosen_NLBK, strict=True))
        token_ids_B, chosen_LBK = self._waiting.popleft()
        return state, token_ids_B, chosen_LBK[:, None]

    def _call(self, state: DecodeState, active_B: jax.Array) -> tuple[DecodeState, Made]:
        model = self._model
        slots = model.slots
        assert slots is not None
        state, slots.state, made = self._program(
            model.ends,
            model.layers,
            model.host_blobs,
            state,
            slots.state,
            active_B,
            self._limits,
            None,
            *self._sampling,
        )
        return state, made


def step_static(model: "OffloadEngine", shape: BatchShape, num_tokens: int = 1) -> StepStatic:
    """What a program for so many tokens of a batch is compiled for, with the slots planned now."""
    cache = model.places.static
    assert cache is not None
    return StepStatic(
        config=model.config,
        dtype=model.dtype,
        quant=model.quant,
        host=model.host,
        platform=model.device.platform,
        cache=cache,
        kind=shape.kind,
        num_tokens=num_tokens,
        num_ahead=model.plan.policy.fetch_ahead,
    )


def compile_decode(
    model: "OffloadEngine",
    state: DecodeState,
    active_B: jax.Array,
    limits: Limits,
    given_NB: jax.Array | None,
    sampling: Sampling,
    shape: BatchShape,
    num_tokens: int,
) -> jax.stages.Compiled:
    """Compiles ``decode_tokens`` for the slots that are planned now."""
    static = step_static(model, shape, num_tokens)
    layout = model.layout
    program = model.programs.get(
        decode_tokens,
        model.ends,
        model.layers,
        model.host_blobs,
        state,
        abstract_cache(static.cache, layout.num_items, layout.dtype),
        active_B,
        limits,
        given_NB,
        *sampling,
        static=static,
    )
    model.last_programs.append(program)
    return program
