"""Models whose experts come and go, in many engines: what the tests of the offload engine share.

Engines of one model share their compiled programs, which depend on shapes alone: so nothing that
differs between two engines can be compiled into a program.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import native
from jmoe.config import ModelConfig
from jmoe.engines.batch import BatchRun
from jmoe.engines.offload import HostSide, OffloadEngine, Replan
from jmoe.engines.prediction import Predictor
from jmoe.engines.programs import ProgramCache
from jmoe.engines.resident import ResidentEngine
from jmoe.generation.options import GenerationOptions
from jmoe.loading import EMBEDDED_MODEL
from jmoe.models import kv_cache
from jmoe.models.decoder import rebuild
from jmoe.models.random_weights import random_parameters
from jmoe.native.choice import HostKernels
from jmoe.planning.chunks import MIN_CHUNK
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import MAX_IN_FLIGHT, EngineChoice, Policy
from jmoe.planning.traces import TraceRecorder
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import QuantSpec, parse_spec
from jmoe.residency.eviction import make_eviction
from jmoe.residency.link import DeviceLink, Link
from jmoe.store.open_source import open_directory
from jmoe.store.quantize import quantized_parameters
from tests.models.configs import small_config

# Of random models: rows of matrices are whole groups of every preset's formats.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 96,
}
SHAPES: dict[str, dict[str, Any]] = {
    "top 2 of 8": {**_SMALL, "num_local_experts": 8},
    "top 3 of 6, window": {
        **_SMALL,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 8,
    },
}

Slots = tuple[int, ...] | int

# Of two missing experts one is copied and one is computed on the host.
EVEN_COSTS = ExpertCosts(copy_s=1e-3, host=lambda tokens: 1e-3, device=lambda tokens: 1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Weights on the host, and the programs of all engines that run them."""

    config: ModelConfig
    dtype: str
    quant: QuantSpec
    host: HostKernels | None
    parameters: tuple[np.ndarray | jax.Array, ...]
    programs: ProgramCache

    @property
    def device(self) -> jax.Device:
        return jax.local_devices()[0]

    @property
    def top_k(self) -> int:
        return self.config.router.top_k

    @property
    def num_experts(self) -> int:
        """Of a layer."""
        return self.config.router.num_experts

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def layout(self) -> ExpertLayout:
        config = self.config
        return ExpertLayout.of(config.hidden_size, config.intermediate_size, self.quant)

    @property
    def blob_bytes(self) -> int:
        return self.layout.num_bytes

    @property
    def all_slots(self) -> Slots:
        return (self.num_experts,) * self.num_layers

    def engine(
        self,
        slots: Slots | None = None,
        *,
        link: Link | None = None,
        eviction: str = "lru",
        seed: int = 0,
        costs: ExpertCosts | None = None,
        **policy: Any,
    ) -> OffloadEngine:
        """An engine that keeps its plan.

        Args:
          slots: of the cache; None is one for every expert.
          link: instead of the device's own.
          eviction: the rule.
          seed: of random eviction.
          costs: of experts that the host may compute.
          policy: other fields of Policy.
        """
        slots = self.all_slots if slots is None else slots
        requested = Policy(mode="offload", slots=slots, eviction=eviction, **policy)
        host_side = HostSide(self.host, costs or EVEN_COSTS)
        return self._engine(self._plan(requested), link=link, seed=seed, host_side=host_side)

    def engine_within(self, budget_bytes: int, engine: EngineChoice = "thread") -> OffloadEngine:
        """An engine that makes a plan for every batch, within a budget."""

        def replan(
            batch_size: int,
            num_positions: int,
            chunk: int | None = None,
            workspace_bytes: int | None = None,
        ) -> Plan:
            return self._plan(
                Policy(mode="offload", prefill_chunk=chunk or 0, engine=engine),
                batch_size=batch_size,
                num_positions=num_positions,
                workspace_bytes=workspace_bytes,
                budget_bytes=budget_bytes,
            )

        return self._engine(replan(1, 16), replan=replan)

    def smallest_budget(
        self, batch_size: int, num_positions: int, engine: EngineChoice = "thread"
    ) -> int:
        """The smallest budget that works for such a batch."""
        policy = Policy(
            mode="offload",
            slots=(0,) * self.num_layers,
            prefill_chunk=MIN_CHUNK,
            engine=engine,
        )
        plan = self._plan(policy, batch_size=batch_size, num_positions=num_positions)
        return plan.device_bytes

    def _plan(
        self,
        requested: Policy,
        *,
        batch_size: int = 1,
        num_positions: int | None = None,
        **more: Any,
    ) -> Plan:
        return make_plan(
            self.config,
            self.dtype,
            self.quant,
            batch_size=batch_size,
            num_positions=num_positions or self.config.max_position_embeddings,
            requested=requested,
            **more,
        )

    def _engine(
        self,
        plan: Plan,
        *,
        link: Link | None = None,
        seed: int = 0,
        replan: Replan | None = None,
        host_side: HostSide | None = None,
    ) -> OffloadEngine:
        eviction = plan.policy.eviction
        assert eviction is not None
        engine = OffloadEngine(
            self.config,
            self.parameters,
            self.dtype,
            self.device,
            self.quant,
            self.host,
            plan=plan,
            link=link or self.link(),
            replan=replan,
            eviction=make_eviction(eviction, seed=seed),
            host_experts=host_side,
        )
        engine.programs = self.programs
        return engine

    def link(self) -> DeviceLink:
        return DeviceLink(self.device, self.layout.dtype)

    @functools.cached_property
    def resident(self) -> ResidentEngine:
        """The engine in which all of it is on the device."""
        return ResidentEngine(
            self.config, self.parameters, self.dtype, self.device, self.quant, self.host
        )

    def recorder(self) -> TraceRecorder:
        return TraceRecorder(self.num_layers, self.num_experts, self.top_k)

    def chosen_experts(self, token_ids: Sequence[int]) -> np.ndarray:
        """The experts that the model as a whole chooses: [T, L, K]."""
        capacity = kv_cache.bucket_capacity(len(token_ids))
        resident = self.resident
        ids_LTK = _chosen_experts(
            resident.parameters,
            kv_cache.init_cache(self.config, 1, capacity, self.dtype, self.device),
            resident.put(np.asarray(token_ids, np.int32)[None]),
            **resident.static_arguments(len(token_ids)),
        )
        return np.stack(ids_LTK, axis=1)

    def least_staging(self, slots: Slots) -> int:
        """The fewest places of staging that go with these slots."""
        smallest = slots if isinstance(slots, int) else min(slots)
        return max(MAX_IN_FLIGHT, self.top_k + MAX_IN_FLIGHT - smallest)

    def slots_of_every_kind(self) -> dict[str, Slots]:
        """Sizes of caches, by what they are called."""
        layers, experts, top_k = self.num_layers, self.num_experts, self.top_k
        sizes = (0, experts, top_k, 1, experts - 1)
        return {
            "staging only": (0,) * layers,
            "top_k": (top_k,) * layers,
            "top_k + 1": (top_k + 1,) * layers,
            "half": (experts // 2,) * layers,
            "all": self.all_slots,
            "uneven": tuple(sizes[layer % len(sizes)] for layer in range(layers)),
            "one pool": layers * experts // 3,
        }


@functools.cache
def embedded_model(quant: str, dtype: str = "float32", host_bits: int = 0) -> Model:
    """The embedded model in a preset.

    Args:
      quant: the preset.
      dtype: of activations.
      host_bits: of activations in host kernels; 0 computes through XLA.
    """
    source = open_directory(EMBEDDED_MODEL, "embedded")
    spec = parse_spec(quant)
    return _model(
        source.config, dtype, spec, host_bits, quantized_parameters(source, dtype, spec, "rtn")
    )


@functools.cache
def random_model(shape: str, quant: str, dtype: str = "float32", host_bits: int = 0) -> Model:
    """A small Mixtral of a shape in SHAPES, with random weights."""
    config, spec = small_config(**SHAPES[shape]), parse_spec(quant)
    return _model(config, dtype, spec, host_bits, random_parameters(config, dtype, 5, spec))


def _model(
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec,
    host_bits: int,
    parameters: Iterable[np.ndarray | jax.Array],
) -> Model:
    host = None
    if host_bits:
        if not native.status().available:
            pytest.skip(native.status().reason)
        host = HostKernels(activation_bits=host_bits)  # type: ignore[arg-type]
    return Model(
        config=config,
        dtype=dtype,
        quant=quant,
        host=host,
        parameters=tuple(parameters),
        programs=ProgramCache(jax.local_devices()[0]),
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "quant", "host", "form"))
def _chosen_experts(parameters, cache, token_ids_BL, *, config, dtype, quant, host, form):
    model = rebuild(config, dtype, parameters, quant, host)
    valid_BL = jnp.ones(token_ids_BL.shape, bool)
    _, _, routings = model(token_ids_BL, jnp.zeros(1, jnp.int32), valid_BL, cache, form)
    return [routing.expert_ids_TK for routing in routings]


def some_tokens(model: Model, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, model.config.vocab_size, shape)


def greedy(
    engine: OffloadEngine | ResidentEngine,
    prompts: Sequence[Sequence[int]],
    num_tokens: int | Sequence[int],
) -> tuple[list[list[int]], BatchRun]:
    """Continues prompts to these lengths, and returns the new tokens and the run."""
    limits = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)
    options = GenerationOptions(max_new_tokens=max(limits), stop_token_ids=())
    run = engine.start([list(map(int, prompt)) for prompt in prompts], options)
    texts: list[list[int]] = [[] for _ in prompts]
    for token_ids_B in run:
        for i, text in enumerate(texts):
            if len(text) < limits[i]:
                text.append(int(token_ids_B[i]))
                if len(text) == limits[i]:
                    run.finish(i)
    return texts, run


class Needed:
    """Notes which experts an engine's decode steps need, by step and layer."""

    def __init__(self, engine: OffloadEngine):
        self.steps: list[list[set[int]]] = []
        need = engine.experts.need

        def noting(layer: int, experts: Sequence[int], elsewhere: Sequence[int] = ()) -> None:
            if layer == 0:
                self.steps.append([])
            if layer == len(self.steps[-1]):
                self.steps[-1].append(set())
            self.steps[-1][layer] |= set(experts)
            need(layer, experts, elsewhere)

        engine.experts.need = noting


class AlwaysWrong(Predictor):
    """Names experts that the next layer does not choose, as many as there are."""

    def __init__(self, steps: Sequence[Sequence[set[int]]], num_experts: int):
        """Takes what each layer of every step will choose."""
        self._steps = steps
        self._num_experts = num_experts
        self._step = -1

    def predict(self, layer: int, predicted_NTW: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        self._step += layer == 0
        chosen_by_layer = self._steps[self._step]
        if layer + 1 < len(chosen_by_layer):
            chosen = chosen_by_layer[layer + 1]
            yield layer + 1, [e for e in range(self._num_experts) if e not in chosen]
