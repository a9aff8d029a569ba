"""The offload engine: experts in host memory, a cache of them on the device, moved ahead of use."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines import offload_scoring
from jmoe.engines.batch import BatchRun
from jmoe.engines.beam_offload import OffloadBeamSteps
from jmoe.engines.beam_run import BeamRun
from jmoe.engines.contest import MISSES, WAYS, Contest, Way
from jmoe.engines.expert_model import ExpertModel
from jmoe.engines.host_compute import HostCompute
from jmoe.engines.layer_experts import Hybrid
from jmoe.engines.memory import remedy, smaller_plan
from jmoe.engines.offload_steps import OffloadSteps
from jmoe.engines.prediction import Predictor
from jmoe.engines.prompts import check_prompts
from jmoe.engines.steps import BatchShape
from jmoe.errors import RequestError, TransferError
from jmoe.generation.options import GenerationOptions
from jmoe.native.choice import HostKernels
from jmoe.planning.chunks import longest_chunk
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.memory import available_host_bytes
from jmoe.planning.plan import Plan
from jmoe.planning.policy import Policy
from jmoe.planning.splitting import Splitter
from jmoe.planning.traces import TraceRecorder
from jmoe.quant.spec import QuantSpec
from jmoe.residency.array_cache import CacheStatic
from jmoe.residency.cache import SlotCache
from jmoe.residency.eviction import Eviction, make_eviction
from jmoe.residency.experts import DeviceExperts
from jmoe.residency.host_experts import HostExperts, ThrottledCompute
from jmoe.residency.link import Link
from jmoe.residency.slot_array import SlotArray, host_arrays
from jmoe.residency.switching import SwitchingExperts
from jmoe.residency.timeline import Timeline
from jmoe.store.disk_tier import DiskTier
from jmoe.store.expert_store import ExpertStore


class Replan(Protocol):
    """Makes the plan for a batch of another size."""

    def __call__(
        self,
        batch_size: int,
        num_positions: int,
        chunk: int | None = None,
        workspace_bytes: int | None = None,
    ) -> Plan:
        """Args:
          batch_size: sequences.
          num_positions: of each.
          chunk: longest piece of a prompt, if that is decided.
          workspace_bytes: what its programs take, if they are compiled.

        Raises:
          CapacityError: the batch does not fit into the budget.
        """
        ...


class HostSide(NamedTuple):
    """How the host computes experts.

    Attributes:
      kernels: to compute with; None leaves it to XLA.
      costs: of experts on both sides.
      loop_s: what the host adds to each layer by going through them in a loop.
      bytes_per_s: holds the host to reading experts at this speed; None does not.
    """

    kernels: HostKernels | None
    costs: ExpertCosts
    loop_s: float = 0.0
    bytes_per_s: float | None = None


class OffloadEngine(ExpertModel):
    """Runs one batch at a time: its experts are those of the last token of the last one.

    Attributes:
      plan: where the bytes of the current batch go.
      store: the experts in host memory.
      host_blobs: by layer the experts in host memory, as programs read them; empty if none does.
      notes: what was decided while it was made, a sentence each.
      recorder: told which experts are chosen; None does not record.
      predictor: of experts; None takes what the routers say.
      host_side: how the host computes experts, if that is known.
      step_s: by sequences at once the seconds of a decode step whose experts are all on the device.
      hybrid: computes experts on the host; None if the policy is to load them.
      splitter: says which, for hybrid.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Iterable[np.ndarray | jax.Array],
        dtype: str,
        device: jax.Device,
        quant: QuantSpec,
        host: HostKernels | None,
        *,
        plan: Plan,
        link: Link,
        replan: Replan | None = None,
        store: ExpertStore | None = None,
        eviction: Eviction | None = None,
        timeline: Timeline | None = None,
        host_experts: HostSide | None = None,
    ):
        """Args:
        parameters: see ``ExpertModel``.
        plan: of the mode offload.
        link: for blobs of this layout; closed with the engine.
        replan: asked when a batch is larger or smaller than the plan's; None keeps the plan.
        store: of the blobs among the parameters; None makes one of them.
        eviction: another rule than the policy's.
        timeline: of copies, waits and layers.
        host_experts: how the host computes experts, for policies by which it does.
        """
        policy = plan.policy
        super().__init__(config, parameters, dtype, device, quant, host, policy)
        self.recorder: TraceRecorder | None = None
        self.predictor: Predictor | None = None
        self.store = store or _store(self, as_arrays=policy.engine != "thread")
        self.host_layers.clear()  # which the store may move
        self._replan = replan
        # As compiled, by batch, and for which workspace.
        self._plans: dict[BatchShape, tuple[Plan, int]] = {}
        self._run: OffloadSteps | None = None
        self._closed = False
        self._contests: dict[int, Contest] = {}  # by sequences at once
        self.notes: list[str] = []
        self.host_blobs = self._host_arrays() if policy.engine != "thread" else ()
        self.plan = self._possible(plan)
        policy = self.plan.policy
        assert policy.slots is not None and policy.eviction is not None
        cache = SlotCache(
            policy.slots,
            num_layers=config.num_hidden_layers,
            num_experts=config.router.num_experts,
            num_staging=policy.num_staging,
            eviction=eviction or make_eviction(policy.eviction),
            min_free=self._min_free(policy),
        )
        store = self.store  # the fetcher's thread must not refer to the engine
        self.places = SwitchingExperts(
            DeviceExperts(link, store.blob, cache, timeline, store.disk),
            self.layout.num_bytes,
            config.router.top_k,
            self._make_slots if self.host_blobs else None,
            policy.eviction,
        )
        if policy.engine == "compiled":
            self.places.move_into_slots()
        self.host_side = host_experts
        self.step_s: dict[int, float] = {}
        self.hybrid: Hybrid | None = None
        self.splitter: Splitter | None = None
        if policy.misses != "load":
            assert host_experts is not None
            first, *_ = policy.possible_misses
            self.splitter = Splitter(host_experts.costs, misses=first)
            self.hybrid = self._make_hybrid(host_experts, self.splitter, timeline)

    @property
    def disk(self) -> DiskTier | None:
        """What brings experts into host memory, if they are mapped."""
        return self.store.disk

    @property
    def slots(self) -> SlotArray | None:
        """What decode steps that are one program use; None if they are not."""
        return self.places.slots

    def longest_chunk(
        self, batch_size: int, num_positions: int, num_prompts: int | None = None
    ) -> int:
        """Longest piece in which prompts of such a batch are prefilled (CapacityError)."""
        plan = self.plan
        if self._replan is not None:
            plan = self._replan(batch_size, num_positions)
        longest = longest_chunk(self.config, num_prompts or batch_size, num_positions)
        return min(longest, plan.policy.prefill_chunk)

    def start(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> BatchRun:
        """Checks a batch, makes room for it, compiles what it needs, and prefills it.

        Ends the batch before, if that has not ended: going on with that one is a RequestError.

        Raises:
          RequestError: a prompt is empty, has an unknown token, or leaves no room for a new
            token in the model's context; or the engine was closed.
          CapacityError: the batch does not fit into the budget.
          TransferError: a copy to the device failed.
        """
        check_prompts(prompts, self.config, reserve=1)
        return BatchRun(self, prompts, options)

    def start_beams(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> BeamRun:
        """The same for options.num_beams beams of every prompt."""
        check_prompts(prompts, self.config, reserve=1)
        return BeamRun(self, prompts, options)

    def plan_with(self, replan: Replan) -> None:
        """Lets another one make the plans from the next batch on: for another budget, say."""
        self._replan = replan
        self._plans.clear()

    def reserve(self, shape: BatchShape) -> None:
        """Plans a batch, and gives the experts the places that are left (CapacityError)."""
        self._begin()
        if self._replan is not None:
            planned = self._plans.get(shape)
            self._adopt(planned[0] if planned else self._replan(*self._sizes(shape)))
        policy = self.plan.policy
        if len(ways := self._ways(policy)) > 1:
            contest = self._contests.setdefault(
                shape.batch_size, Contest(policy.tokens_per_call, ways)
            )
            if "compiled" in contest.ways and self.places.static is None:
                contest.drop("compiled")
            self.decode_by(contest.running)

    def remedy(self, shape: BatchShape) -> str:
        """What to do if the device has no memory for a batch."""
        batch_size, num_positions = self._sizes(shape)
        plan = smaller_plan(
            self.config,
            self.dtype,
            self.quant,
            batch_size=batch_size,
            num_positions=num_positions,
            used_bytes=self.plan.device_bytes,
            policy=self.plan.policy,
        )
        return remedy(self.config, plan)

    def _begin(self) -> None:
        """Ends what was begun before, and whatever Ctrl-C or an error left of it."""
        if self._closed:
            raise RequestError("the model was closed", do="load it again")
        if self._run is not None:
            self._run.end()
        self.places.settle()
        if self.hybrid is not None:
            self.hybrid.host.settle()
        if self._run is not None:
            self._run.free()
            self._run = None

    def fit(self, shape: BatchShape, workspace_bytes: int) -> None:
        """Plans a batch again when its programs are compiled, which says what they take.

        Raises:
          CapacityError: it does not fit into the budget.
        """
        planned = self._plans.get(shape)
        if self._replan is not None and (planned is None or planned[1] < workspace_bytes):
            chunk = self.longest_chunk(*self._sizes(shape), shape.num_prompts)
            plan = self._replan(*self._sizes(shape), chunk, workspace_bytes)
            self._plans[shape] = plan, workspace_bytes
            self._adopt(plan)

    def decode_by(self, way: Way) -> None:
        """Says how the next decode steps are taken; experts on the device move if that changes."""
        if way == "compiled":
            self.places.move_into_slots()
            return
        self.places.move_into_arrays()
        if self.splitter is not None:
            self.splitter.misses = MISSES[way]

    def contest(self, batch_size: int) -> Contest | None:
        """Between the ways in which such batches may decode, if there are several."""
        return self._contests.get(batch_size)

    def engine_reason(self, batch_size: int) -> str | None:
        """Which way such batches decode, and the times of all, once they are known."""
        contest = self._contests.get(batch_size)
        is_over = contest is not None and contest.is_over and len(contest.ways) > 1
        return str(contest) if is_over else None

    @property
    def decodes_by(self) -> Way:
        """How decode steps are taken now."""
        if self.places.in_slots:
            return "compiled"
        return "thread" if self.splitter is None else WAYS[self.splitter.misses]

    def _ways(self, policy: Policy) -> tuple[Way, ...]:
        """In which a policy lets decode steps be taken."""
        missing: list[Way] = [WAYS[misses] for misses in policy.possible_misses]
        if policy.engine == "thread":
            return tuple(missing)
        by_program: list[Way] = ["compiled"]
        return tuple(by_program if policy.engine == "compiled" else [*missing, *by_program])

    def _min_free(self, policy: Policy) -> int:
        """Places of staging that a layer needs for experts that it has no slots for."""
        smallest = min(policy.slots) if isinstance(policy.slots, tuple) else 0
        return max(0, self.config.router.top_k - smallest)

    def _sizes(self, shape: BatchShape) -> tuple[int, int]:
        return shape.batch_size, min(shape.capacity, self.config.max_position_embeddings)

    def _adopt(self, plan: Plan) -> None:
        self.plan = self._possible(plan)
        policy = self.plan.policy
        assert policy.slots is not None
        self.places.resize(policy.slots, policy.num_staging)
        self.experts.cache.min_free = self._min_free(policy)

    def _possible(self, plan: Plan) -> Plan:
        """The plan, but by the thread engine if programs cannot read host memory."""
        if plan.policy.engine == "thread" or self.host_blobs:
            return plan
        return dataclasses.replace(plan, policy=plan.policy.for_thread(self.config))

    def _host_arrays(self) -> tuple[jax.Array, ...]:
        """Experts in host memory as programs read them; none, with a note, if they cannot."""
        try:
            return host_arrays(self.store, self.device)
        except TransferError as error:
            self.notes.append(f"engine thread, not compiled: {error.what} ({error.got})")
            return ()

    def _make_hybrid(self, side: HostSide, splitter: Splitter, timeline: Timeline | None) -> Hybrid:
        compute = HostCompute(self.config, self.dtype, self.layout, self.store, side.kernels)
        throttled = compute
        if side.bytes_per_s is not None:
            throttled = ThrottledCompute(compute, self.layout.num_bytes, side.bytes_per_s)
        host = HostExperts(throttled, self.layout.num_bytes, timeline)
        return Hybrid(splitter, host, compute)

    def _make_slots(self, static: CacheStatic) -> SlotArray:
        return SlotArray(static, self.layout, self.device, self.host_blobs)

    def steps(self, shape: BatchShape) -> OffloadSteps:
        contest = self._contest(shape)
        self._run = OffloadSteps(self, shape, self.recorder, self.predictor, contest)
        return self._run

    def beam_steps(self, shape: BatchShape) -> OffloadBeamSteps:
        contest = self._contest(shape)
        self._run = steps = OffloadBeamSteps(self, shape, self.recorder, self.predictor, contest)
        return steps

    def _contest(self, shape: BatchShape) -> Contest | None:
        """Between the ways to take such a batch's steps, if it goes on."""
        contest = self._contests.get(shape.batch_size)
        return None if contest is None or contest.is_over else contest

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Scores the next token at every position of one sequence: float32 [L, V].

        Raises:
          RequestError: no token, an unknown one, or more than the model's context; or the engine
            was closed.
          TransferError: a copy to the device failed.
        """
        check_prompts([token_ids], self.config)
        self._begin()
        return offload_scoring.score_prompt(self, token_ids)

    def decode_logits(self, token_ids_BL: np.ndarray) -> np.ndarray:
        """Scores sequences token by token, as decode steps do: float32 [B, L, V].

        Args:
          token_ids_BL: of equal length.
        """
        check_prompts(token_ids_BL.tolist(), self.config)
        self._begin()
        self.places.begin()
        return offload_scoring.score_steps(self, token_ids_BL)

    def close(self) -> None:
        """Stops the thread that copies, and drops all experts; may be called again."""
        self._closed = True
        if self.hybrid is not None:
            self.hybrid.host.close()
            self.hybrid.compute.close()
        self.places.close()
        self.store.close()


def _store(model: ExpertModel, as_arrays: bool) -> ExpertStore:
    """Of the blobs that a model was given."""
    shape = (-1, model.layout.num_bytes)
    layers = [layer.view(np.uint8).reshape(shape) for layer in model.host_layers]
    store = ExpertStore(
        model.layout, layers, "ram", "read into memory", spare_bytes=available_host_bytes()
    )
    store.lock_pages(model.device, as_arrays=as_arrays)
    return store
