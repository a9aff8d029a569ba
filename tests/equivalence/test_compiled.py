"""How many slots a program has, and how many tokens it makes, changes no bit of the logits."""

import functools

import numpy as np
import pytest

import jmoe
from tests.engines.offload_engines import Model, embedded_model, random_model, some_tokens
from tests.equivalence import measures

NUM_TOKENS = 9  # of a sequence that is decoded
PROMPT_TOKENS = 28
CHUNK = 16

# Models, and sequences at once: each number of slots is a program of its own.
MODELS = {
    "top 2 of 8, int4": (lambda: random_model("top 2 of 8", "int4"), 1),
    "top 2 of 8, int8, host kernels": (lambda: random_model("top 2 of 8", "int8", host_bits=8), 3),
    "top 3 of 6, bf16": (lambda: random_model("top 3 of 6, window", "bf16", "bfloat16"), 3),
    "embedded, int4, host kernels": (lambda: embedded_model("int4", host_bits=8), 1),
}
# Slots of a layer from the experts of a token on; None is few for all layers to share.
SLOTS = {"shared": None, "top_k": 0, "top_k + 1": 1, "half": 2, "all": 99}
OTHERS = [
    {"eviction": "lfu"},
    {"tokens_per_call": 4},
    {"fetch_ahead": 2},
    {"tokens_per_call": 3, "eviction": "lfu", "fetch_ahead": 1},
]
CASES = [
    (name, slots, OTHERS[i % len(OTHERS)])
    for name in MODELS
    for i, slots in enumerate(SLOTS)
    if name != "embedded, int4, host kernels" or slots in ("shared", "half")
]


def engine_of(model: Model, slots: str, **policy):
    more = SLOTS[slots]
    size = 0 if more is None else min(model.top_k + more, model.num_experts)
    return model.engine(
        (size,) * model.num_layers,
        engine="compiled",
        num_staging=model.top_k + 3,
        prefill_chunk=CHUNK,
        **policy,
    )


def logits_of(name: str, slots: str, **policy) -> tuple[np.ndarray, ...]:
    """Of a prompt; of sequences, decoded with a warm cache; and of the prompt again."""
    make_model, batch_size = MODELS[name]
    model = make_model()
    engine = engine_of(model, slots, **policy)
    prompt = some_tokens(model, PROMPT_TOKENS, seed=1).tolist()
    logits = (
        engine.logits(prompt),
        engine.decode_logits(some_tokens(model, batch_size, NUM_TOKENS)),
        engine.logits(prompt),
    )
    engine.close()
    return logits


@functools.cache
def reference(name: str) -> tuple[np.ndarray, ...]:
    """With a slot for every expert, and a token in each call."""
    return logits_of(name, "all")


@pytest.mark.parametrize(
    ("name", "slots", "policy"),
    CASES,
    ids=[f"{n}; {s}; {' '.join(f'{k}={v}' for k, v in p.items())}" for n, s, p in CASES],
)
def test_slots_rules_and_tokens_per_call_change_no_bit_of_the_logits(name, slots, policy):
    for got, expected in zip(logits_of(name, slots, **policy), reference(name), strict=True):
        np.testing.assert_array_equal(got, expected)


# Against the other engines, in which other programs compute the same.

# Measured on one machine: see docs/engines.md.
MAX_NMSE = 1e-12
LONG_TEXT = 500


@pytest.fixture(scope="module")
def compiled():
    """The embedded model in float32, with room for some of its experts."""
    llm = jmoe.load(
        dtype="float32",
        policy="offload",
        device_memory_gib=0.045,
        engine="compiled",
        tokens_per_call=8,
    )
    assert 0 < llm.plan.policy.num_slots < 96
    yield llm
    llm.close()


def test_logits_are_those_of_the_resident_model_up_to_rounding(llm, compiled):
    (window,) = measures.eval_windows(llm.tokenizer, 60, 1)
    token_ids = list(window.token_ids)
    expected = llm.engine.logits(token_ids)
    decoded = measures.nmse(compiled.engine.decode_logits(np.array([token_ids]))[0], expected)
    assert decoded.max() <= MAX_NMSE


def test_a_long_greedy_text_is_that_of_the_other_engines(llm, compiled):
    prompt, options = "class Reader:", {"temperature": 0, "max_new_tokens": LONG_TEXT}
    options |= {"stop_token_ids": ()}
    expected = llm.generate(prompt, **options)
    assert len(expected.token_ids) == LONG_TEXT
    got = compiled.generate(prompt, **options)
    assert got.token_ids == expected.token_ids
    assert got.stats.residency.engine == "compiled"
    assert 0 < got.stats.residency.decode.hit_rate < 1
    with jmoe.load(dtype="float32", policy="offload", device_memory_gib=0.045) as thread:
        assert thread.generate(prompt, **options).token_ids == expected.token_ids


def test_a_sampled_and_penalized_text_is_that_of_the_resident_model(llm, compiled):
    options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    expected = llm.generate("import os", max_new_tokens=40, **options)
    assert compiled.generate("import os", max_new_tokens=40, **options).text == expected.text
