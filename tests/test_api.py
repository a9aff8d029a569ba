"""The public surface: ways to ask, what comes back, what is refused."""

import subprocess
import sys

import pytest

import jmoe
from jmoe.api import EMBEDDED_MODEL
from tests.scripts.processes import environment


@pytest.fixture(scope="module")
def llm() -> jmoe.LLM:
    return jmoe.load()


def test_text_ids_and_messages_are_prompts(llm):
    text = "import os"
    ids = llm.tokenize(text)
    assert ids[0] == llm.tokenizer.bos_token_id
    by_text, by_ids, by_messages = (
        llm.generate(prompt, max_new_tokens=8)
        for prompt in (text, ids, [{"role": "user", "content": text}])
    )
    assert by_text.text == by_ids.text == by_messages.text
    assert by_text.prompt_token_ids == by_messages.prompt_token_ids == tuple(ids)
    assert by_text.prompt == text
    assert llm.chat([{"role": "user", "content": text}], max_new_tokens=8).text == by_text.text


def test_a_list_of_prompts_gives_a_list_of_results(llm):
    prompts = ["import os", llm.tokenize("class A:"), [{"role": "user", "content": "def f("}]]
    results = llm.generate(prompts, max_new_tokens=6)
    assert [result.prompt for result in results] == prompts
    assert all(len(result.token_ids) == 6 for result in results)
    assert results[0].stats.num_sequences == 3
    (single,) = llm.generate(["import os"], max_new_tokens=6)
    assert single.finish_reason == "length"


def test_chunks_add_up_and_only_the_last_has_statistics(llm):
    chunks = list(llm.stream(["import os", "class A:"], max_new_tokens=9, temperature=0))
    results = llm.generate(["import os", "class A:"], max_new_tokens=9, temperature=0)
    for i, result in enumerate(results):
        mine = [chunk for chunk in chunks if chunk.index == i]
        assert "".join(chunk.text for chunk in mine) == result.text
        assert sum((chunk.token_ids for chunk in mine), ()) == result.token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * 8 + ["length"]
    assert [chunk.stats is None for chunk in chunks] == [True] * 17 + [False]


def test_a_stop_string_across_tokens_ends_the_text_before_it(llm):
    whole = llm.generate("class A:", max_new_tokens=40, temperature=0)
    pieces = [llm.tokenizer.decode([token_id]) for token_id in whole.token_ids]
    # The end of one token and the start of the next.
    at = next(i for i in range(5, 30) if len(pieces[i]) > 1 and len(pieces[i + 1]) > 1)
    stop = pieces[at][-1] + pieces[at + 1][0]
    result = llm.generate("class A:", max_new_tokens=40, temperature=0, stop=stop)
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_a_stop_token_ends_the_text_and_is_counted(llm):
    whole = llm.generate("class A:", max_new_tokens=20, temperature=0)
    last = whole.token_ids[7]
    result = llm.generate("class A:", max_new_tokens=20, temperature=0, stop_token_ids=[last])
    first = whole.token_ids.index(last)
    assert result.finish_reason == "eos"
    assert result.token_ids == whole.token_ids[: first + 1]
    assert result.text == llm.tokenizer.decode(whole.token_ids[:first])


def test_beams_come_best_first_and_a_stream_has_the_best_of_each_prompt_in_one_chunk(llm):
    prompts = ["import os", "class A:"]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    results = llm.generate(prompts, **options)
    for result in results:
        best, second = result.sequences
        assert best.score > second.score and best.token_ids != second.token_ids
        assert (result.text, result.token_ids, result.score) == (
            best.text,
            best.token_ids,
            best.score,
        )
        assert best.text == llm.tokenizer.decode(best.token_ids)
        assert best.finish_reason == result.finish_reason == "length"
    stats = results[0].stats
    assert (stats.num_sequences, stats.new_tokens) == (6, 72)
    chunks = sorted(llm.stream(prompts, **options), key=lambda chunk: chunk.index)
    assert [chunk.text for chunk in chunks] == [result.text for result in results]
    assert [chunk.sequences for chunk in chunks] == [result.sequences for result in results]
    assert sum(chunk.stats is not None for chunk in chunks) == 1


def test_without_beams_a_result_is_one_sequence_without_a_score(llm):
    result = llm.generate("import os", max_new_tokens=3)
    assert len(result.sequences) == 1 and result.score is None
    assert result.sequences[0].token_ids == result.token_ids


def test_an_abandoned_stream_leaves_nothing_that_matters(llm):
    before = llm.generate("import os", max_new_tokens=20)
    stream = llm.stream("def f(", max_new_tokens=200)
    next(stream)
    stream.close()
    assert llm.generate("import os", max_new_tokens=20).token_ids == before.token_ids


def test_a_generation_ends_at_the_context(llm):
    ids = [5] * 1020
    result = llm.generate(ids, max_new_tokens=100, stop_token_ids=[])
    assert len(result.token_ids) == 4
    assert result.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (["x", ""], {}, "the prompt is empty"),
        (None, {}, "NoneType"),
        ([[]], {}, "the prompt is empty"),
        ([3, "x"], {}, "message 0 is malformed"),
        ([{"content": "no role"}], {}, "role"),
        ([5] * 1024, {}, "longer than the model's context"),
        ("x", {"temprature": 1}, "unknown generation option 'temprature'"),
        ("x", {"max_new_tokens": -1}, "max_new_tokens"),
        ("x", {"num_beams": 2, "num_return_sequences": 3}, "more sequences are to be returned"),
        ([5] * 1024, {"num_beams": 2}, "longer than the model's context"),
    ],
)
def test_an_unusable_request_is_refused_before_a_stream_is_made(llm, prompt, options, message):
    with pytest.raises(jmoe.RequestError, match=message):
        llm.stream(prompt, **options)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(jmoe.ConfigError, match="int3"):
        jmoe.load(dtype="int3")


def test_too_large_a_model_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("jmoe.planning.memory.available_host_bytes", lambda: 10_000_000)
    with pytest.raises(jmoe.CapacityError, match="does not fit"):
        jmoe.load()


def test_a_model_runs_on_the_device_that_was_asked_for():
    code = """
import jax, jmoe
second = jax.devices()[1]
llm = jmoe.load(device=second)
run = llm.engine.start([[1, 2]], llm.options(max_new_tokens=3))
assert run._active_B.devices() == {second}
assert list(run)
assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(run._state))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(XLA_FLAGS="--xla_force_host_platform_device_count=2"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_local_path_loads_without_the_network(tmp_path):
    # tests/store/test_hub.py shows that no socket is opened.
    assert jmoe.load(str(EMBEDDED_MODEL)).name == str(EMBEDDED_MODEL)
