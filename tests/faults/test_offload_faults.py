"""The engines when the link or the caller fails: typed errors, right tokens, no hang."""

import gc
import operator
import random
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

import jmoe
from jmoe.engines.batch import BatchRun
from jmoe.engines.offload import OffloadEngine
from jmoe.errors import RequestError, TransferError
from jmoe.generation.options import GenerationOptions
from jmoe.residency.link import Link, LinkCounters, ThrottledLink
from jmoe.residency.prefetch import Fetcher
from tests.engines.offload_engines import Model, greedy, random_model
from tests.residency.faulty_link import FaultyLink

NEW_TOKENS = 8
PROMPTS = [[5, 9, 2, 71, 40], list(range(1, 30))]
OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=())


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("top 2 of 8", "int4")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return greedy(model.resident, PROMPTS, NEW_TOKENS)[0]


@pytest.fixture
def engine(model) -> Iterator[OffloadEngine]:
    engine = model.engine((3,) * model.num_layers, prefill_chunk=16)
    yield engine
    engine.close()


def num_fetchers() -> int:
    return sum(thread.name == "jmoe-fetcher" for thread in threading.enumerate())


class CallingLink:
    """A link that calls something before each copy, on the fetcher's thread."""

    hands_out_early = False

    def __init__(self, inner: Link):
        self.counters: LinkCounters = inner.counters
        self.before: Callable[[], object] = lambda: None
        self._inner = inner

    def start(self, blob: np.ndarray) -> jax.Array:
        self.before()
        return self._inner.start(blob)

    def remaining_s(self, array: jax.Array) -> float:
        return self._inner.remaining_s(array)

    def finish(self, array: jax.Array) -> None:
        self._inner.finish(array)

    def close(self) -> None:
        self._inner.close()


# Copies that fail or are late


@pytest.mark.parametrize(
    ("seed", "slots", "eviction"),
    [
        (1, "staging only", "lru"),
        (2, "top_k", "lfu"),
        (3, "half", "likely"),
        (4, "uneven", "random"),
        (5, "one pool", "likely"),
    ],
)
def test_copies_that_fail_or_are_late_never_give_a_wrong_token(
    model, expected, seed, slots, eviction
):
    rates = [1 - 0.02 * seed - 0.02, 0.01, 0.01, 0.02 * seed]
    fates = random.Random(seed).choices(["ok", "start", "finish", "slow"], rates, k=400)
    coming = iter(fates)
    link = FaultyLink(model.link(), seed=seed, script=coming, slow_s=2e-3)
    sizes = model.slots_of_every_kind()[slots]
    engine = model.engine(sizes, link=link, eviction=eviction, seed=seed, prefill_chunk=16)
    num_failed, texts = 0, []
    while operator.length_hint(coming) or num_failed == 0:
        texts = [[] for _ in PROMPTS]
        try:
            for token_ids_B in engine.start(PROMPTS, OPTIONS):
                for text, token_id in zip(texts, token_ids_B.tolist(), strict=True):
                    text.append(token_id)
        except TransferError as error:
            num_failed += 1
            assert "layer" in str(error) and "expert" in str(error)
        for text, right in zip(texts, expected, strict=True):
            assert text == right[: len(text)]
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    engine.close()


# Callers that leave


def by_break(run: BatchRun) -> None:
    for _ in run:
        break


def by_close(run: BatchRun) -> None:
    tokens = iter(run)
    next(tokens)
    tokens.close()


def by_an_exception(run: BatchRun) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in run:
            raise ZeroDivisionError


def by_dropping_it(run: BatchRun) -> None:
    next(iter(run))


def by_not_looking(run: BatchRun) -> None:
    pass


def by_keeping_it_in_a_cycle(run: BatchRun) -> None:
    tokens = iter(run)
    next(tokens)
    cycle: list = [tokens]
    cycle.append(cycle)


@pytest.mark.parametrize(
    "leave",
    [by_break, by_close, by_an_exception, by_dropping_it, by_not_looking, by_keeping_it_in_a_cycle],
)
def test_whoever_leaves_in_the_middle_leaves_nothing_behind(engine, expected, leave):
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    num_threads = threading.active_count()
    for _ in range(3):
        leave(engine.start(PROMPTS, OPTIONS))
        assert not engine.experts.cache._pinned
        assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    gc.collect()
    assert threading.active_count() == num_threads
    assert engine.experts.cache.is_whole()


@pytest.mark.parametrize("ended_by", ["the fetcher's thread", "the engine's thread"])
def test_a_batch_may_be_finalized_while_another_one_runs(model, expected, ended_by, monkeypatch):
    """The garbage collector ends generators at any time, and on any thread."""
    link = CallingLink(model.link())
    engine = model.engine((0,) * model.num_layers, link=link, prefill_chunk=16)
    greedy(engine, PROMPTS, NEW_TOKENS)
    left = []
    for _ in range(20):
        left.append(iter(engine.start(PROMPTS, OPTIONS)))
        next(left[-1])

    def end_one() -> None:
        if left:
            left.pop().close()

    if ended_by == "the fetcher's thread":
        link.before = end_one
    else:
        wait = Fetcher.wait

        def ending_wait(self, key):
            end_one()
            return wait(self, key)

        monkeypatch.setattr(Fetcher, "wait", ending_wait)
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    assert not left
    engine.close()


def test_two_generations_at_once_are_refused_and_the_second_one_is_right(engine, expected):
    first = iter(engine.start(PROMPTS, OPTIONS))
    early = [next(first).tolist() for _ in range(3)]
    assert early == np.transpose([text[:3] for text in expected]).tolist()
    second = engine.start(PROMPTS, OPTIONS)
    with pytest.raises(RequestError, match="generation has ended") as caught:
        next(first)
    assert "one at a time" in str(caught.value)
    assert np.transpose([t.tolist() for t in second]).tolist() == expected
    with pytest.raises(StopIteration):
        next(first)


def test_the_memory_of_a_generation_that_was_ended_is_free(engine):
    """Or two KV caches would share the budget of one."""
    run = engine.start(PROMPTS, OPTIONS)
    tokens = iter(run)
    next(tokens)
    next(tokens)
    caches = jax.tree.leaves(run._state.cache)
    assert not any(array.is_deleted() for array in caches)
    engine.start(PROMPTS, OPTIONS)
    assert all(array.is_deleted() for array in caches)


def test_the_resident_engine_takes_generations_in_turn(model, expected):
    runs = [iter(model.resident.start(PROMPTS, OPTIONS)) for _ in range(2)]
    steps = [[next(run).tolist() for run in runs] for _ in range(NEW_TOKENS)]
    for i in range(2):
        assert np.transpose([step[i] for step in steps]).tolist() == expected


# The end


def test_an_engine_is_closed_twice_and_then_refuses_to_work(model, expected):
    before = num_fetchers()
    engine = model.engine((3,) * model.num_layers, prefill_chunk=16)
    assert greedy(engine, PROMPTS, NEW_TOKENS)[0] == expected
    assert num_fetchers() == before + 1
    engine.close()
    engine.close()
    assert num_fetchers() == before
    for work in (
        lambda: engine.start(PROMPTS, OPTIONS),
        lambda: engine.logits(PROMPTS[0]),
        lambda: engine.decode_logits(np.array(PROMPTS[:1])),
    ):
        with pytest.raises(RequestError, match="the model was closed"):
            work()


def test_a_model_is_closed_before_it_has_run(model):
    engine = model.engine()
    engine.close()
    with pytest.raises(RequestError, match="the model was closed"):
        engine.start(PROMPTS, OPTIONS)


def test_closing_in_the_middle_of_a_generation_ends_it(engine):
    run = iter(engine.start(PROMPTS, OPTIONS))
    next(run)
    engine.close()
    with pytest.raises((TransferError, RequestError), match="closed"):
        for _ in run:
            pass


def test_closing_from_another_thread_ends_the_wait_for_a_slow_link(model):
    engine = model.engine((0,) * model.num_layers, prefill_chunk=16)
    greedy(engine, PROMPTS, NEW_TOKENS)
    engine.close()
    link = ThrottledLink(model.link(), 1.0)  # a byte per second
    engine = model.engine((0,) * model.num_layers, link=link, prefill_chunk=16)
    timer = threading.Timer(0.3, engine.close)
    timer.start()
    with pytest.raises(TransferError, match="closed"):
        greedy(engine, PROMPTS, NEW_TOKENS)
    timer.join()


def test_a_language_model_is_right_after_its_stream_was_left():
    with jmoe.load(policy="offload", device_memory_gib=0.02) as llm:
        whole = llm.generate("class A", max_new_tokens=6).text
        stream = llm.stream("class A", max_new_tokens=6)
        part = next(stream).text
        assert whole.startswith(part)
        again = llm.stream("class A", max_new_tokens=6)
        with pytest.raises(RequestError, match="generation has ended"):
            list(stream)
        assert "".join(chunk.text for chunk in again) == whole
        assert isinstance(llm.engine, OffloadEngine)
    with pytest.raises(RequestError, match="the model was closed"):
        llm.generate("class A", max_new_tokens=6)
