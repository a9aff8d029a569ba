"""How to load a model: what can be asked for, and whether it makes sense."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from jmoe.errors import ConfigError, RequestError
from jmoe.native.choice import DEFAULT_ACTIVATION_BITS, HostKernels
from jmoe.planning.policy import EngineChoice, MissesChoice, Mode, Policy, read_request
from jmoe.quant.solver import Method, check_method
from jmoe.quant.spec import QuantSpec, parse_spec
from jmoe.residency.timeline import Timeline
from jmoe.store.host_memory import check_choice

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a model: the arguments of ``jmoe.load``, which explains them.

    Raises RequestError or ConfigError if they are unusable or contradict each other.
    """

    dtype: str = "auto"
    quant: str | None = None
    method: Method = "hqq"
    host_memory: str = "auto"
    read_ahead: bool = True
    lock_memory_gib: float | None = None
    popularity: str | Path | None = None
    random_weights: bool = False
    num_layers: int | None = None
    seed: int = 0
    host_kernels: bool = True
    activation_bits: int | None = None
    threads: int = 0
    revision: str | None = None
    progress: bool = False
    policy: str | Policy = "auto"
    engine: EngineChoice | None = None
    tokens_per_call: int | None = None
    misses: MissesChoice | None = None
    device_memory_gib: float | None = None
    context: int | None = None
    record_routing: bool = False
    timeline: Timeline | None = None
    link_gb_per_s: float | None = None
    link_latency_us: float = 0.0
    host_gb_per_s: float | None = None
    hardware: str | None = None
    recalibrate: bool = False
    check_memory: bool = True  # refuse what this machine's memory does not hold

    def __post_init__(self):
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(
                "unknown dtype", got=repr(self.dtype), expected="auto, float32 or bfloat16"
            )
        check_choice(self.host_memory)
        self._check_disk()
        _ = self.spec  # which raises
        check_method(self.method)
        if self.activation_bits is not None and not self.host_kernels:
            raise RequestError(
                "activations in few bits are for the host kernels, which are switched off",
                got=self.activation_bits,
            )
        _ = self.kernel_options  # which raises
        _ = self.requested_policy  # which raises
        _require_positive(self.device_memory_gib, "the budget of device memory, in GiB,")
        _require_positive(self.link_gb_per_s, "the speed of the link, in GB/s,")
        if self.link_gb_per_s is not None and self._chosen_engine != "thread":
            raise RequestError(
                "only the engine thread copies over a link that can be held to a speed",
                got=f"the engine {self._chosen_engine}, and {self.link_gb_per_s} GB/s",
                do="leave one of them out",
            )
        _require_positive(self.host_gb_per_s, "the speed of the host, in GB/s,")
        _require_positive(self.context, "the number of positions to plan for")
        if self.num_layers is not None and not self.random_weights:
            raise RequestError(
                "num_layers changes the shape of a model, and goes with random weights only",
                got=self.num_layers,
                do="add --random_weights, or leave --num_layers out",
            )

    def _check_disk(self) -> None:
        """Raises RequestError for what makes no sense of experts that are not mapped."""
        if self.lock_memory_gib is not None and not 0 <= self.lock_memory_gib < math.inf:
            raise RequestError(
                "the memory to lock, in GiB, must be 0 or more", got=self.lock_memory_gib
            )
        if self.asks_of_disk and self.host_memory == "ram":
            raise RequestError(
                f"{self.asks_of_disk} is for experts that are mapped from files",
                got="host_memory ram, which reads all of them into memory",
                do="leave one of them out",
            )

    @property
    def asks_of_disk(self) -> str | None:
        """The name of what was asked for that only mapped experts have; None if nothing was."""
        asked = {
            "read_ahead": not self.read_ahead,
            "lock_memory_gib": self.lock_memory_gib is not None,
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    @property
    def lock_bytes(self) -> int | None:
        """Of host memory; None leaves it open."""
        return None if self.lock_memory_gib is None else int(self.lock_memory_gib * 2**30)

    @property
    def kernel_options(self) -> HostKernels:
        """What ``activation_bits`` and ``threads`` say."""
        bits = self.activation_bits or DEFAULT_ACTIVATION_BITS
        return HostKernels(activation_bits=bits, num_threads=self.threads)  # type: ignore[arg-type]

    @property
    def spec(self) -> QuantSpec | None:
        """What ``quant`` says."""
        return None if self.quant is None else parse_spec(self.quant)

    @property
    def requested_policy(self) -> Mode | Literal["auto"] | Policy:
        """What ``policy`` says: a mode, or the policy in a file, with what else is asked for."""
        requested = read_request(self.policy) if isinstance(self.policy, str) else self.policy
        if self.engine is None and self.tokens_per_call is None and self.misses is None:
            return requested
        if requested == "auto":  # the plan decides
            _ = self.offload_policy  # which raises
            return requested
        if isinstance(requested, str):
            requested = Policy(mode=requested)
        return self.with_engine(requested)

    @property
    def offload_policy(self) -> Policy:
        """How experts are offloaded if nothing more is said (ConfigError, RequestError).

        By the policy auto in the way that turns out to be the fastest.
        """
        policy = Policy(mode="offload")
        if self.policy == "auto" and not self.record_routing:
            can_compile = self.link_gb_per_s is None
            policy = Policy(
                mode="offload",
                engine="auto" if can_compile else "thread",
                misses="load" if self.engine == "compiled" else "auto",
            )
        return self.with_engine(policy)

    def with_engine(self, policy: Policy) -> Policy:
        """A policy with the engine that is asked for (ConfigError, RequestError)."""
        asked = {
            "engine": self.engine,
            "tokens_per_call": self.tokens_per_call,
            "misses": self.misses,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        if asked and policy.mode != "offload":
            raise RequestError(
                "that is chosen for the policy offload",
                got=f"{', '.join(f'{name} {value}' for name, value in asked.items())} and the "
                f"policy {policy.mode}",
                do="leave it out, or change the policy",
            )
        return dataclasses.replace(policy, **asked)

    @property
    def _chosen_engine(self) -> str:
        requested = self.requested_policy
        if isinstance(requested, Policy):
            return requested.engine
        return self.offload_policy.engine

    @property
    def budget_bytes(self) -> int | None:
        """Of device memory."""
        gib = self.device_memory_gib
        return None if gib is None else int(gib * 2**30)


def _require_positive(value: float | None, what: str) -> None:
    if value is not None and not value > 0:
        raise RequestError(f"{what} must be positive", got=value)
