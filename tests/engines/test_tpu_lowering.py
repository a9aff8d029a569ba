"""The decode program of the compiled engine, lowered for a TPU with experts in host memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jmoe.config import ModelConfig, NormConfig, RopeConfig, RouterConfig
from jmoe.engines.compiled_programs import Limits, StepStatic, decode_tokens
from jmoe.engines.programs import DecodeState
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models.decoder import abstract_parameters
from jmoe.models.kv_cache import init_cache
from jmoe.quant.spec import parse_spec
from jmoe.residency.array_cache import CacheStatic, abstract_cache

LAYERS, EXPERTS, SLOTS = 2, 4, 3
CONFIG = ModelConfig(
    model_type="mixtral",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    sliding_windows=(None,) * LAYERS,
    norm=NormConfig(eps=1e-5),
    rope=RopeConfig(theta=1e6),
    router=RouterConfig(num_experts=EXPERTS, top_k=2, norm_topk_prob=True),
)


@functools.cache
def lowered(quant: str, num_tokens: int) -> tuple[str, str]:
    """The program's text, and how it spells the blobs of a layer."""
    static = StepStatic(
        config=CONFIG,
        dtype="bfloat16",
        quant=parse_spec(quant),
        host=None,
        platform="tpu",
        cache=CacheStatic(num_experts=EXPERTS, slots=(SLOTS,) * LAYERS, num_shared=0, rule="lru"),
        kind=SamplingKind(greedy=True, truncated=False, penalized=False),
        num_tokens=num_tokens,
    )
    layout = static.layout
    pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    blobs = jax.ShapeDtypeStruct(
        (EXPERTS, layout.num_items), jnp.dtype(layout.dtype), sharding=pinned
    )
    parameters = abstract_parameters(CONFIG, static.dtype, static.quant)

    def part(prefix: str) -> Any:
        names = (name for name in parameters if name.startswith(prefix))
        return tuple(parameters[name] for name in names if not name.endswith(".blobs"))

    def shape(sizes: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

    int32_B, scalar = shape((1,), "int32"), shape((), "float32")
    cache: Any = jax.eval_shape(lambda: init_cache(CONFIG, 1, 128, static.dtype))
    traced = decode_tokens.trace(
        tuple(array for name, array in parameters.items() if not name.startswith("layers.")),
        tuple(part(f"layers.{i}.") for i in range(LAYERS)),
        (blobs,) * LAYERS,
        DecodeState(cache, int32_B, int32_B, None),
        abstract_cache(static.cache, layout.num_items, layout.dtype),
        shape((1,), "bool"),
        Limits(stop_ids=shape((4,), "int32"), lengths_B=int32_B),
        None,
        shape((2,), "uint32"),
        SamplingValues(scalar, shape((), "int32"), scalar, scalar, scalar),
        static=static,
    )
    dtype = "ui8" if layout.dtype == "uint8" else "bf16"
    return traced.lower(lowering_platforms=("tpu",)).as_text(), f"{layout.num_items}x{dtype}"


@pytest.mark.parametrize("quant", ["int4", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_experts_stay_in_host_memory_until_one_is_needed(quant, num_tokens):
    text, blob = lowered(quant, num_tokens)
    of_layer, fetched = f"tensor<{EXPERTS}x{blob}>", f"tensor<1x{blob}>"
    main = next(line for line in text.splitlines() if "func.func public @main" in line)
    assert main.count(of_layer + ' {mhlo.memory_kind = "pinned_host"') == LAYERS
    # Of the experts of a layer, one is sliced out (in a function of that name), and moved.
    readers = re.findall(rf"= (?:stablehlo\.|func\.call @)(\w+).*\({of_layer}, ", text)
    assert set(readers) == {"dynamic_index_in_dim", "dynamic_slice"}
    lines = text.splitlines()
    moves = [i for i, line in enumerate(lines) if "@annotate_device_placement" in line]
    assert len(moves) == LAYERS
    for i in moves:
        assert '_xla_buffer_placement = "device"' in lines[i]
        assert f"({fetched}) -> {fetched}" in lines[i]
        (source,) = re.findall(r"@annotate_device_placement\((%\w+)\)", lines[i])
        assert f"{source} = func.call @dynamic_index_in_dim" in lines[i - 1]


def test_slots_are_donated():
    text, blob = lowered("int4", 1)
    (slots,) = re.findall(rf"tensor<{LAYERS * SLOTS}x{blob}> {{([^}}]*)}}", text)[:1]
    assert "tf.aliasing_output" in slots or "jax.buffer_donor" in slots
