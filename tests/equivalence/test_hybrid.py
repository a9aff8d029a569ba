"""What the host computes is what the device computes, up to rounding; a record repeats it."""

import functools

import numpy as np
import pytest

from jmoe.planning.cost import ExpertCosts
from tests.engines.offload_engines import embedded_model, greedy, random_model, some_tokens
from tests.equivalence import measures

NUM_TOKENS = 12
CHUNK = 16
PROMPT_TOKENS = 28  # two chunks
# The limit; on a CPU backend both sides run the same kernels, and agree much better.
MAX_NMSE = 5e-4

MODELS = {
    "embedded, int4, host kernels": lambda: embedded_model("int4", host_bits=8),
    "embedded, f32": lambda: embedded_model("f32"),
    "top 3 of 6, bf16, host kernels": lambda: random_model(
        "top 3 of 6, window", "bf16", host_bits=8
    ),
}
COSTS = {
    "as slow as the link": ExpertCosts(copy_s=1e-3, host=lambda n: 1e-3, device=lambda n: 1e-4),
    "by tokens": ExpertCosts(copy_s=2e-3, host=lambda n: 1e-3 * n, device=lambda n: 1e-4),
}
# What becomes of misses, at which costs, with which slots.
CASES = (
    ("split", "as slow as the link", ("top_k", "uneven")),
    ("split", "by tokens", ("staging only", "half")),
    ("host", "by tokens", ("half",)),
)


@functools.cache
def resident_logits(name: str):
    """Of a prompt, and of sequences that are decoded, one and three at once."""
    model = MODELS[name]()
    engine = model.engine(lookahead=1, prefill_chunk=CHUNK)
    prompt = engine.logits(some_tokens(model, PROMPT_TOKENS, seed=1).tolist())
    decoded = [engine.decode_logits(some_tokens(model, b, NUM_TOKENS)) for b in (1, 3)]
    engine.close()
    return prompt, decoded


@pytest.mark.parametrize(("misses", "costs", "every_slots"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_device(name, misses, costs, every_slots):
    prompt, decoded = resident_logits(name)
    model = MODELS[name]()
    for slots in every_slots:
        engine = model.engine(
            model.slots_of_every_kind()[slots],
            costs=COSTS[costs],
            misses=misses,
            prefill_chunk=CHUNK,
        )
        got = engine.logits(some_tokens(model, PROMPT_TOKENS, seed=1).tolist())
        assert measures.nmse(got, prompt).max() <= MAX_NMSE
        for batch_size, expected in zip((1, 3), decoded, strict=True):
            got = engine.decode_logits(some_tokens(model, batch_size, NUM_TOKENS))
            assert measures.nmse(got, expected).max() <= MAX_NMSE
        assert engine.hybrid is not None and engine.hybrid.host.counters.experts > 0
        engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_record_of_decisions_repeats_every_bit(name):
    model = MODELS[name]()
    tokens = some_tokens(model, 3, NUM_TOKENS)
    make = functools.partial(
        model.engine, (2,) * model.num_layers, misses="split", prefill_chunk=CHUNK
    )
    engine = make()
    expected = engine.decode_logits(tokens)
    assert engine.splitter is not None
    record = list(engine.splitter.record)
    engine.close()
    assert any(record) and not all(record)
    # With another cache, which holds other experts at other times.
    for slots in (model.all_slots, (0,) * model.num_layers):
        engine = model.engine(slots, misses="split", prefill_chunk=CHUNK)
        assert engine.splitter is not None
        engine.splitter.replay(record)
        np.testing.assert_array_equal(engine.decode_logits(tokens), expected)
        engine.close()


def test_the_greedy_text_is_that_of_the_device():
    model = embedded_model("int4", host_bits=8)
    prompt = some_tokens(model, 20).tolist()
    expected, _ = greedy(model.resident, [prompt], 200)
    for misses in ("split", "host"):
        engine = model.engine((2,) * model.num_layers, misses=misses)
        got, run = greedy(engine, [prompt], 200)
        residency = run.stats().residency
        assert residency is not None
        traffic = residency.decode
        assert got == expected and traffic.host_experts > 0
        assert (traffic.demand_loads > 0) == (misses == "split")
        engine.close()
