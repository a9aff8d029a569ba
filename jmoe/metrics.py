"""What happened: counters and times of a run."""

import dataclasses
import time
from typing import Self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What experts did during one phase of a call: its prefill, or its decode steps.

    An expert counts once for every layer and group of tokens that uses it.
    """

    hits: int  # needed, and on the device or on the way there
    demand_loads: int  # needed, and not
    prefetches: int  # copies of predicted experts, those included that were cancelled in time
    useful_prefetches: int  # used before they lost their place
    useless_prefetches: int  # lost their place unused
    copies: int  # that arrived on the device
    copied_bytes: int
    # Time that the link was occupied, and time between asking for experts and the arrival of the
    # last one that was needed; None where a program fetches experts, into which nobody looks.
    link_busy_s: float | None
    stalled_s: float | None
    host_experts: int = 0  # needed, and computed on the host
    host_bytes: int = 0  # of these experts
    host_busy_s: float = 0.0

    @classmethod
    def none(cls) -> Self:
        """Nothing happened."""
        fields = dataclasses.fields(cls)
        return cls(**{field.name: 0 for field in fields})

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            hits=self.hits + other.hits,
            demand_loads=self.demand_loads + other.demand_loads,
            prefetches=self.prefetches + other.prefetches,
            useful_prefetches=self.useful_prefetches + other.useful_prefetches,
            useless_prefetches=self.useless_prefetches + other.useless_prefetches,
            copies=self.copies + other.copies,
            copied_bytes=self.copied_bytes + other.copied_bytes,
            link_busy_s=_sum_of_known(self.link_busy_s, other.link_busy_s),
            stalled_s=_sum_of_known(self.stalled_s, other.stalled_s),
            host_experts=self.host_experts + other.host_experts,
            host_bytes=self.host_bytes + other.host_bytes,
            host_busy_s=self.host_busy_s + other.host_busy_s,
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / self.needed if self.hits else 0.0

    @property
    def needed(self) -> int:
        """Experts that were used."""
        return self.hits + self.demand_loads + self.host_experts

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"hit_rate": self.hit_rate}


def _sum_of_known(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraffic:
    """What experts of one layer did in decode steps."""

    hits: int
    demand_loads: int
    copied_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyStats:
    """Where experts were and what moved, of engines that move them.

    Attributes:
      engine: "thread" or "compiled": what ran the last decode step.
      way: "thread" if missing experts were loaded, "split" or "host" if the host computed some of
        them or all, or "compiled".
      engine_reason: why, if several ways were tried: the times of all; else None.
      prefill: what happened while prompts were read.
      decode: what happened in decode steps.
      decode_by_layer: the same, of those that the compiled engine ran; else empty.
      predicted_step_s: seconds that a decode step was to take by the cost model, if it knew.
      resident_step_s: seconds that one took with all experts on the device, before the first batch
        of that size; None if that was not measured.
      recall: share of the experts that a layer chose among those predicted for it, by how many
        layers before, and by how many predictions per token: recall[distance - 1][number - 1].
      num_slots: places of experts that are kept, over all layers.
      num_staging: places of experts on their way, or not used yet.
      peak_places: most places that held an expert at one time.
      expert_bytes: of one expert.
      peak_device_bytes: weights, KV cache, workspace as compiled, and places in use; on a device
        that reports it, what it reports.
    """

    engine: str
    way: str
    engine_reason: str | None
    prefill: Traffic
    decode: Traffic
    decode_by_layer: tuple[LayerTraffic, ...]
    predicted_step_s: float | None
    resident_step_s: float | None
    recall: tuple[tuple[float, ...], ...]
    num_slots: int
    num_staging: int
    peak_places: int
    expert_bytes: int
    peak_device_bytes: int

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiskTraffic:
    """What experts in mapped files did during one phase of a call.

    The resident engine reads experts where they lie, and nobody counts them: only read_bytes is
    not 0 then.
    """

    read_bytes: int | None  # that the process had disks read, also beside experts; if known
    needed: int  # experts whose bytes were asked for, by a copy to the device or the CPU
    waited_for: int | None  # of those, some bytes of which were not in memory; if known
    missing_bytes: int  # that were not
    waited_s: float  # until they were
    read_ahead: int  # experts that were predicted, and had to be read
    useful: int  # of those: in memory when they were needed
    late: int  # of those: needed while they were being read
    useless: int  # of those: not needed by the token they were predicted for

    @classmethod
    def none(cls) -> Self:
        """Nothing happened."""
        fields = dataclasses.fields(cls)
        return cls(**{field.name: 0 for field in fields})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiskStats:
    """What it costs that experts are mapped from files instead of being in memory.

    Attributes:
      prefill: what happened while prompts were read.
      decode: what happened in decode steps.
      expert_bytes: of one expert.
      locked_experts: that stay in memory.
      locked_bytes: the same.
      bytes_per_s: at which the disk gave experts when the model was loaded; None if nothing was
        missing then.
    """

    prefill: DiskTraffic
    decode: DiskTraffic
    expert_bytes: int
    locked_experts: int
    locked_bytes: int
    bytes_per_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Work and time of one call to generate, over all its sequences.

    The first new token of a sequence comes out of the prefill, so decode_tokens, the tokens
    that decode steps made, are one fewer per sequence than the new tokens; decode_tok_per_s
    divides steps by the time of the same steps. Compilation is never part of the other
    times. Every beam is a sequence, whose tokens count whether it survives or not; a prompt is
    read once for all its beams.
    """

    num_sequences: int  # of all prompts
    prefill_tokens: int  # of all prompts, without padding
    prefill_s: float  # until the first new token of every sequence is on the host
    new_tokens: int
    decode_tokens: int
    decode_steps: int
    decode_s: float
    compile_s: float  # compiling programs and running each once
    compiled_programs: int  # in this call; 0 once warm
    residency: ResidencyStats | None = None  # of engines that move experts
    num_beams: int = 1  # sequences of each prompt
    disk: DiskStats | None = None  # of experts in mapped files

    @property
    def prefill_tok_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def predicted_tok_per_s(self) -> float | None:
        """Of decode steps by the cost model, with as many sequences as there were; if it knew."""
        predicted_s = self.residency and self.residency.predicted_step_s
        if not predicted_s or not self.decode_steps:
            return None
        return self.decode_tokens / self.decode_steps / predicted_s

    @property
    def decode_busy(self) -> dict[str, float]:
        """Share of the time of decode steps that each resource was busy, of those that are known.

        The device: for as long as the steps would have taken with all experts there.
        """
        residency = self.residency
        if residency is None or not self.decode_s:
            return {}
        seconds = {"link": residency.decode.link_busy_s, "host": residency.decode.host_busy_s}
        if residency.resident_step_s is not None:
            seconds["device"] = residency.resident_step_s * self.decode_steps
        return {name: s / self.decode_s for name, s in seconds.items() if s is not None}

    @property
    def disk_bytes_per_token(self) -> float | None:
        """Read from disks in decode steps; None if that is not known, or nothing was decoded."""
        read_bytes = self.disk and self.disk.decode.read_bytes
        if read_bytes is None or not self.decode_tokens:
            return None
        return read_bytes / self.decode_tokens

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {
            "prefill_tok_per_s": self.prefill_tok_per_s,
            "decode_tok_per_s": self.decode_tok_per_s,
            "predicted_tok_per_s": self.predicted_tok_per_s,
            "decode_busy": self.decode_busy,
            "residency": self.residency and self.residency.to_json(),
            "disk_bytes_per_token": self.disk_bytes_per_token,
        }


class Stopwatch:
    """Adds up the seconds spent inside ``with stopwatch:``."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info):
        self.seconds += time.perf_counter() - self._start
