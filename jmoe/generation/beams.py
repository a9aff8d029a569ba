"""Beam search: which continuations of a prompt are kept, which have ended, and when to stop.

Plain Python on the host, without arrays on a device. Which sequences are found, their scores and
their order are those of Hugging Face transformers 5, ``generate(num_beams=..., do_sample=False)``:

- A step looks at the best continuations of all beams by the sum of their log-probabilities. Those
  among the best num_beams that end, with a stop token or as long as they may be, are candidates for
  the result; the best num_beams that do not end are the next beams.
- The score of a sequence is that sum divided by (its new tokens, with the stop token) **
  length_penalty. The best num_beams ended ones are kept.
- It is over at the greatest length, or when num_beams have ended and, with early_stopping True, at
  once; else when the best beam could not become better than the worst of them. False takes the best
  beam's score at its length now; "never", where longer is better, at the greatest length.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Self

from jmoe.generation.options import GenerationOptions


def num_candidates(num_beams: int, stop_token_ids: Iterable[int]) -> int:
    """Continuations to look at in a step, so that as many as there are beams do not end."""
    return num_beams * (1 + len(set(stop_token_ids)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
      token_ids: its new tokens, including a stop token.
      score: sum of their log-probabilities, divided by a power of their number.
      finish_reason: "eos" (a stop token) or "length".
    """

    token_ids: tuple[int, ...]
    score: float
    finish_reason: Literal["eos", "length"]


class _Beam(NamedTuple):
    """A sequence that goes on: its last token, what is before that, and its log-probability."""

    token_id: int
    before: Self | None
    log_prob: float


class BeamSearch:
    """The search for one prompt.

    Beams lie in rows, as they do in the KV cache. One continuation of every beam that has any stays
    in its row, so that only those whose beam has several have to be copied, to rows of beams that
    nobody continues: a row is never both copied and overwritten. Before the first step there is one
    beam, the prompt, in row 0.

    Attributes:
      num_tokens: new tokens of each beam.
      parents: by row, the row that the beam there continues; a row without a beam is its own.
      token_ids: by row, its last token.
      log_probs: by row, of its tokens together; -inf where there is no beam.
      is_over: whether the result is known; then the beams count for nothing.
    """

    def __init__(self, options: GenerationOptions, max_new_tokens: int):
        num_beams = options.num_beams
        self.num_tokens = 0
        self.parents = list(range(num_beams))
        self.token_ids = [0] * num_beams
        self.log_probs = [0.0] + [-math.inf] * (num_beams - 1)
        self.is_over = False
        self._options = options
        self._stop_token_ids = frozenset(options.stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._beams: list[_Beam | None] = [None] * num_beams
        self._ended: list[Hypothesis] = []

    def advance(
        self, log_probs: Sequence[float], parents: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Takes the next tokens of all beams.

        Args:
          log_probs: of the best continuations, each with all tokens before; best first. As many as
            ``num_candidates``, or all that there are.
          parents: the rows that they continue.
          token_ids: with what.
        """
        assert not self.is_over
        self.num_tokens += 1
        is_last = self.num_tokens == self._max_new_tokens
        going_on: list[tuple[int, _Beam]] = []
        for rank, (log_prob, parent, token_id) in enumerate(
            zip(log_probs, parents, token_ids, strict=True)
        ):
            if log_prob == -math.inf:  # and so are all others: of rows without a beam
                break
            beam = _Beam(token_id, self._beams[parent], log_prob)
            stops = token_id in self._stop_token_ids
            if not (stops or is_last):
                going_on.append((parent, beam))
            elif rank < self._options.num_beams:
                self._ended.append(self._hypothesis(beam, "eos" if stops else "length"))
        self._ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self._ended[self._options.num_beams :]
        self._place(going_on[: self._options.num_beams])
        self.is_over = is_last or not going_on or not self._can_improve(going_on[0][1].log_prob)

    def best(self, number: int) -> list[Hypothesis]:
        """The best sequences that have ended, best first."""
        return self._ended[:number]

    def _hypothesis(self, beam: _Beam, reason: Literal["eos", "length"]) -> Hypothesis:
        token_ids, node = [], beam
        while node is not None:
            token_ids.append(node.token_id)
            node = node.before
        score = beam.log_prob / len(token_ids) ** self._options.length_penalty
        return Hypothesis(token_ids=tuple(token_ids[::-1]), score=score, finish_reason=reason)

    def _place(self, going_on: Sequence[tuple[int, _Beam]]) -> None:
        num_beams = self._options.num_beams
        rows = place([parent for parent, _ in going_on], num_beams)
        self._beams: list[_Beam | None] = [None] * num_beams
        self.parents = list(range(num_beams))
        self.token_ids, self.log_probs = [0] * num_beams, [-math.inf] * num_beams
        for row, (parent, beam) in zip(rows, going_on, strict=True):
            self.parents[row], self._beams[row] = parent, beam
            self.token_ids[row], self.log_probs[row] = beam.token_id, beam.log_prob

    def _can_improve(self, best_log_prob: float) -> bool:
        options = self._options
        if len(self._ended) < options.num_beams:
            return True
        if options.early_stopping is True:
            return False
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = self._max_new_tokens if longest else self.num_tokens
        return best_log_prob / length**options.length_penalty > self._ended[-1].score


def place(parents: Sequence[int], num_rows: int) -> list[int]:
    """Rows for beams that continue those in the rows of their parents; no two share one.

    The first that continues a row stays there.
    """
    free = iter(sorted(set(range(num_rows)) - set(parents)))
    seen: set[int] = set()
    rows = []
    for parent in parents:
        rows.append(next(free) if parent in seen else parent)
        seen.add(parent)
    return rows
