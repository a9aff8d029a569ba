"""What a machine can do as a table, or as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jmoe.engines.probes import Subject
from jmoe.loading.hardware import FoundHardware
from jmoe.planning.budget import format_bytes
from jmoe.planning.hardware import Curve, ExpertTimes


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """A machine, for the experts of one model; ``str`` gives tables."""

    found: FoundHardware
    subject: Subject

    @property
    def experts(self) -> ExpertTimes:
        """Times of the model's experts: measured ones, or an estimate."""
        subject = self.subject
        return self.found.spec.estimate_experts(
            subject.layout, activation_bits=subject.activation_bits, dtype=subject.dtype
        )

    @property
    def copy_s(self) -> float:
        return self.found.spec.to_device(self.subject.layout.num_bytes)

    def to_json(self) -> dict[str, Any]:
        """A hardware file."""
        return self.found.spec.to_json()

    def __str__(self) -> str:
        spec, experts = self.found.spec, self.experts
        layout = self.subject.layout
        device_memory = spec.device_memory_bytes
        is_estimate = experts not in spec.experts
        lines = [
            f"{spec.name}; {spec.num_cores} threads, device {spec.platform} {spec.device_kind}",
            self._source(),
            "",
            f"host memory    {format_bytes(spec.host_memory_bytes):>12}, read at "
            f"{spec.host_bytes_per_s / 1e9:.1f} GB/s",
            f"device memory  {format_bytes(device_memory) if device_memory else 'the same':>12}, "
            f"read at {spec.device_bytes_per_s / 1e9:.1f} GB/s",
            f"control        round trip {_us(spec.round_trip_s)}, one more program "
            f"{_us(spec.dispatch_s)}, a layer handed to the host and back "
            f"{_us(spec.hand_over_s)}, an expert asked for {_us(spec.fetch_s)}",
            "",
            *_copies("to the device", spec.to_device),
            *_copies("to the host", spec.to_host),
            "",
            f"an expert of {layout.hidden_size} x {layout.intermediate_size} in {experts.formats}, "
            f"{format_bytes(layout.num_bytes)}, {experts.dtype}"
            + (f", activations in {experts.activation_bits} bits" * bool(experts.activation_bits))
            + (", estimated from others" if is_estimate else ""),
            _row("tokens", [f"{n:g}" for n, _ in experts.host.points]),
            _row("on the host, ms", [_ms(s) for _, s in experts.host.points]),
            _row("on the device, ms", [_ms(experts.device(n)) for n, _ in experts.host.points]),
            "",
            self._verdict(),
        ]
        return "\n".join(lines)

    def _source(self) -> str:
        spec, path = self.found.spec, self.found.path
        if not spec.fingerprint:
            return spec.source
        kept = f"; kept in {path}" if path else ""
        return f"{spec.source}; repetitions spread by {spec.spread:.0%}{kept}"

    def _verdict(self) -> str:
        worth = self.experts.tokens_worth_copying(self.copy_s)
        copy = f"a copy takes {self.copy_s * 1e3:.3g} ms"
        if self.found.spec.platform == "cpu":
            copy = f"the device is the host, so that this is within the spread; {copy}"
        if worth is None:
            return f"{copy}: computing on the host is sooner for any number of tokens"
        if worth <= 1:
            return f"{copy}: copying and computing on the device is sooner for any number of tokens"
        return (
            f"{copy}: computing on the host is sooner below {worth} tokens of an expert, copying "
            "and computing on the device from there on"
        )


def _copies(title: str, curve: Curve) -> list[str]:
    sizes = [num_bytes for num_bytes, _ in curve.points]
    return [
        _row(f"copy {title}", [format_bytes(int(size)) for size in sizes]),
        _row("  us", [f"{seconds * 1e6:.3g}" for _, seconds in curve.points]),
        _row("  GB/s", [f"{size / s / 1e9:.3g}" if s else "" for size, s in curve.points]),
        _row("  latency, us", [f"{curve(0) * 1e6:.3g}"]),
    ]


def _row(title: str, cells: Sequence[str]) -> str:
    return (f"{title:20}" + "".join(f"{cell:>11}" for cell in cells)).rstrip()


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
