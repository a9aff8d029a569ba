"""Which engine runs a model on this machine, in which memory, and with which kernels."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.memory import ExplainShortage, check_fits, remedy, smaller_plan
from jmoe.engines.offload import HostSide, OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.loading.hardware import find_hardware, subject_of
from jmoe.loading.options import LoadOptions
from jmoe.loading.popularity import Shares, hold_popular, read_popularity
from jmoe.native import library
from jmoe.native.choice import HostKernels, uncovered
from jmoe.planning import sizes
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.memory import available_host_bytes, device_memory
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import Policy
from jmoe.planning.traces import TraceRecorder
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import PRESETS, QuantSpec
from jmoe.residency.link import DeviceLink, Link, ThrottledLink
from jmoe.store.expert_store import ExpertStore

Engine = ResidentEngine | OffloadEngine

# Positions that a plan is made for if nobody says how many; each batch then has its own plan.
DEFAULT_CONTEXT = 1024


class Setup(NamedTuple):
    """How a model will run: decided from its configuration, before any weight is read.

    Attributes:
      config: the model.
      dtype: of activations, KV cache and plain parameters.
      quant: formats of the parameters; of experts that are offloaded there always are some.
      device: where it runs.
      plan: where the bytes go.
      options: what was asked for.
      popularity: how often recorded runs used each expert; empty if no record is named.
    """

    config: ModelConfig
    dtype: str
    quant: QuantSpec | None
    device: jax.Device
    plan: Plan
    options: LoadOptions
    popularity: Shares

    @property
    def is_offload(self) -> bool:
        return self.plan.policy.mode == "offload"

    @property
    def is_mapped(self) -> bool:
        """Whether weights in a mapped file need no memory of their own."""
        return self.device.platform == "cpu" or self.is_offload

    @property
    def num_positions(self) -> int:
        """That the plan is made for."""
        return _num_positions(self.config, self.options)

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return parameter_bytes(self.config, self.dtype, self.quant)

    def check_size(self) -> None:
        """Raises CapacityError if the weights do not fit into memory.

        What goes to a device beside host memory is the plan's business.
        """
        if not self.options.check_memory:
            return
        host = jax.local_devices(backend="cpu")[0]
        where = host if self.is_offload else self.device
        check_fits(
            self.num_bytes,
            where,
            what=f"the model in {self.dtype if self.quant is None else self.quant}",
            do="use fewer bits (--quant=attn4-experts4), or a machine with more memory",
        )

    def build(
        self, parameters: Iterable[np.ndarray | jax.Array], store: ExpertStore | None = None
    ) -> tuple[Engine, tuple[str, ...]]:
        """Makes the engine; returns it and what was decided on the way, a sentence each."""
        host, notes = self._host_kernels()
        host_side, found = self._host_side()
        notes += found
        what = f"plan for {self.num_positions:,} positions"
        reasons = tuple(f"{what}: {reason}" for reason in self.plan.reasons)
        if not self.is_offload:
            with self._explaining():
                engine = ResidentEngine(
                    self.config, parameters, self.dtype, self.device, self.quant, host
                )
            if self.popularity and (store is None or store.disk is None):
                notes += ("popularity has no effect: no expert is offloaded or mapped",)
            return engine, (*notes, *(reasons if self.options.budget_bytes else ()))
        assert self.quant is not None
        link = self.make_link(self.quant)
        with self._explaining():
            engine = OffloadEngine(
                self.config,
                parameters,
                self.dtype,
                self.device,
                self.quant,
                host,
                plan=self.plan,
                link=link,
                replan=self.replan,
                store=store,
                timeline=self.options.timeline,
                host_experts=host_side,
            )
        if self.options.record_routing:
            router = self.config.router
            engine.recorder = TraceRecorder(
                self.config.num_hidden_layers, router.num_experts, router.top_k
            )
        try:
            with self._explaining():
                held = hold_popular(engine, self.popularity)
        except BaseException:
            engine.close()
            raise
        return engine, (*notes, *reasons, *engine.notes, *held)

    def _explaining(self) -> ExplainShortage:
        return ExplainShortage("loading the weights", self.device, self._remedy)

    def _remedy(self) -> str:
        """What to do if the device has no memory for the weights."""
        if self.device.platform == "cpu" and not self.is_offload:
            return "use fewer bits (--quant=attn4-experts4), or a machine with more memory"
        policy = self.plan.policy if self.is_offload else Policy(mode="offload")
        plan = smaller_plan(
            self.config,
            self.dtype,
            self.quant,
            batch_size=1,
            num_positions=self.num_positions,
            used_bytes=self.plan.device_bytes,
            policy=policy,
        )
        return remedy(self.config, plan)

    def replan(
        self,
        batch_size: int,
        num_positions: int,
        chunk: int | None = None,
        workspace_bytes: int | None = None,
    ) -> Plan:
        """The plan for another batch (CapacityError); see ``engines.offload.Replan``."""
        policy = self.options.requested_policy
        if isinstance(policy, str):
            policy = self.options.offload_policy
        if chunk is not None:
            policy = dataclasses.replace(policy, prefill_chunk=chunk)
        return make_plan(
            self.config,
            self.dtype,
            self.quant,
            batch_size=batch_size,
            num_positions=num_positions,
            requested=policy,
            workspace_bytes=workspace_bytes,
            budget_bytes=self.plan.budget_bytes,
            platform=self.device.platform,
        )

    def _host_side(self) -> tuple[HostSide | None, tuple[str, ...]]:
        """How the host computes experts, if it is to, and notes about the machine."""
        options = self.options
        if not self.is_offload or self.plan.policy.misses == "load":
            return None, ()
        assert self.quant is not None
        subject = subject_of(self)
        # A link of its own: the engine's may not be in use yet.
        link = self.make_link(self.quant) if options.link_gb_per_s is not None else None
        found = find_hardware(
            subject, link, named=options.hardware, recalibrate=options.recalibrate
        )
        speed = options.host_gb_per_s
        bytes_per_s = None if speed is None else speed * 1e9
        costs = ExpertCosts.of(
            found.spec,
            subject.layout,
            activation_bits=subject.activation_bits,
            dtype=self.dtype,
            host_bytes_per_s=bytes_per_s,
        )
        loop_s = found.spec.round_trip_s + found.spec.dispatch_s
        return HostSide(subject.host, costs, loop_s, bytes_per_s), found.notes

    def make_link(self, quant: QuantSpec) -> Link:
        """The way of experts in such formats to the device, as slow as was asked for."""
        config, options = self.config, self.options
        layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
        link: Link = DeviceLink(self.device, layout.dtype)
        if options.link_gb_per_s is not None:
            latency_s = options.link_latency_us * 1e-6
            link = ThrottledLink(link, options.link_gb_per_s * 1e9, latency_s)
        return link

    def _host_kernels(self) -> tuple[HostKernels | None, tuple[str, ...]]:
        """The kernels that a CPU computes with, and a note about them."""
        options = self.options
        if self.device.platform != "cpu":
            return None, ()
        status = library.status()
        if not (options.host_kernels and status.available):
            off = "host kernels: switched off; the CPU computes through XLA, more slowly"
            return None, (status.reason if options.host_kernels else off,)
        host, note = options.kernel_options, status.reason
        if self.quant is not None and self.quant.is_quantized:
            note += f"; activations in {host.activation_bits} bits"
            if others := uncovered(self.quant.formats):
                note += f"; none for {', '.join(map(str, others))}, which XLA computes"
        return host, (note,)


def decide(
    config: ModelConfig, quant: QuantSpec | None, options: LoadOptions, device: jax.Device
) -> Setup:
    """Decides how a model runs (ConfigError, CapacityError, RequestError)."""
    popularity = read_popularity(options, config)
    requested = options.requested_policy
    if requested == "host" or getattr(requested, "mode", None) == "host":
        device = jax.local_devices(backend="cpu")[0]
    dtype = _choose_dtype(options.dtype, config, device, quant)
    if options.record_routing and requested in ("auto", "resident"):
        requested = "offload"  # whose host knows what the routers choose
    offload = options.offload_policy
    if requested == "offload":
        requested = offload
    limit, in_use, _ = device_memory(device)
    plan = make_plan(
        config,
        dtype,
        quant,
        batch_size=1,
        num_positions=_num_positions(config, options),
        requested=requested,
        offload=offload,
        budget_bytes=options.budget_bytes,
        platform=device.platform,
        free_bytes=None if limit is None else limit - (in_use or 0),
    )
    if plan.policy.mode == "offload" and quant is None:
        quant = PRESETS["f32" if dtype == "float32" else "bf16"]
    return Setup(config, dtype, quant, device, plan, options, popularity)


def _num_positions(config: ModelConfig, options: LoadOptions) -> int:
    return min(options.context or DEFAULT_CONTEXT, config.max_position_embeddings)


def parameter_bytes(config: ModelConfig, dtype: str, quant: QuantSpec | None = None) -> int:
    """Size of a model's weights."""
    return sizes.total(sizes.weight_sizes(config, dtype, quant)).num_bytes


def _choose_dtype(
    dtype: str, config: ModelConfig, device: jax.Device, quant: QuantSpec | None
) -> str:
    if dtype != "auto":
        return dtype
    if device.platform != "cpu":
        return "bfloat16"
    # On a CPU float32 is exact and no slower, if there is room.
    fits = parameter_bytes(config, "float32", quant) < 0.8 * available_host_bytes()
    return "float32" if fits or quant is not None else "bfloat16"
