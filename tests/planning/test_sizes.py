"""What the planner counts: the paper's sizes, and the bytes that are really allocated."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jmoe.engines.device_model import DeviceModel
from jmoe.errors import ConfigError, RequestError
from jmoe.models import families, kv_cache
from jmoe.models.decoder import abstract_parameters
from jmoe.models.experts import choose_form, plan_blocks
from jmoe.planning import sizes
from jmoe.planning.need import MemoryNeed
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec
from tests.models.configs import small_config

_MODELS = Path(__file__).parents[2] / "configs" / "models"
GIB = 2**30

# Eliseev & Mazur, https://arxiv.org/abs/2312.17238, Table 1: GiB of Mixtral-8x7B.
PAPER_GIB = {
    "bf16": 86.99,
    "attn16-experts4": 25.82,
    "attn16-experts3": 23.21,
    "attn16-experts2": 19.33,
    "attn4-experts16": 85.16,
    "attn4-experts4": 23.99,
    "attn4-experts3": 21.37,
    "attn4-experts2": 17.54,
}

QUANTS = [None, *(PRESETS[name] for name in ("bf16", "f32", "int8", "int4", "attn4-experts2"))]


def known_config(name: str):
    return families.config_from_json(json.loads((_MODELS / f"{name}.json").read_bytes()), name)


def quantizable_config(**changes):
    return small_config(**{"hidden_size": 64, "intermediate_size": 192} | changes)


@pytest.mark.parametrize("preset", PAPER_GIB)
def test_the_papers_sizes_of_mixtral_8x7b(preset: str):
    size = sizes.total(sizes.weight_sizes(known_config("mixtral-8x7b"), quant=PRESETS[preset]))
    assert size.num_bytes / GIB == pytest.approx(PAPER_GIB[preset], rel=0.02)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("mixtral-8x7b", 46_702_792_704), ("mixtral-8x22b", 140_630_071_296)],
)
def test_parameters_of_known_models(name: str, num_parameters: int):
    assert sizes.total(sizes.weight_sizes(known_config(name))).num_weights == num_parameters


def test_every_component_by_hand():
    counted = sizes.weight_sizes(known_config("mixtral-8x7b"), quant=PRESETS["attn4-experts4"])
    layers, hidden, width, kv, experts, vocabulary = 32, 4096, 14336, 1024, 8, 32000
    attention = layers * 2 * (hidden * hidden + hidden * kv)
    # Four bits; two bytes per group of 64; 16 bytes for the second level per row and 64 groups
    # (rows of 4096) or 112 of 224 (rows of 14336).
    nested = layers * (2 * hidden + 2 * kv) * 16
    assert counted["attention"] == (attention, attention // 2 + attention // 64 * 2 + nested)
    weights = layers * experts * 3 * hidden * width
    nested = layers * experts * (2 * width * 16 + hidden * 2 * 16)
    assert counted["experts"] == (weights, weights // 2 + weights // 64 * 2 + nested)
    assert (
        counted["embeddings"] == counted["head"] == (vocabulary * hidden, vocabulary * hidden * 2)
    )
    assert counted["routers"] == (layers * experts * hidden, layers * experts * hidden * 2)
    assert counted["norms"] == ((2 * layers + 1) * hidden, (2 * layers + 1) * hidden * 2)


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_what_a_device_holds(quant: QuantSpec | None, dtype: str, tied: bool):
    config = quantizable_config(tie_word_embeddings=tied)
    model = DeviceModel(
        config,
        (
            jnp.zeros(parameter.shape, parameter.dtype)
            for parameter in abstract_parameters(config, dtype, quant).values()
        ),
        dtype,
        jax.local_devices()[0],
        quant,
    )
    counted = sizes.weight_sizes(config, dtype, quant)
    assert sizes.total(counted).num_bytes == model.parameter_bytes
    assert (counted["head"].num_bytes == 0) is tied
    per_layer = counted["experts"].num_bytes // config.num_hidden_layers
    assert per_layer == config.router.num_experts * sizes.expert_bytes(config, dtype, quant)


def test_blobs_are_counted_with_their_padding():
    # One group of 4-bit codes per row: parts of 16 rows are not multiples of 64 bytes.
    config = small_config(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    quant = parse_spec("experts=4g16")
    size = sizes.weight_sizes(config, "bfloat16", quant)["experts"]
    parts = 16 * 8, 16, 16, 16 * 4 * 4  # codes, scales, zeros, second level of a matrix
    assert sum(parts) % 64 != 0
    blob = 3 * sum(-(-part // 64) * 64 for part in parts)
    assert size.num_bytes == config.num_hidden_layers * config.router.num_experts * blob


def test_a_store_keeps_each_component_in_its_own_dtype():
    config = quantizable_config()
    spec = parse_spec("attention=f32,experts=4g64,embeddings=bf16,head=f32")
    stored = sizes.stored_sizes(config, spec, "float32")
    plain = sizes.weight_sizes(config, "float32")
    assert stored["attention"] == plain["attention"]
    assert stored["head"] == plain["head"]
    assert stored["norms"] == plain["norms"]
    assert 2 * stored["embeddings"].num_bytes == plain["embeddings"].num_bytes
    assert stored["experts"] == sizes.weight_sizes(config, "float32", spec)["experts"]
    assert sizes.stored_sizes(config, spec, "bfloat16")["norms"].num_bytes == (
        plain["norms"].num_bytes // 2
    )


def test_bits_per_weight():
    counted = sizes.weight_sizes(known_config("mixtral-8x7b"), quant=PRESETS["attn4-experts2"])
    assert counted["attention"].bits_per_weight == pytest.approx(4.25, abs=0.05)
    assert counted["experts"].bits_per_weight == pytest.approx(3.0, abs=0.1)
    assert counted["head"].bits_per_weight == 16
    assert sizes.Size(0, 0).bits_per_weight == 0


def test_the_cache_is_what_is_allocated():
    config = small_config()
    cache = kv_cache.init_cache(config, 3, kv_cache.bucket_capacity(200), "bfloat16")
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert sizes.cache_bytes(config, "bfloat16", batch_size=3, num_positions=200) == allocated


@pytest.mark.parametrize("num_positions", [0, 257])
def test_positions_outside_the_context_are_refused(num_positions: int):
    with pytest.raises(RequestError, match="context"):
        sizes.cache_bytes(small_config(), "bfloat16", batch_size=1, num_positions=num_positions)


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        sizes.weight_sizes(small_config(), quant=PRESETS["attn4-experts4"])


# Temporaries in MiB that XLA 0.11.2 plans for a chunk of a prompt, compiled for an H100 with four
# layers of Mixtral-8x7B: batch, positions, dtype, MiB.
XLA_TEMP_MIB = [
    (1, 128, "bfloat16", 52.4),
    (1, 1024, "bfloat16", 134.3),
    (1, 1024, "float32", 174.3),
    (1, 8192, "bfloat16", 806.3),
    (1, 32768, "bfloat16", 780.9),
    (16, 1024, "bfloat16", 976.3),
    (64, 1024, "bfloat16", 976.3),
    (64, 4096, "bfloat16", 830.6),
]


@pytest.mark.parametrize(("batch_size", "num_positions", "dtype", "mib"), XLA_TEMP_MIB)
def test_the_workspace_is_near_what_xla_plans(batch_size, num_positions, dtype, mib):
    config = known_config("mixtral-8x7b")
    workspace = sizes.workspace(config, dtype, batch_size=batch_size, num_positions=num_positions)
    assert workspace.num_bytes / 2**20 == pytest.approx(mib, rel=0.06)


@pytest.mark.parametrize("num_tokens", [16, 64, 512])  # lengths of chunks
def test_rows_of_the_experts_are_those_of_their_plan(num_tokens: int):
    config = small_config()
    form = choose_form(num_tokens, config, "gpu")
    router = config.router
    plan = jax.eval_shape(
        lambda ids, valid: plan_blocks(ids, valid, router.num_experts, form.block_rows),
        jax.ShapeDtypeStruct((num_tokens, router.top_k), "int32"),
        jax.ShapeDtypeStruct((num_tokens,), "bool"),
    )
    num_rows = plan.token_of_row.shape[0] + 1
    workspace = sizes.workspace(config, "float32", batch_size=1, num_positions=num_tokens)
    assert workspace.expert_rows == num_rows * config.hidden_size * 4


def test_a_need_is_the_sum_of_its_parts():
    config = known_config("mixtral-8x7b")
    shape = {"batch_size": 2, "num_positions": 4096}
    need = MemoryNeed.of(config, "bfloat16", PRESETS["attn4-experts4"], **shape)
    experts = need.all_experts * need.expert_bytes
    assert need.all_experts == 256
    assert need.total_bytes == need.base_bytes + experts + need.workspace.num_bytes
    shared = sizes.total(need.weights).num_bytes - experts
    assert need.base_bytes == shared + sizes.cache_bytes(config, "bfloat16", **shape)


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_a_blob_is_an_expert_with_padding(quant: QuantSpec | None):
    config = quantizable_config()
    blob = sizes.blob_bytes(config, "float32", quant)
    expert = sizes.expert_bytes(config, "float32", quant)
    assert expert <= blob < expert + 9 * 64
    assert blob % 64 == 0


def test_the_workspace_of_offloading_by_hand():
    config = known_config("mixtral-8x7b")
    shape = {"batch_size": 1, "num_positions": 1000}
    workspace = sizes.offload_workspace(config, "bfloat16", **shape, chunk=128)
    tokens, hidden, width, top_k = 128, 4096, 14336, 2
    assert workspace.attention == 32 * 2**20 + 4 * tokens * hidden * 4
    assert workspace.expert == 32 * 2**20 + tokens * (2 * width * 4 + hidden * (2 + 2 + 4))
    assert workspace.routed == 2 * tokens * hidden * 2
    assert workspace.outputs == tokens * top_k * hidden * 4
    assert workspace.num_bytes == workspace.expert + workspace.routed + workspace.outputs
    longer = sizes.offload_workspace(config, "bfloat16", **shape, chunk=512)
    assert longer.attention == 512 * 32 * 1024 * (4 + 2)  # scores
    assert longer.num_bytes == longer.attention + 2 * longer.routed + longer.outputs


# Most that the programs of a chunk of a prompt hold beside weights, cache and experts, with
# attn4-experts4, as XLA 0.12.0 plans for an H100: batch, positions, chunk, dtype, MiB.
XLA_OFFLOAD_MIB = [
    (1, 1024, 16, "bfloat16", 35.0),
    (1, 1024, 64, "bfloat16", 46.0),
    (1, 1024, 512, "bfloat16", 128.0),
    (1, 8192, 128, "bfloat16", 200.0),
    (1, 8192, 512, "bfloat16", 800.0),
    (8, 1024, 64, "bfloat16", 128.0),
    (1, 1024, 64, "float32", 49.0),
    (1, 1024, 256, "float32", 92.0),
    (1, 1024, 512, "float32", 176.0),
]


@pytest.mark.parametrize(("batch_size", "num_positions", "chunk", "dtype", "mib"), XLA_OFFLOAD_MIB)
def test_the_workspace_of_offloading_is_near_what_xla_plans(
    batch_size: int, num_positions: int, chunk: int, dtype: str, mib: float
):
    workspace = sizes.offload_workspace(
        known_config("mixtral-8x7b"),
        dtype,
        batch_size=batch_size,
        num_positions=num_positions,
        chunk=chunk,
    )
    assert workspace.num_bytes / 2**20 == pytest.approx(mib, rel=0.07)


def test_the_workspace_of_offloading_grows_with_the_chunk():
    config = small_config(vocab_size=64)
    shape = {"batch_size": 3, "num_positions": 256}
    taken = [
        sizes.offload_workspace(config, "float32", **shape, chunk=chunk).num_bytes
        for chunk in (16, 32, 64, 128, 256, 512)
    ]
    assert taken == sorted(taken)
    assert taken[-1] == taken[-2]  # no longer than the prompt
