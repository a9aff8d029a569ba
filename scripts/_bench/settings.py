"""What the user asked to measure, and the engine that it is measured on."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jmoe
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError

# By suite, in the order in which they are measured if nobody says which.
PARTS: dict[str, tuple[str, ...]] = {
    "offload": ("overlap", "paper", "overhead"),
    "engines": ("decode", "fetch", "misses", "ahead", "compile"),
    "hybrid": ("decode", "prompts", "beams"),
    "disk": ("read", "decode"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The flags of bench.py. Raises RequestError if they contradict each other."""

    model: str | None  # None is the embedded model
    models: tuple[str, ...]  # to compare, where a suite does that
    loading: Mapping[str, Any]  # the other arguments of jmoe.load
    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int  # 0 leaves out the generation test
    repeats: int
    warmup: int
    peer: str
    operations: tuple[str, ...] = ()  # of the suite kernels, as the following
    formats: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()  # of suites that have some
    links: tuple[float, ...] = ()  # bytes per second; of the suites offload and hybrid
    slots: tuple[int, ...] = ()  # per layer; of the suite hybrid
    copies: bool = True
    plot: str | None = None
    layers: tuple[int, ...] = ()  # of the programs that the suite engines compiles
    memory_gib: float | None = None  # to hold the suite disk to, as the following
    expert_times: int = 1

    def __post_init__(self):
        if not self.batch_sizes:
            raise RequestError("--batch is empty", expected="numbers such as 1,4")
        if self.plot is not None and not {"paper", "decode"} & set(self.parts):
            raise RequestError(
                "--plot draws the part paper of the suite offload, and decode of the suite hybrid",
                got=",".join(self.parts),
            )
        times = self.expert_times
        if times < 1 or times.bit_count() != 1:
            raise RequestError(
                "--expert_times is not usable", got=times, expected="a power of two: 1, 16, 128"
            )
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise RequestError("--memory_gib must be above 0", got=self.memory_gib)
        if not self.prompt_lengths and not self.new_tokens:
            raise RequestError(
                "nothing to measure", do="give --prompt_lengths, or --new_tokens above 0"
            )

    @property
    def memory_bytes(self) -> int | None:
        """That the suite disk is held to."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Subject(NamedTuple):
    """What is measured."""

    name: str
    engine: ResidentEngine
    config_json: dict[str, Any]  # as Hugging Face writes it, layers overridden
    notes: tuple[str, ...] = ()  # of jmoe.load, such as which kernels compute


def read_integers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    """The numbers of a comma-separated flag (RequestError)."""
    for value in values:
        if not value.strip().isdecimal() or int(value) < 1:
            raise RequestError(
                f"--{flag} is not usable", got=repr(value), expected="whole numbers from 1: 64,512"
            )
    return tuple(int(value) for value in values)


def read_speeds(flag: str, values: Sequence[str]) -> tuple[float, ...]:
    """Bytes per second, of GB/s in a comma-separated flag (RequestError)."""
    try:
        speeds = tuple(float(value) * 1e9 for value in values)
    except ValueError:
        speeds = ()
    if not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise RequestError(
            f"--{flag} is not usable", got=repr(",".join(values)), expected="GB/s above 0: 0.5,1,2"
        )
    return speeds


def check_parts(parts: Sequence[str] | None, suite: str = "offload") -> tuple[str, ...]:
    """The parts of a suite: these, or all of them (RequestError)."""
    known = PARTS.get(suite, ())
    if parts is None:
        return known
    if not known:
        raise RequestError(f"--suite={suite} has no parts", got=f"--parts={','.join(parts)}")
    if not parts or not set(parts) <= set(known):
        raise RequestError(
            "--parts is not usable", got=repr(",".join(parts)), expected=",".join(known)
        )
    return tuple(dict.fromkeys(parts))


def check_peer(suite: str, peer: str, peers: Sequence[str]) -> None:
    """Raises RequestError if a suite cannot be compared with a peer."""
    if peer not in ("none", *peers):
        raise RequestError(
            f"--suite={suite} has no such peer",
            got=f"--peer={peer}",
            expected=" or ".join(peers) if peers else "no --peer",
        )


def load_subject(settings: Settings) -> Subject:
    """Loads the model, or fills its shape with random weights (JmoeError)."""
    llm = jmoe.load(settings.model, **settings.loading, progress=True)
    if not isinstance(llm.engine, ResidentEngine):
        raise RequestError(
            "this suite measures models that are on their device as a whole",
            got=f"the policy {llm.plan.policy.mode}",
            do="use --suite=offload, or leave out --policy and --device_memory_gib",
        )
    return Subject(llm.name, llm.engine, dict(llm.config_json), llm.notes)
