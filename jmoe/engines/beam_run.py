"""Beams on their way from prompts to the sequences that are returned, in any engine.

Every prompt is prefilled once, and its KV cache repeated for its beams. In a step all beams of all
prompts go through the model together. The device finds their best continuations, the host chooses
(``generation.beams``), and where a beam continues another row than its own, that row's new
positions are copied to it in the KV cache.
"""

import dataclasses
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from jmoe.engines import beam_programs
from jmoe.engines.beam_programs import COPIED_POSITIONS
from jmoe.engines.programs import DecodeState
from jmoe.engines.run import Run
from jmoe.engines.steps import BatchShape, BeamSteps
from jmoe.generation.beams import BeamSearch, Hypothesis, num_candidates
from jmoe.generation.sampling import SamplingKind

# What the steps are compiled for: they choose nothing.
_NO_SAMPLING = SamplingKind(greedy=True, truncated=False, penalized=False)


class Found(NamedTuple):
    """What became of a prompt: its best sequences, best first."""

    prompt: int
    hypotheses: list[Hypothesis]


class BeamRun(Run):
    """Iterating gives what was ``Found``, of every prompt once, as soon as its search is over."""

    _steps: BeamSteps

    def _plan(self) -> BatchShape:
        return dataclasses.replace(super()._plan(), kind=_NO_SAMPLING)

    def _make_steps(self) -> BeamSteps:
        options = self._options
        self._searches = [BeamSearch(options, limit) for limit in self.max_new_tokens]
        return self._model.beam_steps(self._shape)

    def _prepare(self) -> None:
        put, shape = self._model.put, self._shape
        self._lengths_N = put(self._prompt_lengths())
        self._penalty = put(np.float32(self._options.repetition_penalty))
        self._is_penalized = self._options.repetition_penalty != 1
        self._steps.prepare(self._lengths_N, self._active_B, self._sampling(), self._ending())
        self._first_candidates = self._compile_candidates(shape.num_prompts, 1)
        self._candidates = self._compile_candidates(shape.batch_size, shape.num_beams)

    def _compile_candidates(self, num_rows: int, num_beams: int) -> jax.stages.Compiled:
        """Compiles the program that is behind the prefill, with one beam, or behind steps."""
        model, vocab_size = self._model, self._model.config.vocab_size
        before = model.programs.num_compiled
        number = num_candidates(self._shape.num_beams, self._options.stop_token_ids)
        arguments = (
            model.put(np.zeros((num_rows, vocab_size), np.float32)),
            model.put(np.zeros(num_rows, np.float32)),
            model.put(np.zeros(num_rows, np.int32)),
            model.put(np.zeros(num_rows, bool)),
            model.put(np.zeros((num_rows, vocab_size), bool)) if self._is_penalized else None,
            self._put_chosen() if self._is_penalized and num_beams > 1 else None,
            self._penalty,
        )
        program = model.programs.get(
            beam_programs.candidates,
            *arguments,
            num_beams=num_beams,
            number=min(number, num_beams * vocab_size),
        )
        if model.programs.num_compiled > before:
            jax.block_until_ready(program(*arguments))
        return program

    def _prefill(self, padded_NL: np.ndarray) -> None:
        put, num_beams, num_prompts = self._model.put, self._shape.num_beams, len(self._prompts)
        seen_NV = self._seen_in_prompts() if self._is_penalized else None
        state, logits_NV = self._steps.prefill(padded_NL, self._lengths_N, None)
        log_probs_NC, indices_NC, _, _ = self._first_candidates(
            logits_NV,
            put(np.zeros(num_prompts, np.float32)),
            self._lengths_N,
            put(np.zeros(num_prompts, bool)),
            None if seen_NV is None else put(seen_NV),
            None,
            self._penalty,
        )
        self._seen_BV = None if seen_NV is None else put(np.repeat(seen_NV, num_beams, axis=0))
        self._lengths_B = put(np.repeat(self._prompt_lengths(), num_beams))
        self._state = state
        self._found = self._choose(log_probs_NC, indices_NC)

    def _take_steps(self) -> Generator[Found, None, None]:
        found = self._found
        while True:
            yield from found
            if not self._active.any():
                return
            self._decode_tokens += int(self._active.sum())
            self._decode_steps += 1
            started = time.perf_counter()
            with self._decoding:
                found = self._step()
            self._decode_s += time.perf_counter() - started

    def _step(self) -> list[Found]:
        """Takes the last token of every beam through, and chooses the next ones."""
        put, cache = self._model.put, self._state.cache
        copies = self._copies()
        if copies is not None:
            cache = self._steps.follow(cache, put(copies))
        token_ids_B = put(np.array(self._by_row("token_ids"), np.int32))
        state = DecodeState(cache, self._lengths_B, token_ids_B, None)
        self._state, logits_BV = self._steps.step(state, self._active_B)
        log_probs_NC, indices_NC, self._lengths_B, self._seen_BV = self._candidates(
            logits_BV,
            put(np.array(self._by_row("log_probs"), np.float32)),
            self._lengths_B,
            self._active_B,
            self._seen_BV,
            None if self._seen_BV is None else self._put_chosen(),
            self._penalty,
        )
        return self._choose(log_probs_NC, indices_NC)

    def _choose(self, log_probs_NC: jax.Array, indices_NC: jax.Array) -> list[Found]:
        """Advances the searches that go on; returns what those found that are over now."""
        log_probs = np.asarray(log_probs_NC).tolist()
        parents, token_ids = np.divmod(np.asarray(indices_NC), self._model.config.vocab_size)
        num_beams, found = self._shape.num_beams, []
        for i, search in enumerate(self._searches):
            if search.is_over:
                continue
            search.advance(log_probs[i], parents[i].tolist(), token_ids[i].tolist())
            if search.is_over:
                found.append(Found(i, search.best(self._options.num_return_sequences)))
                self._active[i * num_beams : (i + 1) * num_beams] = False
        if found and self._active.any():
            self._active_B = self._model.put(self._active.copy())
        return found

    def _copies(self) -> np.ndarray | None:
        """What ``beam_programs.follow_parents`` has to copy, int32 [1 + B, 3]; None is nothing."""
        num_beams, rows = self._shape.num_beams, []
        num_cached = 0  # new positions
        for i, search in enumerate(self._searches):
            if not search.is_over:
                num_cached = search.num_tokens - 1
                rows += [
                    (i * num_beams + parent, i * num_beams + row, len(self._prompts[i]))
                    for row, parent in enumerate(search.parents)
                    if parent != row
                ]
        if not (rows and num_cached):
            return None
        copies = np.zeros((1 + self._shape.batch_size, 3), np.int32)
        copies[0, :2] = len(rows), -(-num_cached // COPIED_POSITIONS)
        copies[1 : 1 + len(rows)] = rows
        return copies

    def _put_chosen(self) -> jax.Array:
        """The parent of every row, among all of the batch, and its last token: int32 [2, B]."""
        num_beams = self._shape.num_beams
        parents = [
            i * num_beams + parent
            for i, search in enumerate(self._searches)
            for parent in search.parents
        ]
        return self._model.put(np.array([parents, self._by_row("token_ids")], np.int32))

    def _by_row(self, attribute: str) -> list[Any]:
        """What the searches say of their rows, one after the other."""
        return [value for search in self._searches for value in getattr(search, attribute)]
