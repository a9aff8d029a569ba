"""Where experts are, and how they come and go, changes no bit of the logits."""

import functools

import numpy as np
import pytest

import jmoe
from tests.engines.offload_engines import (
    AlwaysWrong,
    Model,
    Needed,
    embedded_model,
    random_model,
    some_tokens,
)
from tests.equivalence import measures

NUM_TOKENS = 12  # of a sequence that is decoded
PROMPT_TOKENS = 28  # two chunks
CHUNK = 16
BATCHES = (1, 3)

PREFETCHES = {"off": 0, "1 layer ahead": 1, "always wrong": 1, "2 layers ahead": 2}
# Models, and what is prefetched: compiling programs for every distance is what takes the time.
MODELS = {
    "embedded, bf16": (
        lambda: embedded_model("bf16", "bfloat16"),
        ("1 layer ahead", "always wrong"),
    ),
    "embedded, int8": (lambda: embedded_model("int8"), ("2 layers ahead",)),
    "embedded, int4, host kernels": (
        lambda: embedded_model("int4", host_bits=8),
        tuple(PREFETCHES),
    ),
    "top 2 of 8, int4": (
        lambda: random_model("top 2 of 8", "int4"),
        ("1 layer ahead", "always wrong"),
    ),
    "top 3 of 6, int8": (
        lambda: random_model("top 3 of 6, window", "int8"),
        ("off", "1 layer ahead", "always wrong"),
    ),
    "top 3 of 6, bf16, host kernels": (
        lambda: random_model("top 3 of 6, window", "bf16", host_bits=8),
        ("off", "2 layers ahead"),
    ),
}
SLOTS = ("staging only", "top_k", "top_k + 1", "half", "all", "uneven", "one pool")
# Every size of cache with every prefetch, and each of both with every rule of eviction.
CASES = [
    (name, slots, prefetch, ("lru", "lfu", "random")[(i + j) % 3])
    for name, (_, prefetches) in MODELS.items()
    for i, slots in enumerate(SLOTS)
    for j, prefetch in enumerate(PREFETCHES)
    if prefetch in prefetches
]


@functools.cache
def reference(name: str):
    """With all experts on the device, where nothing has to be moved.

    Returns:
      Logits of a prompt, of sequences decoded in batches of both sizes, and the experts used
      by these.
    """
    make_model, prefetches = MODELS[name]
    model = make_model()
    engine = model.engine(
        lookahead=min(PREFETCHES[prefetch] for prefetch in prefetches), prefill_chunk=CHUNK
    )
    prompt = engine.logits(prompt_of(model))
    decoded, needed = [], []
    for batch_size in BATCHES:
        noted = Needed(engine)
        decoded.append(engine.decode_logits(some_tokens(model, batch_size, NUM_TOKENS)))
        needed.append(noted.steps)
    engine.close()
    assert all(np.isfinite(logits).all() for logits in (prompt, *decoded))
    return prompt, decoded, needed


def prompt_of(model: Model) -> list[int]:
    return some_tokens(model, PROMPT_TOKENS, seed=1).tolist()


@pytest.mark.parametrize(
    ("name", "slots", "prefetch", "eviction"), CASES, ids=map("; ".join, CASES)
)
def test_the_cache_and_what_fills_it_change_no_bit_of_the_logits(name, slots, prefetch, eviction):
    prompt, decoded, needed = reference(name)
    model = MODELS[name][0]()
    sizes = model.slots_of_every_kind()[slots]
    # As many places of staging as the plan gives, or as few as possible.
    num_staging = model.least_staging(sizes) if eviction == "lfu" else 0
    engine = model.engine(
        sizes,
        lookahead=PREFETCHES[prefetch],
        eviction=eviction,
        num_staging=num_staging,
        prefill_chunk=CHUNK,
    )
    np.testing.assert_array_equal(engine.logits(prompt_of(model)), prompt)
    for batch_size, expected, steps in zip(BATCHES, decoded, needed, strict=True):
        if prefetch == "always wrong":
            engine.predictor = AlwaysWrong(steps, model.num_experts)
        got = engine.decode_logits(some_tokens(model, batch_size, NUM_TOKENS))
        np.testing.assert_array_equal(got, expected)
    # Warm by now, in another way than before.
    np.testing.assert_array_equal(engine.logits(prompt_of(model)), prompt)
    engine.close()


# Against the engine with everything on the device, whose step is one program.

# Measured 2.6e-13 on one machine.
MAX_RESIDENT_NMSE = 1e-12


@pytest.fixture(scope="module")
def offloaded():
    """The embedded model in float32, with room for some of its experts."""
    llm = jmoe.load(dtype="float32", policy="offload", device_memory_gib=0.04)
    slots = llm.plan.policy.num_slots
    assert 0 < slots < llm.config.num_hidden_layers * llm.config.router.num_experts
    yield llm
    llm.close()


def test_logits_are_those_of_the_resident_model_up_to_rounding(llm, offloaded):
    (window,) = measures.eval_windows(llm.tokenizer, 100, 1)
    token_ids = list(window.token_ids)
    expected = llm.engine.logits(token_ids)
    streamed = measures.nmse(offloaded.engine.logits(token_ids), expected)
    decoded = measures.nmse(offloaded.engine.decode_logits(np.array([token_ids]))[0], expected)
    assert max(streamed.max(), decoded.max()) <= MAX_RESIDENT_NMSE


def test_greedy_texts_are_those_of_the_resident_model(llm, offloaded):
    options = measures.GREEDY | {"max_new_tokens": 100}
    prompts = ["import os", "def read(self, size):\n    ", "class Error(Exception):\n"]
    for prompt in (prompts[0], prompts):
        results = [model.generate(prompt, **options) for model in (llm, offloaded)]
        expected, got = ([r] if isinstance(r, jmoe.GenerationResult) else r for r in results)
        assert [r.token_ids for r in got] == [r.token_ids for r in expected]
        assert [r.text for r in got] == [r.text for r in expected]
        assert all(len(r.token_ids) == 100 for r in got)
