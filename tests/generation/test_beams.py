"""Beam search on a made-up model: against lists of all sequences, and against all there are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.generation.beams import BeamSearch, Hypothesis, num_candidates, place
from jmoe.generation.options import GenerationOptions


class Tokens:
    """Log-probabilities of the next token, by the tokens before: random, and the same each time."""

    def __init__(self, num_tokens: int, seed: int):
        self.num_tokens = num_tokens
        self._seed = seed

    def log_probs(self, before: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self._seed, *before])
        logits = 2 * rng.standard_normal(self.num_tokens)
        return logits - np.log(np.exp(logits).sum())

    def log_prob(self, sequence: tuple[int, ...]) -> float:
        return sum(self.log_probs(sequence[:i])[token] for i, token in enumerate(sequence))


def search(model: Tokens, options: GenerationOptions) -> list[Hypothesis]:
    """What BeamSearch finds. Rows hold sequences as a KV cache would, which only parents change."""
    beams = BeamSearch(options, options.max_new_tokens)
    rows: list[tuple[int, ...]] = [()] * options.num_beams
    number = num_candidates(options.num_beams, options.stop_token_ids)
    while not beams.is_over:
        together = np.concatenate(
            [
                log_prob + model.log_probs(row)
                for log_prob, row in zip(beams.log_probs, rows, strict=True)
            ]
        )
        best = np.argsort(-together, kind="stable")[:number]
        parents, token_ids = np.divmod(best, model.num_tokens)
        beams.advance(together[best].tolist(), parents.tolist(), token_ids.tolist())
        assert beams.num_tokens == len(rows[0]) + 1
        rows = [
            (*rows[parent], token_id)
            for parent, token_id in zip(beams.parents, beams.token_ids, strict=True)
        ]
        for row, log_prob in zip(rows, beams.log_probs, strict=True):
            assert log_prob == -math.inf or log_prob == pytest.approx(model.log_prob(row))
    return beams.best(options.num_return_sequences)


def explicit_search(model: Tokens, options: GenerationOptions) -> list[Hypothesis]:
    """The same without rows: sequences are tuples, and every one is continued by every token."""
    width, stops = options.num_beams, set(options.stop_token_ids)
    beams, ended = [()], []
    for length in range(1, options.max_new_tokens + 1):
        longer = [(*beam, token) for beam in beams for token in range(model.num_tokens)]
        longer.sort(key=lambda sequence: -model.log_prob(sequence))
        is_last = length == options.max_new_tokens
        for sequence in longer[:width]:
            if is_last or sequence[-1] in stops:
                score = model.log_prob(sequence) / length**options.length_penalty
                ended.append((score, sequence))
        ended = sorted(ended, reverse=True)[:width]
        beams = [sequence for sequence in longer if sequence[-1] not in stops][:width]
        if not beams or (len(ended) == width and options.early_stopping is True):
            break
        at = length
        if options.early_stopping == "never" and options.length_penalty > 0:
            at = options.max_new_tokens
        attainable = model.log_prob(beams[0]) / at**options.length_penalty
        if len(ended) == width and attainable <= ended[-1][0]:
            break
    return [
        Hypothesis(
            token_ids=sequence,
            score=score,
            finish_reason="eos" if sequence[-1] in stops else "length",
        )
        for score, sequence in ended[: options.num_return_sequences]
    ]


LENGTH_PENALTIES = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
EARLY_STOPPING = st.sampled_from([True, False, "never"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_and_parents_give_what_lists_of_sequences_give(data):
    num_tokens = data.draw(st.integers(3, 7))
    stops = data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=2))
    width = data.draw(st.integers(2, 6))
    options = GenerationOptions(
        max_new_tokens=data.draw(st.integers(1, 6)),
        num_beams=width,
        num_return_sequences=data.draw(st.integers(1, width)),
        length_penalty=data.draw(LENGTH_PENALTIES),
        early_stopping=data.draw(EARLY_STOPPING),
        stop_token_ids=tuple(stops),
    )
    model = Tokens(num_tokens, seed=data.draw(st.integers(0, 2**20)))
    got, expected = search(model, options), explicit_search(model, options)
    assert [h.token_ids for h in got] == [h.token_ids for h in expected]
    assert [h.finish_reason for h in got] == [h.finish_reason for h in expected]
    assert [h.score for h in got] == pytest.approx([h.score for h in expected])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), length_penalty=LENGTH_PENALTIES, stop=st.integers(0, 2))
def test_with_a_beam_for_everything_the_best_sequence_of_all_is_found(seed, length_penalty, stop):
    model, length = Tokens(3, seed), 4
    options = GenerationOptions(
        max_new_tokens=length,
        num_beams=3**length,
        length_penalty=length_penalty,
        early_stopping="never",
        stop_token_ids=(stop,),
    )
    complete = [
        sequence
        for n in range(1, length + 1)
        for sequence in itertools.product(range(3), repeat=n)
        if stop not in sequence[:-1] and (n == length or sequence[-1] == stop)
    ]
    scores = [model.log_prob(sequence) / len(sequence) ** length_penalty for sequence in complete]
    (found,) = search(model, options)
    assert found.score == pytest.approx(max(scores))
    assert found.token_ids == complete[int(np.argmax(scores))]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), beam_parents(n))))
def test_no_row_is_both_copied_and_overwritten(case):
    num_rows, parents = case
    rows = place(parents, num_rows)
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(num_rows))
    moved = [(parent, row) for parent, row in zip(parents, rows, strict=True) if parent != row]
    assert not {parent for parent, _ in moved} & {row for _, row in moved}
    # No more copies than there must be.
    assert len(moved) == len(parents) - len(set(parents))


def beam_parents(num_rows: int):
    return st.lists(st.integers(0, num_rows - 1), max_size=num_rows)


def test_a_stop_token_beyond_the_best_beams_ends_nothing():
    """It is looked at only so that enough others are left to go on."""
    options = GenerationOptions(max_new_tokens=9, num_beams=2, stop_token_ids=(0,))
    beams = BeamSearch(options, 9)
    beams.advance([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0], [5, 6, 0, 7])
    assert beams.best(2) == []
    assert (beams.token_ids, beams.log_probs) == ([5, 6], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "is_over"),
    [
        (True, 1.0, True),
        # The best beam, -9 with 2 tokens: -4.5 now, -0.9 with 10. The worst that ended: -2.
        (False, 1.0, True),
        ("never", 1.0, False),
        # And without a reward for length it stays at -9.
        ("never", 0.0, True),
    ],
)
def test_when_a_search_is_over(early_stopping, length_penalty, is_over):
    options = GenerationOptions(
        max_new_tokens=10,
        num_beams=2,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_token_ids=(0,),
    )
    beams = BeamSearch(options, 10)
    beams.advance([-1.0, -2.0, -3.0], [0, 0, 0], [0, 5, 6])
    assert not beams.is_over
    beams.advance([-4.0, -9.0, -10.0], [0, 0, 1], [0, 5, 6])
    assert beams.is_over is is_over
    assert [h.token_ids for h in beams.best(2)] == [(0,), (5, 0)]


def test_a_vocabulary_smaller_than_the_beams_leaves_rows_without_one():
    options = GenerationOptions(max_new_tokens=3, num_beams=4)
    beams = BeamSearch(options, 3)
    beams.advance([-0.5, -1.0], [0, 0], [0, 1])
    assert beams.log_probs == [-0.5, -1.0, -math.inf, -math.inf]
