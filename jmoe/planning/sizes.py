"""How many bytes a model takes, by component, from its configuration alone.

No weights and no device are looked at. Weights are counted over ``decoder.abstract_parameters``,
by which they are loaded too, so that the count is what will be allocated; likewise the KV cache.
The workspace is an estimate: what a program needs beside its arguments is XLA's choice, and the
terms below are the arrays that it keeps when it compiles Mixtral-8x7B for an H100.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp

from jmoe.config import ModelConfig
from jmoe.errors import RequestError
from jmoe.models import kv_cache
from jmoe.models.decoder import abstract_parameters
from jmoe.models.experts import choose_form, max_num_blocks
from jmoe.models.linear import ACCELERATOR_TILE_BYTES
from jmoe.planning.chunks import longest_chunk, prompt_chunks
from jmoe.quant.formats import DenseFormat
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import QuantSpec

Component = Literal["attention", "experts", "embeddings", "head", "routers", "norms"]
COMPONENTS: tuple[Component, ...] = get_args(Component)


class Size(NamedTuple):
    """Weights, as the model's authors count them, and the bytes that hold them."""

    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and padding included; 0 if there are no weights."""
        return 8 * self.num_bytes / self.num_weights if self.num_weights else 0.0


def weight_sizes(
    config: ModelConfig, dtype: str = "bfloat16", quant: QuantSpec | None = None
) -> dict[Component, Size]:
    """Sizes of the weights in device memory.

    Args:
      config: the model.
      dtype: of what is not quantized.
      quant: formats; None is all weights in dtype.

    Raises:
      ConfigError: a group size does not divide the rows of a matrix.
    """
    return _sizes(config, dtype, quant, {})


def stored_sizes(
    config: ModelConfig, quant: QuantSpec, source_dtype: str = "bfloat16"
) -> dict[Component, Size]:
    """Sizes of the weights in a converted store, without the headers of its files.

    Args:
      config: the model.
      quant: formats of the store.
      source_dtype: of the checkpoint that was converted, in which norms and routers stay.

    Raises:
      ConfigError: a group size does not divide the rows of a matrix.
    """
    formats = {
        "attention": quant.attention,
        "embeddings": quant.embeddings,
        "head": quant.head,
    }
    dense = {name: fmt.dtype for name, fmt in formats.items() if isinstance(fmt, DenseFormat)}
    return _sizes(config, source_dtype, quant, dense)


def total(sizes: Mapping[Component, Size]) -> Size:
    """All components together."""
    return Size(
        sum(size.num_weights for size in sizes.values()),
        sum(size.num_bytes for size in sizes.values()),
    )


def expert_bytes(config: ModelConfig, dtype: str, quant: QuantSpec | None) -> int:
    """Size of one expert: of its blob, or of its three matrices in dtype if quant is None."""
    if quant is not None:
        return ExpertLayout.of(config.hidden_size, config.intermediate_size, quant).num_bytes
    return 3 * config.hidden_size * config.intermediate_size * jnp.dtype(dtype).itemsize


def blob_bytes(config: ModelConfig, dtype: str, quant: QuantSpec | None) -> int:
    """Size of one expert as a blob, in which form it moves; plain ones are packed for that."""
    spec = quant or QuantSpec(experts=DenseFormat(dtype))  # type: ignore[arg-type]
    return ExpertLayout.of(config.hidden_size, config.intermediate_size, spec).num_bytes


def cache_bytes(config: ModelConfig, dtype: str, *, batch_size: int, num_positions: int) -> int:
    """Size of the KV cache for sequences of so many positions, prompt and new tokens.

    Raises:
      RequestError: the model's context is shorter.
    """
    if not 1 <= num_positions <= config.max_position_embeddings:
        raise RequestError(
            "the model's context has another length",
            got=f"{num_positions} positions",
            expected=f"from 1 to {config.max_position_embeddings}",
        )
    capacity = kv_cache.bucket_capacity(num_positions)
    return kv_cache.cache_bytes(config, batch_size, capacity, dtype)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Temporaries of the largest program of a generation on an accelerator, in bytes.

    Attributes:
      attention: scores in float32 and probabilities in dtype, of one chunk of a prompt.
      experts: a tile of a matrix in dtype, gate and up of a block of tokens, and the outputs in
        the order of tokens, in float32.
      expert_rows: the outputs block by block, with their padding, in float32.
      hidden_states: of a chunk, in dtype and in float32.
      logits: of a decode step, in float32, and three copies of them to sample from.
    """

    attention: int
    experts: int
    expert_rows: int
    hidden_states: int
    logits: int

    @property
    def num_bytes(self) -> int:
        """Held at one time: attention and experts take turns, and so do prompt and decode."""
        layer = max(self.attention, self.experts)
        return max(layer + self.expert_rows + self.hidden_states, self.logits)


def workspace(config: ModelConfig, dtype: str, *, batch_size: int, num_positions: int) -> Workspace:
    """Estimates the temporaries for sequences of so many positions, prompt and new tokens.

    The longest chunk of a prompt decides. A decode step needs little beside its logits, because
    it reads weights in place.
    """
    item_bytes = jnp.dtype(dtype).itemsize
    hidden, width = config.hidden_size, config.intermediate_size
    longest = longest_chunk(config, batch_size, num_positions)
    num_tokens = batch_size * max(prompt_chunks(num_positions, longest))
    form = choose_form(num_tokens, config, "gpu")
    tile_bytes = min(form.tile_bytes or 0, hidden * width * item_bytes)
    num_assignments = num_tokens * config.router.top_k
    num_blocks = max_num_blocks(num_assignments, config.router.num_experts, form.block_rows)
    num_rows = num_blocks * form.block_rows + 1  # and one of zeros
    return Workspace(
        attention=_score_bytes(config, item_bytes, num_tokens, num_positions),
        experts=tile_bytes + 2 * form.block_rows * width * 4 + num_assignments * hidden * 4,
        expert_rows=num_rows * hidden * 4,
        hidden_states=num_tokens * hidden * (4 + item_bytes),
        logits=_logits_bytes(config, batch_size),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OffloadWorkspace:
    """Temporaries of a generation that works layer by layer and expert by expert, in bytes.

    Attributes:
      attention: scores in float32 and probabilities in dtype, of one chunk of a prompt; or its
        projections, with a tile of a matrix in dtype.
      expert: one expert on the rows that are routed to it: a tile of a matrix in dtype; gate and
        up in float32; the rows, as they come and reordered in dtype, and as a result in float32.
      routed: state of a layer between router and experts, of a chunk, in dtype.
      outputs: of all experts by assignment, in float32.
      logits: of a decode step, in float32, and three copies of them to sample from.
    """

    attention: int
    expert: int
    routed: int
    outputs: int
    logits: int

    @property
    def num_bytes(self) -> int:
        """Held at one time: attention, which makes a new state, and experts take turns."""
        layer = max(self.attention + self.routed, self.expert)
        return max(layer + self.routed + self.outputs, self.logits)


def offload_workspace(
    config: ModelConfig, dtype: str, *, batch_size: int, num_positions: int, chunk: int
) -> OffloadWorkspace:
    """Estimates the temporaries with prompts in chunks of so many tokens.

    The chunk decides: a decode step has one token per sequence.
    """
    item_bytes = jnp.dtype(dtype).itemsize
    num_tokens = batch_size * max(prompt_chunks(num_positions, chunk))
    token_bytes = num_tokens * config.hidden_size
    scores = _score_bytes(config, item_bytes, num_tokens, num_positions)
    return OffloadWorkspace(
        attention=max(scores, _projection_bytes(config, item_bytes, num_tokens)),
        expert=_one_expert_bytes(config, item_bytes, num_tokens),
        routed=2 * token_bytes * item_bytes,
        outputs=token_bytes * config.router.top_k * 4,
        logits=_logits_bytes(config, batch_size),
    )


def _score_bytes(config: ModelConfig, item_bytes: int, num_tokens: int, num_positions: int) -> int:
    """Attention scores in float32 and probabilities in dtype."""
    num_keys = kv_cache.bucket_capacity(num_positions)
    return num_tokens * config.num_attention_heads * num_keys * (4 + item_bytes)


def _projection_bytes(config: ModelConfig, item_bytes: int, num_tokens: int) -> int:
    """Queries, keys and values in float32, what they are made of, and a tile of a matrix."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    tile_bytes = min(ACCELERATOR_TILE_BYTES, hidden * width * item_bytes)
    return tile_bytes + 4 * num_tokens * max(hidden, width) * 4


def _one_expert_bytes(config: ModelConfig, item_bytes: int, num_tokens: int) -> int:
    """One expert on as many rows as it can get: those of all tokens, in the next power of two."""
    hidden, width = config.hidden_size, config.intermediate_size
    num_rows = 1 << (num_tokens - 1).bit_length()
    tile_bytes = min(ACCELERATOR_TILE_BYTES, hidden * width * item_bytes)
    return tile_bytes + num_rows * (2 * width * 4 + hidden * (2 * item_bytes + 4))


def _logits_bytes(config: ModelConfig, batch_size: int) -> int:
    """Logits of a step in float32, and three copies of them to sample from."""
    return 4 * batch_size * config.vocab_size * 4


def _sizes(
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    dense_dtypes: Mapping[str, str],
) -> dict[Component, Size]:
    """Sizes with plain arrays in dtype, but those of some components in a dtype of their own."""
    num_weights = dict.fromkeys(COMPONENTS, 0)
    for path, parameter in abstract_parameters(config).items():
        num_weights[_component(path)] += math.prod(parameter.shape)
    num_bytes = dict.fromkeys(COMPONENTS, 0)
    for path, parameter in abstract_parameters(config, dtype, quant).items():
        component = _component(path)
        item_dtype = jnp.dtype(dense_dtypes.get(component, parameter.dtype))
        num_bytes[component] += math.prod(parameter.shape) * item_dtype.itemsize
    return {name: Size(num_weights[name], num_bytes[name]) for name in COMPONENTS}


def _component(path: str) -> Component:
    """Which component a parameter belongs to, by its path."""
    names = path.split(".")
    if names[0] == "layers":
        names = names[2:]
    match names[0]:
        case "attention" | "experts":
            return names[0]
        case "router":
            return "routers"
        case "embed_tokens":
            return "embeddings"
        case "lm_head":
            return "head"
        case _:
            assert names[-1] == "scale", path
            return "norms"
