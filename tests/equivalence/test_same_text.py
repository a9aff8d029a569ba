"""How a text is asked for does not change it: again, streamed, or in a batch with others."""

import pytest

from tests.equivalence import embedded
from tests.equivalence.measures import GREEDY, SAMPLED

PROMPTS = (
    "import os",
    "def read(self, size):\n    ",
    "class Error(Exception):\n",
)
# Measured 1.6e-12 on one machine.
MAX_BATCH_NMSE = 1e-9


def test_the_same_seed_gives_the_same_text_20_times(llm):
    results = [llm.generate(PROMPTS[1], seed=7, **SAMPLED) for _ in range(20)]
    assert len({result.token_ids for result in results}) == 1
    assert len({result.text for result in results}) == 1


def test_other_seeds_give_other_texts(llm):
    texts = {llm.generate(PROMPTS[1], seed=seed, **SAMPLED).text for seed in range(10)}
    assert len(texts) == 10


@pytest.mark.parametrize("options", [GREEDY, SAMPLED | {"seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "stop string"])
def test_streamed_text_equals_text_at_once(llm, options, stops):
    expected = llm.generate(PROMPTS[0], **options)
    if stops:
        # From the middle of the text, so that it begins and ends within tokens.
        middle = len(expected.text) // 2
        stop = expected.text[middle : middle + 7]
        full_text = expected.text
        options = options | {"stop": ("never in the text", stop)}
        expected = llm.generate(PROMPTS[0], **options)
        assert expected.finish_reason == "stop"
        assert expected.text == full_text.split(stop)[0]

    chunks = list(llm.stream(PROMPTS[0], **options))
    assert "".join(chunk.text for chunk in chunks) == expected.text
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert tuple(token_ids) == expected.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == expected.finish_reason


def test_streamed_batch_equals_batch_at_once(llm):
    expected = llm.generate(PROMPTS, seed=3, **SAMPLED)
    texts = ["" for _ in PROMPTS]
    token_ids: list[tuple[int, ...]] = [() for _ in PROMPTS]
    for chunk in llm.stream(PROMPTS, seed=3, **SAMPLED):
        texts[chunk.index] += chunk.text
        token_ids[chunk.index] += chunk.token_ids
    assert texts == [result.text for result in expected]
    assert token_ids == [result.token_ids for result in expected]


def test_greedy_text_of_a_batch_equals_that_of_single_prompts(llm):
    batch = llm.generate(PROMPTS, **GREEDY)
    singles = [llm.generate(prompt, **GREEDY) for prompt in PROMPTS]
    assert [result.token_ids for result in batch] == [result.token_ids for result in singles]
    assert [result.text for result in batch] == [result.text for result in singles]


def test_logits_of_a_batch_equal_those_of_single_prompts_where_routers_decide_clearly(llm):
    difference = embedded.batch_difference(llm.engine, llm.tokenizer, num_batches=2)
    assert difference.max_nmse_compared <= MAX_BATCH_NMSE
    # The comparison must not become empty.
    assert difference.share_compared > 0.9
