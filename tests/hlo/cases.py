"""What is compiled for the H100: parts and programs of Mixtral-8x7B, at its real sizes, and the
decode program of the compiled engine at those of Qwen3-30B-A3B, too.

Limits are what was measured with jax 0.11.2 and 0.12.0.1 (docs/measurements/h100-hlo.md) and
a little more.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.engines import layer_programs
from jmoe.engines.layer_programs import LayerStatic, Routed
from jmoe.engines.programs import DecodeState, decode_step, prefill_chunk
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.experts import Experts, choose_form
from jmoe.models.kv_cache import cache_bytes, init_cache
from jmoe.models.linear import ACCELERATOR_TILE_BYTES, linear
from jmoe.models.router import Routing
from jmoe.models.weights import QuantWeight
from jmoe.quant.formats import QuantFormat
from jmoe.quant.matmul import MAX_REDUCE_ROWS
from jmoe.quant.spec import QuantSpec, parse_spec
from tests.hlo import h100
from tests.hlo.offload_decode import (
    CACHE_CAPACITY,
    CONFIG_FILE,
    DTYPE,
    QWEN3_30B_A3B,
    OffloadDecode,
)

NUM_LAYERS = 2
TOKENS = (1, 2, 4, 16, 64)
MANY = 64
TILE_MIB = ACCELERATOR_TILE_BYTES / 2**20


def shape(sizes: tuple[int, ...], dtype: Any) -> Any:
    """Stands for an array among the arguments of a program."""
    return jax.ShapeDtypeStruct(sizes, dtype)


@functools.cache
def mixtral_8x7b(num_layers: int = NUM_LAYERS) -> ModelConfig:
    """Some layers of it."""
    raw = json.loads(CONFIG_FILE.read_text()) | {"num_hidden_layers": num_layers}
    return families.config_from_json(raw, CONFIG_FILE)


def experts(quant: QuantSpec | None, num_tokens: int) -> jax.stages.Lowered:
    """A layer's experts, in the form that is chosen for so many tokens on a GPU."""
    config = mixtral_8x7b()
    form = choose_form(num_tokens, config, "gpu")
    graphdef, state = nnx.split(Experts(config, DTYPE, quant))
    leaves, structure = jax.tree.flatten(state)

    def program(leaves, x_TD, routing, valid_T):
        module = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        return module(x_TD, routing, valid_T, form)

    routed = (num_tokens, config.router.top_k)
    routing = Routing(
        weights_TK=shape(routed, jnp.float32),
        expert_ids_TK=shape(routed, jnp.int32),
        probs_TE=shape((num_tokens, config.router.num_experts), jnp.float32),
    )
    x_TD = shape((num_tokens, config.hidden_size), jnp.dtype(DTYPE))
    return jax.jit(program).lower(
        *h100.abstract((leaves, x_TD, routing, shape((num_tokens,), jnp.bool_)))
    )


def product(fmt: QuantFormat, num_outputs: int, num_tokens: int) -> jax.stages.Lowered:
    """A product with one quantized matrix: a projection of attention, or the head."""
    num_inputs = mixtral_8x7b().hidden_size
    graphdef, state = nnx.split(QuantWeight((num_outputs, num_inputs), fmt))
    leaves, structure = jax.tree.flatten(state)

    def program(leaves, x):
        return linear(x, nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))[...])

    x = shape((num_tokens, num_inputs), jnp.dtype(DTYPE))
    return jax.jit(program).lower(*h100.abstract((leaves, x)))


def decode(quant: QuantSpec, batch_size: int) -> jax.stages.Lowered:
    """A step of the resident engine, greedy."""
    config = mixtral_8x7b()
    parameters, cache, vector = _model(config, quant, batch_size)
    state = DecodeState(cache, vector(jnp.int32), vector(jnp.int32), None)
    scalar = shape((), jnp.float32)
    values = SamplingValues(scalar, shape((), jnp.int32), scalar, scalar, scalar)
    args = (parameters, state, vector(jnp.bool_), shape((2,), jnp.uint32), values)
    return decode_step.lower(
        *h100.abstract(args),
        config=config,
        dtype=DTYPE,
        quant=quant,
        form=choose_form(batch_size, config, "gpu"),
        kind=SamplingKind(greedy=True, truncated=False, penalized=False),
    )


def prefill(
    quant: QuantSpec, num_positions: int, num_layers: int = NUM_LAYERS
) -> jax.stages.Lowered:
    """A chunk of one prompt."""
    config = mixtral_8x7b(num_layers)
    parameters, cache, vector = _model(config, quant, 1)
    hidden_BD = shape((1, config.hidden_size), jnp.dtype(DTYPE))
    token_ids_BL, start = shape((1, num_positions), jnp.int32), shape((), jnp.int32)
    args = (parameters, cache, hidden_BD, token_ids_BL, start, vector(jnp.int32))
    return prefill_chunk.lower(
        *h100.abstract(args),
        config=config,
        dtype=DTYPE,
        quant=quant,
        form=choose_form(num_positions, config, "gpu"),
    )


def next_layer(quant: QuantSpec, batch_size: int) -> jax.stages.Lowered:
    """A layer's experts, and the next layer up to its router, in the loop of the offload engine."""
    static, blob, routed, layer = _layer(quant, batch_size, 1)
    is_single = batch_size == 1
    top_k = static.config.router.top_k
    group = None if is_single else (shape((), jnp.int32),) * top_k
    args = (
        (blob,) * top_k,
        group,
        routed,
        None,
        None,
        layer,
        (layer,),
        _layer_cache(static.config, batch_size),
        shape((batch_size,), jnp.int32),
        shape((batch_size,), jnp.bool_),
    )
    return layer_programs.next_layer.lower(*h100.abstract(args), static=static)


def expert_rows(quant: QuantSpec, num_rows: int) -> jax.stages.Lowered:
    """One expert on those tokens of a chunk of a prompt that chose it."""
    static, blob, routed, _ = _layer(quant, 1, MANY)
    num_assignments = MANY * static.config.router.top_k
    y_AD = shape((num_assignments + 1, static.config.hidden_size), jnp.float32)
    args = (blob, shape((num_rows,), jnp.int32), routed, y_AD)
    return layer_programs.expert_rows.lower(*h100.abstract(args), static=static)


def _layer(quant: QuantSpec, batch_size: int, num_positions: int):
    """Shapes of a layer in the loop of the offload engine."""
    config = mixtral_8x7b(1)
    static = LayerStatic(
        config=config,
        dtype=DTYPE,
        quant=quant,
        host=None,
        platform="gpu",
        window=None,
        num_predicted=config.router.top_k,
    )
    num_tokens, top_k, dtype = batch_size * num_positions, config.router.top_k, jnp.dtype(DTYPE)
    routed = Routed(
        x_BLD=shape((batch_size, num_positions, config.hidden_size), dtype),
        normed_TD=shape((num_tokens, config.hidden_size), dtype),
        weights_TK=shape((num_tokens, top_k), jnp.float32),
        ids_TK=shape((num_tokens, top_k), jnp.int32),
    )
    parameters = abstract_parameters(config, DTYPE, quant)
    layer = tuple(
        parameter
        for name, parameter in parameters.items()
        if name.startswith("layers.") and not name.endswith(".blobs")
    )
    blob = shape((static.layout.num_items,), jnp.dtype(static.layout.dtype))
    return static, blob, routed, layer


def _layer_cache(config: ModelConfig, batch_size: int):
    cache = jax.eval_shape(lambda: init_cache(config, batch_size, CACHE_CAPACITY, DTYPE))
    return cache.layers[0]


def _model(config: ModelConfig, quant: QuantSpec, batch_size: int):
    """Shapes of parameters and cache, and a maker of shapes of one item per sequence."""
    parameters = tuple(abstract_parameters(config, DTYPE, quant).values())
    cache = jax.eval_shape(lambda: init_cache(config, batch_size, CACHE_CAPACITY, DTYPE))
    return parameters, cache, lambda dtype: shape((batch_size,), dtype)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program, and what it may use of the device's memory.

    Attributes:
      lower: makes it.
      temp_mib: scratch memory of the program, at most.
      float_mib: size of the largest array of floats that it writes, at most.
      codes_mib: the same for bytes, in which codes and scales are stored.
      donated_bytes: arguments that its results take over, at least.
      host_loops: loops that stop for the host at every iteration, and branches, at most.
      besides: an array that may be larger: an expert on its way into a slot.
    """

    lower: Callable[[], jax.stages.Lowered]
    temp_mib: float
    float_mib: float = 0.5
    codes_mib: float = 0.5
    donated_bytes: int = 0
    host_loops: int = 0
    besides: str | None = None


def _experts() -> Iterator[tuple[str, Case]]:
    # Few tokens: no weight is written, neither dequantized nor as it is. For 16 tokens, their
    # outputs are, and scales; int8 has scales of two bytes each, which XLA always copies out of
    # the blobs: 1.75 MiB for a matrix of 56.
    few = {
        "int4": {1: 1.5, 2: 1.0, 4: 1.0, 16: 8.0},
        "int8": {1: 11.0, 2: 6.0, 4: 6.0, 16: 7.0},
        "attn4-experts3": {1: 1.5},
        "attn4-experts2": {1: 3.5},
        "bf16": {1: 0.5, 16: 2.0},
    }
    # Many: a tile of one matrix is.
    many = {
        "int4": 37.0,
        "int8": 37.0,
        "attn4-experts3": 40.5,
        "attn4-experts2": 42.0,
        "bf16": 37.0,
    }
    for name, limits in few.items():
        for num_tokens, temp_mib in limits.items():
            yield (
                f"experts {name}, {num_tokens} tokens",
                Case(
                    lower=functools.partial(experts, parse_spec(name), num_tokens),
                    temp_mib=temp_mib,
                    float_mib=0.25 if num_tokens <= MAX_REDUCE_ROWS else 1.0,
                    codes_mib=2.0 if name == "int8" else 1.0,
                    host_loops=int(num_tokens > MAX_REDUCE_ROWS),  # over blocks of tokens
                ),
            )
        yield (
            f"experts {name}, {MANY} tokens",
            Case(
                lower=functools.partial(experts, parse_spec(name), MANY),
                temp_mib=many[name],
                float_mib=TILE_MIB,
                codes_mib=2.0,
                host_loops=1,
            ),
        )


def _products() -> Iterator[tuple[str, Case]]:
    config = mixtral_8x7b()
    hidden, vocabulary = config.hidden_size, config.vocab_size
    key_size = config.num_key_value_heads * config.head_dim
    int4, int8 = parse_spec("int4"), parse_spec("int8")
    # With fewer outputs than the GPU has places for threads, XLA writes partial sums.
    matrices = [
        ("query, 4 bits", int4.attention, hidden, TOKENS, 0.5),
        ("query, 8 bits", int8.attention, hidden, TOKENS, 0.5),
        ("head, 8 bits", int8.head, vocabulary, TOKENS, 1.0),
        ("key, 4 bits", int4.attention, key_size, (1, MANY), 2.5),
        ("query, 3 bits", parse_spec("attn3-experts3").attention, hidden, (1, MANY), 2.5),
        ("query, 2 bits", parse_spec("attn2-experts2").attention, hidden, (1, MANY), 4.5),
    ]
    for name, fmt, num_outputs, tokens, partial_mib in matrices:
        assert isinstance(fmt, QuantFormat)
        for num_tokens in tokens:
            tiled = num_tokens > MAX_REDUCE_ROWS
            yield (
                f"{name}, {num_tokens} tokens",
                Case(
                    lower=functools.partial(product, fmt, num_outputs, num_tokens),
                    temp_mib=TILE_MIB + num_tokens / 8 + 1 if tiled else partial_mib,
                    float_mib=TILE_MIB if tiled else partial_mib,
                ),
            )


def _programs() -> Iterator[tuple[str, Case]]:
    quant = parse_spec("attn4-experts4")
    sequence_bytes = cache_bytes(mixtral_8x7b(), 1, CACHE_CAPACITY, DTYPE)
    for batch_size, temp_mib, float_mib in ((1, 5.0, 2.5), (4, 17.0, 2.5), (MANY, 61.0, TILE_MIB)):
        yield (
            f"decode_step, {batch_size} sequences",
            Case(
                lower=functools.partial(decode, quant, batch_size),
                temp_mib=temp_mib,
                float_mib=float_mib,
                donated_bytes=batch_size * sequence_bytes,
                host_loops=NUM_LAYERS * (batch_size > MAX_REDUCE_ROWS),
            ),
        )
    # More layers need no more memory: XLA has nothing to begin before its turn.
    for num_layers in (NUM_LAYERS, 4 * NUM_LAYERS):
        yield (
            f"prefill_chunk, {MANY} positions, {num_layers} layers",
            Case(
                lower=functools.partial(prefill, quant, MANY, num_layers),
                temp_mib=61.0,
                float_mib=TILE_MIB,
                donated_bytes=sequence_bytes * num_layers // NUM_LAYERS,
                host_loops=num_layers,
            ),
        )


def _layer_programs() -> Iterator[tuple[str, Case]]:
    """Of the offload engine: experts in arrays of their own are read in place."""
    cache = jax.tree.leaves(_layer_cache(mixtral_8x7b(1), 1))
    sequence_bytes = sum(2 * math.prod(leaf.shape) for leaf in cache)
    # Two or three matrices' scales, decoded; those of int8, of two bytes each, twice.
    limits = {
        "int4": ({1: 5.0, 2: 13.0, 4: 17.5}, 2.5),
        "int8": ({1: 12.0, 2: 17.5, 4: 34.0}, 4.5),
        "bf16": ({1: 1.0, 2: 2.0, 4: 4.0}, 2.5),
    }
    for name, (temps_mib, float_mib) in limits.items():
        for batch_size, temp_mib in temps_mib.items():
            yield (
                f"next_layer {name}, {batch_size} sequences",
                Case(
                    lower=functools.partial(next_layer, parse_spec(name), batch_size),
                    temp_mib=temp_mib,
                    float_mib=float_mib,
                    codes_mib=2.0,
                    donated_bytes=batch_size * sequence_bytes,
                ),
            )
        for num_rows in (16, MANY):
            yield (
                f"expert_rows {name}, {num_rows} rows",
                Case(
                    lower=functools.partial(expert_rows, parse_spec(name), num_rows),
                    temp_mib=45.0,
                    float_mib=TILE_MIB,
                    codes_mib=2.0,
                ),
            )


def _offload_decodes() -> Iterator[tuple[str, Case]]:
    """Of the compiled engine: a loop per layer fetches what is missing into slots."""
    mixtral = functools.partial(OffloadDecode, quant="attn4-experts4", slots=5)
    qwen = functools.partial(OffloadDecode, quant="attn4-experts4", slots=64, sizes=QWEN3_30B_A3B)
    int8 = OffloadDecode(quant="int8", slots=3)
    bf16 = OffloadDecode(quant="bf16", slots=3)
    # Beside an expert on its way: partial sums of some projections, outputs of attention.
    decodes = [
        ("int4, 1 sequence", mixtral(), 1.0, 2.5, NUM_LAYERS),
        ("int4, 2 sequences", mixtral(batch_size=2), 1.0, 2.5, NUM_LAYERS),
        # Eight experts at most in seven slots: two rounds.
        ("int4, 4 sequences", mixtral(batch_size=4, slots=7), 1.0, 2.5, NUM_LAYERS),
        # One loop for the tokens, and one for what is fetched ahead of the second layer.
        ("int4, 4 tokens, 1 ahead", mixtral(num_tokens=4, num_ahead=1), 1.0, 2.5, 2 + NUM_LAYERS),
        ("int8, 1 sequence", int8, 1.0, 4.5, NUM_LAYERS),
        ("bf16, 1 sequence", bf16, 1.0, 0.5, NUM_LAYERS),
        ("Qwen3 int4, 1 sequence", qwen(), 2.5, 4.5, NUM_LAYERS),
        ("Qwen3 int4, 2 sequences", qwen(batch_size=2), 2.5, 4.5, NUM_LAYERS),
        ("Qwen3 int4, 4 sequences", qwen(batch_size=4), 11.0, 4.5, NUM_LAYERS),
    ]
    for name, decode_tokens, temp_mib, float_mib, host_loops in decodes:
        config = decode_tokens.config
        kv_bytes = cache_bytes(config, decode_tokens.batch_size, CACHE_CAPACITY, DTYPE)
        yield (
            f"decode_tokens {name}",
            Case(
                lower=decode_tokens.lower,
                temp_mib=decode_tokens.blob_bytes / 2**20 + temp_mib,
                float_mib=float_mib,
                codes_mib=2.0,
                donated_bytes=decode_tokens.slots_bytes + kv_bytes,
                host_loops=host_loops,
                besides=decode_tokens.blob,
            ),
        )


CASES: dict[str, Case] = dict(
    [*_experts(), *_products(), *_programs(), *_layer_programs(), *_offload_decodes()]
)
