"""Logits of given tokens in the offload engine, whichever way it takes its steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.compiled_decoder import MIN_STOP_IDS, compile_decode
from jmoe.engines.compiled_programs import Limits
from jmoe.engines.decode_loop import DecodeLoop
from jmoe.engines.layer_experts import LayerInputs
from jmoe.engines.prediction import GatePredictor
from jmoe.engines.programs import DecodeState
from jmoe.engines.prompt_stream import PromptStream
from jmoe.engines.prompts import pad_prompts
from jmoe.engines.steps import BatchShape
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models import kv_cache
from jmoe.models.kv_cache import KVCache
from jmoe.planning.chunks import prompt_chunks

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine


def score_prompt(model: "OffloadEngine", token_ids: Sequence[int]) -> np.ndarray:
    """Of one sequence, taken through as a prompt: float32 [L, V]."""
    longest = model.longest_chunk(1, len(token_ids))
    chunks = prompt_chunks(len(token_ids), longest)
    caches = _caches(model, 1, sum(chunks))
    stream = PromptStream(model, 1, caches, model.hybrid)
    padded_BL, start, logits = pad_prompts([token_ids], sum(chunks)), 0, []
    for size in chunks:
        stream.compile(size)
        valid_BL = (start + np.arange(size) < len(token_ids))[None]
        routed, y_AD = stream.run(
            model.places.supply,
            caches,
            model.put(padded_BL[:, start : start + size]),
            model.put(np.array([start], np.int32)),
            model.put(valid_BL),
        )
        program = model.program(layer_programs.prompt_logits, routed, y_AD, model.ends, layer=0)
        logits.append(np.asarray(program(routed, y_AD, model.ends))[0])
        start += size
    model.experts.settle()
    model.last_programs.clear()
    return np.concatenate(logits)[: len(token_ids)]


def score_steps(model: "OffloadEngine", token_ids_BL: np.ndarray) -> np.ndarray:
    """Of sequences of equal length, token by token as decode steps: float32 [B, L, V]."""
    by = _by_program if model.places.in_slots else _by_loop
    logits_BLV = by(model, token_ids_BL)
    model.last_programs.clear()
    return logits_BLV


def _by_loop(model: "OffloadEngine", token_ids_BL: np.ndarray) -> np.ndarray:
    """As ``score_steps``, with experts in arrays of their own."""
    batch_size, num_tokens = token_ids_BL.shape
    caches = _caches(model, batch_size, num_tokens)
    predictor = model.predictor or (GatePredictor(model.num_layers) if model.lookahead else None)
    loop = DecodeLoop(model, batch_size, predictor, model.hybrid)
    loop.compile(caches, model.abstract((batch_size,), "int32"))
    valid_B = model.put(np.ones(batch_size, bool))

    def finish(inputs: LayerInputs) -> jax.Array:
        program = model.program(layer_programs.last_logits, *inputs, model.ends, layer=0)
        return program(*inputs, model.ends)

    logits = []
    for position in range(num_tokens):
        start_B = model.put(np.full(batch_size, position, np.int32))
        tokens_B = model.put(token_ids_BL[:, position].astype(np.int32))
        logits_BLV = loop.run(model.experts, caches, tokens_B, start_B, valid_B, finish)
        logits.append(np.asarray(logits_BLV)[:, 0])
    model.experts.settle()
    return np.stack(logits, axis=1)


def _by_program(model: "OffloadEngine", token_ids_BL: np.ndarray) -> np.ndarray:
    """As ``score_steps``, with experts in slots."""
    batch_size, length = token_ids_BL.shape
    cache = KVCache(tuple(_caches(model, batch_size, length)))
    num_tokens, put, slots = model.plan.policy.tokens_per_call, model.put, model.slots
    assert slots is not None
    shape = BatchShape(
        batch_size=batch_size,
        chunks=(),
        capacity=0,
        kind=SamplingKind(greedy=True, truncated=False, penalized=False),
    )
    one = put(np.float32(1))
    values = SamplingValues(one, put(np.int32(0)), one, one, one)
    sampling = put(np.zeros(2, np.uint32)), values
    active_B = put(np.ones(batch_size, bool))
    ends_B = put(np.full(batch_size, length + 1, np.int32))
    limits = Limits(stop_ids=put(np.full(MIN_STOP_IDS, -1, np.int32)), lengths_B=ends_B)
    # What follows each token, and whatever after the last one.
    next_LB = np.zeros((-(-length // num_tokens) * num_tokens, batch_size), np.int32)
    next_LB[: length - 1] = token_ids_BL[:, 1:].T
    start_B = put(np.zeros(batch_size, np.int32))
    state = DecodeState(cache, start_B, put(token_ids_BL[:, 0].astype(np.int32)), None)
    given_NB = put(next_LB[:num_tokens])
    program = compile_decode(model, state, active_B, limits, given_NB, sampling, shape, num_tokens)
    logits_LBV = []
    for first in range(0, length, num_tokens):
        given_NB = put(next_LB[first : first + num_tokens])
        state, slots.state, made = program(
            model.ends,
            model.layers,
            model.host_blobs,
            state,
            slots.state,
            active_B,
            limits,
            given_NB,
            *sampling,
        )
        assert made.logits_NBV is not None
        logits_LBV.append(np.asarray(made.logits_NBV)[: int(made.num_steps)])
    return np.concatenate(logits_LBV).swapaxes(0, 1)


def _caches(
    model: "OffloadEngine", batch_size: int, num_positions: int
) -> list[kv_cache.LayerCache]:
    capacity = kv_cache.bucket_capacity(num_positions)
    cache = kv_cache.init_cache(model.config, batch_size, capacity, model.dtype, model.device)
    return list(cache.layers)
