"""Beam search returns the sequences of transformers, with their scores and in their order."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest

import jmoe
from jmoe import native
from jmoe.engines.resident import ResidentEngine
from jmoe.generation.beams import Hypothesis
from jmoe.generation.options import GenerationOptions
from tests.equivalence.checkpoints import RANDOM_MIXTRALS
from tests.equivalence.measures import random_prompt

# Checkpoints, and whether host kernels compute them, if there are any.
RANDOM = {"gqa4-window16-old-rope": True, "head-dim24-tied-top3": False}
NEW_TOKENS = 16
# Of sums of log-probabilities. Measured 2e-6 on one machine.
SCORE_TOLERANCE = 2e-5

# What is set, and with how many stop tokens.
CASES = [
    ({"num_beams": 2}, 0),
    ({"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never"}, 1),
    ({"num_beams": 4, "num_return_sequences": 4}, 1),
    ({"num_beams": 4, "early_stopping": True, "length_penalty": 0.0}, 1),
    ({"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.3}, 1),
    ({"num_beams": 8, "num_return_sequences": 8, "early_stopping": True}, 2),
    ({"num_beams": 8, "num_return_sequences": 4, "length_penalty": -1.0}, 2),
    ({"num_beams": 8, "early_stopping": "never", "length_penalty": 2.0}, 2),
]
NAMES = [
    ", ".join([*(f"{name}={value}" for name, value in settings.items()), f"{number} stop tokens"])
    for settings, number in CASES
]


@dataclasses.dataclass
class Subject:
    """A checkpoint in jmoe and in transformers, and two prompts of different lengths.

    Stop tokens are some that the prompts' most probable continuations have.
    """

    engine: ResidentEngine
    reference: Any  # tests.equivalence.reference.Reference, which needs torch
    prompts: list[list[int]]

    def __post_init__(self):
        self._stop_token_ids = self._frequent_tokens()
        self._found: dict[str, list[list[Hypothesis]]] = {}

    def stop_token_ids(self, number: int) -> tuple[int, ...]:
        return tuple(self._stop_token_ids[:number])

    def found(self, settings: dict[str, Any], num_stops: int) -> list[list[Hypothesis]]:
        """Of every prompt, all of them in one batch."""
        options = GenerationOptions(
            max_new_tokens=NEW_TOKENS, stop_token_ids=self.stop_token_ids(num_stops), **settings
        )
        key = str(options)
        if key not in self._found:
            run = self.engine.start_beams(self.prompts, options)
            self._found[key] = [found.hypotheses for found in sorted(run)]
        return self._found[key]

    def _frequent_tokens(self) -> list[int]:
        counts: collections.Counter[int] = collections.Counter()
        for prompt in self.prompts:
            for token_ids, _ in self.reference.beams(
                prompt, num_beams=4, num_return_sequences=4, max_new_tokens=NEW_TOKENS
            ):
                counts.update(set(token_ids[2:-2]))
        return [token_id for token_id, _ in counts.most_common(2)]


@pytest.fixture(scope="module", params=["embedded", *RANDOM])
def subject(request, tmp_path_factory) -> Subject:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if request.param == "embedded":
        llm = request.getfixturevalue("llm")
        prompts = [llm.tokenize(text) for text in ("class Reader:\n    def ", "import os")]
        return Subject(llm.engine, request.getfixturevalue("embedded_reference"), prompts)
    from tests.equivalence.comparing import Pair

    (spec,) = [spec for spec in RANDOM_MIXTRALS if spec.name == request.param]
    pair = Pair.random(spec, tmp_path_factory.mktemp("mixtral"))
    prompts = [random_prompt(length, pair.engine.config.vocab_size) for length in (21, 5)]
    if RANDOM[request.param] and native.status().available:
        pair = pair.with_host_kernels()
    return Subject(pair.engine, pair.reference, prompts)


@pytest.mark.parametrize(("settings", "num_stops"), CASES, ids=NAMES)
def test_sequences_and_scores_are_those_of_transformers(subject, settings, num_stops):
    stops = subject.stop_token_ids(num_stops)
    found = subject.found(settings, num_stops)
    for prompt, hypotheses in zip(subject.prompts, found, strict=True):
        expected = subject.reference.beams(
            prompt, max_new_tokens=NEW_TOKENS, stop_token_ids=stops, **settings
        )
        assert [list(h.token_ids) for h in hypotheses] == [token_ids for token_ids, _ in expected]
        np.testing.assert_allclose(
            [h.score for h in hypotheses], [score for _, score in expected], SCORE_TOLERANCE
        )


def test_sequences_of_these_cases_end_with_stop_tokens_and_at_the_greatest_length(subject):
    """Or the comparisons would not be what they are called."""
    reasons = collections.Counter()
    for settings, num_stops in CASES:
        for hypotheses in subject.found(settings, num_stops):
            reasons.update(h.finish_reason for h in hypotheses)
    assert min(reasons["eos"], reasons["length"]) >= 5


def test_beams_of_the_offload_engine_are_those_of_the_resident_one(llm):
    prompts = ["class Reader:\n    def ", "import os"]
    options = {
        "num_beams": 4,
        "num_return_sequences": 4,
        "max_new_tokens": NEW_TOKENS,
        "stop_token_ids": llm.tokenizer.encode("import os\n")[-1:],
        "repetition_penalty": 1.0,
    }
    expected = llm.generate(prompts, **options)
    with jmoe.load(dtype="float32", policy="offload", device_memory_gib=0.03) as offloaded:
        results = offloaded.generate(prompts, **options)
        residency = results[0].stats.residency
    assert residency is not None and residency.decode.demand_loads
    for result, other in zip(results, expected, strict=True):
        assert [s.token_ids for s in result.sequences] == [s.token_ids for s in other.sequences]
        assert [s.text for s in result.sequences] == [s.text for s in other.sequences]
        np.testing.assert_allclose(
            [s.score for s in result.sequences],
            [s.score for s in other.sequences],
            SCORE_TOLERANCE,
        )
