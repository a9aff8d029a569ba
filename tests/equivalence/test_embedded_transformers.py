"""The embedded model gives what transformers gives for it, on text it was not trained on."""

import numpy as np
import pytest

from jmoe.api import EMBEDDED_MODEL
from tests.equivalence import embedded, measures


def test_token_ids_of_the_held_out_text_equal_those_of_transformers(llm):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = measures.eval_text()
    assert llm.tokenizer.encode(text) == theirs(text)["input_ids"]


def test_the_most_probable_token_is_the_same_at_1000_positions(llm, embedded_reference):
    windows = embedded.top1_windows(llm.tokenizer)
    ours = [llm.engine.logits(window.token_ids) for window in windows]
    theirs = [embedded_reference.logits(window.token_ids) for window in windows]
    assert measures.top1_agreement(ours, theirs) == (1000, 1000)
    errors = [measures.nmse(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert np.max(errors) <= measures.MAX_NMSE


def test_perplexity_of_the_held_out_text_equals_that_of_transformers(llm, embedded_reference):
    windows = embedded.top1_windows(llm.tokenizer)
    ours = measures.perplexity(llm.engine.logits, windows)
    theirs = measures.perplexity(embedded_reference.logits, windows)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("length", measures.PROMPT_LENGTHS)
def test_logits_and_greedy_continuation_equal_those_of_transformers(
    llm, embedded_reference, length
):
    """The held-out text from its beginning, cut after so many tokens."""
    prompt = llm.tokenizer.encode(measures.eval_text())[:length]
    errors = measures.nmse(llm.engine.logits(prompt), embedded_reference.logits(prompt))
    assert errors.max() <= measures.MAX_NMSE
    result = llm.generate(prompt, **measures.GREEDY)
    expected = embedded_reference.greedy(prompt)
    assert list(result.token_ids) == expected


def test_unequal_batch_continues_like_transformers(llm, embedded_reference):
    token_ids = llm.tokenizer.encode(measures.eval_text())
    prompts = [token_ids[:length] for length in measures.PROMPT_LENGTHS]
    results = llm.generate(prompts, **measures.GREEDY)
    expected = [embedded_reference.greedy(prompt) for prompt in prompts]
    assert [list(result.token_ids) for result in results] == expected
