"""One batch on its way from prompts to tokens: a sequence for every prompt.

Every step makes one token of every sequence that still grows. Where a step is one program, the host
is one step behind: it dispatches a step before it waits for the tokens of the step before, so that
the device never waits for Python.
"""

import time
from collections.abc import Generator

import jax
import numpy as np

from jmoe.engines.run import Run
from jmoe.engines.steps import Steps


class BatchRun(Run):
    """Iterating gives each step's new token ids, int32 [B], until every sequence has ended.

    The caller says which sequences end, with ``finish``; entries of ended sequences are
    rubbish. A sequence that reaches its max_new_tokens must be finished by the caller too.
    """

    def _make_steps(self) -> Steps:
        assert self._shape.num_beams == 1, "beams have a run of their own"
        return self._model.steps(self._shape)

    def _prepare(self) -> None:
        self._lengths_B = self._model.put(self._prompt_lengths())
        self._steps.prepare(self._lengths_B, self._active_B, self._sampling(), self._ending())

    def _prefill(self, padded_NL: np.ndarray) -> None:
        is_penalized = self._shape.kind.penalized
        seen_BV = self._model.put(self._seen_in_prompts()) if is_penalized else None
        self._state, token_ids_B = self._steps.prefill(padded_NL, self._lengths_B, seen_BV)
        del self._lengths_B
        self._first = np.asarray(token_ids_B)

    def _take_steps(self) -> Generator[np.ndarray, None, None]:
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
            self._decode_steps += 1

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
