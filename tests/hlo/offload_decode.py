"""The decode program of the compiled engine, for the H100: ``decode_tokens`` at real sizes.

A description of a device has no memories: blobs are moved to host memory in the program, behind
a barrier, which leaves the rest of it as it is with blobs that are there already.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.config import ModelConfig
from jmoe.engines.compiled_programs import Limits, StepStatic, decode_tokens
from jmoe.engines.programs import DecodeState
from jmoe.generation.sampling import SamplingKind, SamplingValues
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.kv_cache import init_cache
from jmoe.quant.spec import parse_spec
from jmoe.residency.array_cache import CacheStatic, abstract_cache
from tests.hlo import h100

CONFIG_FILE = Path(__file__).parents[2] / "configs/models/mixtral-8x7b.json"
CACHE_CAPACITY = 4096
DTYPE = "bfloat16"
# Many small experts, as in Qwen3-30B-A3B; everything else is as in Mixtral.
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OffloadDecode:
    """A decode program to compile.

    Attributes:
      quant: name of a QuantSpec.
      slots: of each layer.
      batch_size: sequences.
      num_tokens: in one call.
      num_ahead: experts fetched ahead for the next layer.
      num_layers: of the model.
      sizes: of the model, where it is not Mixtral-8x7B.
    """

    quant: str
    slots: int
    batch_size: int = 1
    num_tokens: int = 1
    num_ahead: int = 0
    num_layers: int = 2
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        raw = json.loads(CONFIG_FILE.read_text()) | {"num_hidden_layers": self.num_layers}
        return families.config_from_json(raw | self.sizes, CONFIG_FILE)

    @property
    def static(self) -> StepStatic:
        config = self.config
        return StepStatic(
            config=config,
            dtype=DTYPE,
            quant=parse_spec(self.quant),
            host=None,
            platform="gpu",
            cache=CacheStatic(
                num_experts=config.router.num_experts,
                slots=(self.slots,) * self.num_layers,
                num_shared=0,
                rule="lru",
            ),
            kind=SamplingKind(greedy=True, truncated=False, penalized=False),
            num_tokens=self.num_tokens,
            num_ahead=self.num_ahead,
        )

    @property
    def blob_bytes(self) -> int:
        return self.static.layout.num_bytes

    @property
    def slots_bytes(self) -> int:
        """Of all slots, which the program takes over and gives back."""
        return self.static.cache.num_slots * self.blob_bytes

    @property
    def blob(self) -> str:
        """A blob on its way, as HLO spells it."""
        layout = self.static.layout
        return f"{'u8' if layout.dtype == 'uint8' else 'bf16'}[1,{layout.num_items}]"

    def arguments(self) -> tuple[Any, ...]:
        """Shapes of the arguments of ``decode_tokens``, but for given tokens."""
        static = self.static
        config, layout, batch_size = static.config, static.layout, self.batch_size

        def shape(sizes: tuple[int, ...], dtype: str) -> Any:
            return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

        parameters = abstract_parameters(config, DTYPE, static.quant)

        def part(prefix: str) -> Any:
            names = (name for name in parameters if name.startswith(prefix))
            return tuple(parameters[name] for name in names if not name.endswith(".blobs"))

        layers = tuple(part(f"layers.{i}.") for i in range(self.num_layers))
        ends = tuple(p for name, p in parameters.items() if not name.startswith("layers."))
        blobs = shape((config.router.num_experts, layout.num_items), layout.dtype)
        int32_B = shape((batch_size,), "int32")
        cache: Any = jax.eval_shape(lambda: init_cache(config, batch_size, CACHE_CAPACITY, DTYPE))
        scalar = shape((), "float32")
        return (
            ends,
            layers,
            (blobs,) * self.num_layers,
            DecodeState(cache, int32_B, int32_B, None),
            abstract_cache(static.cache, layout.num_items, layout.dtype),
            shape((batch_size,), "bool"),
            Limits(stop_ids=shape((4,), "int32"), lengths_B=int32_B),
            shape((2,), "uint32"),
            SamplingValues(scalar, shape((), "int32"), scalar, scalar, scalar),
        )

    def lower(self) -> jax.stages.Lowered:
        static = self.static

        def program(ends, layers, host, state, experts, active_B, limits, *sampling):
            host = tuple(lax.optimization_barrier(_to_host(blobs)) for blobs in host)
            return decode_tokens(
                ends, layers, host, state, experts, active_B, limits, None, *sampling, static=static
            )

        return jax.jit(program, donate_argnums=(3, 4)).lower(*h100.abstract(self.arguments()))


def _to_host(blobs: jax.Array) -> jax.Array:
    return jax.device_put(blobs, jax.memory.Space.Host)
