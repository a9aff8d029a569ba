"""What a machine can do, in numbers: the speed of its link, of its memories, and of experts.

Pure data: engines/calibration.py measures it, planning/hardware_files.py keeps it, and presets of
other machines are written by hand (configs/hardware).
"""

import bisect
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, Self

from jmoe.errors import ConfigError
from jmoe.quant.formats import DenseFormat, Format, parse_format
from jmoe.quant.layout import ExpertLayout

VERSION = 2
# Beyond so many tokens of an expert nobody asks where to compute it.
MAX_TOKENS = 1 << 16
# No number of a machine is larger.
_MAX = 1e30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds over a size, from measured points.

    Between points linear. Above the last one by the slope of the last two, below the first one by
    that of the first two; but there no size takes less than a smaller one, and none less than
    nothing. One point alone is a constant. The value at 0 is the latency.

    Attributes:
      points: (size, seconds) by ascending size, at least one (ConfigError).
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        fits = bool(self.points) and all(
            len(point) == 2 and _is_number(point[0]) and _is_number(point[1])
            for point in self.points
        )
        if fits:
            fits = all(a < b for (a, _), (b, _) in itertools.pairwise(self.points))
        expected = "[[size, seconds], ...] by ascending size, none of them negative"
        _require(fits, "curve", self.points, expected)

    @classmethod
    def rising(cls, points: Sequence[tuple[float, float]]) -> Self:
        """A curve of measured points that never falls: neighbours that do share their mean.

        More tokens or bytes take no less time, but their measurements vary. The mean is the
        geometric one; by ascending size, all above 0 (pool adjacent violators).
        """
        pools: list[list[float]] = []  # of neighbours
        for _, seconds in points:
            pools.append([seconds])
            while len(pools) > 1 and _mean(pools[-1]) < _mean(pools[-2]):
                last = pools.pop()
                pools[-1] += last
        means = [mean for pool in pools for mean in [_mean(pool)] * len(pool)]
        return cls(points=tuple((x, y) for (x, _), y in zip(points, means, strict=True)))

    def __call__(self, size: float) -> float:
        points = self.points
        if len(points) == 1:
            return points[0][1]
        i = bisect.bisect_left(points, size, 1, len(points) - 1, key=lambda point: point[0])
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        slope = (y1 - y0) / (x1 - x0)
        if size < x0:
            return y0 - min(max(slope, 0.0), y0 / x0) * (x0 - max(size, 0.0))
        if size > x1:
            return y1 + max(slope, 0.0) * (size - x1)
        return y0 + (y1 - y0) * ((size - x0) / (x1 - x0))

    def with_points(self, points: Sequence[tuple[float, float]]) -> Self:
        """The same curve with other points, which replace those of equal size."""
        return dataclasses.replace(
            self, points=tuple(sorted((dict(self.points) | dict(points)).items()))
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTimes:
    """Seconds that experts of one shape and format take, by tokens of each expert.

    Attributes:
      formats: of w1, w3 and w2, with commas; one if all are equal (``formats_text``).
      hidden_size: of the model.
      intermediate_size: width of the expert.
      activation_bits: of the host kernels; 0 where they are not in use or have no such choice.
      dtype: of activations.
      host: one expert computed on the host, out of host memory and not from a processor cache:
        one call, from dispatching it to its result.
      device: one expert on the device, among others in programs of the offload engine.
    """

    formats: str
    hidden_size: int
    intermediate_size: int
    activation_bits: int
    dtype: str
    host: Curve
    device: Curve

    def __post_init__(self):
        _ = self.layout  # which raises
        fits = _is_count(self.activation_bits)
        _require(fits, "activation_bits", self.activation_bits, "a whole number from 0")
        known = ("float32", "bfloat16")
        _require(self.dtype in known, "dtype", self.dtype, " or ".join(known))

    @classmethod
    def of(
        cls,
        layout: ExpertLayout,
        *,
        activation_bits: int,
        dtype: str,
        host: Curve,
        device: Curve,
    ) -> Self:
        """Times of experts of a layout."""
        formats, hidden_size, intermediate_size, bits, dtype = _key(layout, activation_bits, dtype)
        return cls(
            formats=formats,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation_bits=bits,
            dtype=dtype,
            host=host,
            device=device,
        )

    @property
    def layout(self) -> ExpertLayout:
        """Of the experts (ConfigError)."""
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            _require(_is_count(value) and value > 0, name, value, "a whole number from 1")
        _require(isinstance(self.formats, str), "formats", self.formats, "such as 4g64")
        names = self.formats.split(",")
        formats = tuple(map(parse_format, names if len(names) > 1 else names * 3))
        _require(len(formats) == 3, "formats", self.formats, "one format, or three")
        layout = ExpertLayout(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            formats=formats,  # type: ignore[arg-type]
        )
        _ = layout.num_bytes  # which raises
        return layout

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """What experts these times are of."""
        return (
            self.formats,
            self.hidden_size,
            self.intermediate_size,
            self.activation_bits,
            self.dtype,
        )

    def tokens_worth_copying(self, copy_s: float) -> int | None:
        """From how many tokens on the host is no sooner than a copy and the device.

        That is s* of Fiddler (arXiv 2402.07033, section 3.2): the host computes an expert with
        fewer tokens.

        Returns:
          The least such number; None if the host is always sooner.
        """
        sizes = {0, *(int(x) for x, _ in (*self.host.points, *self.device.points)), MAX_TOKENS}

        def is_worth(num_tokens: int) -> bool:
            return self.host(num_tokens) >= copy_s + self.device(num_tokens)

        # Between those sizes the curves are straight, and so is what they differ by.
        for low, high in itertools.pairwise(sorted(sizes)):
            if is_worth(high):
                return low + 1 + bisect.bisect(range(low + 1, high), False, key=is_worth)
        return None

    def scaled_to(self, layout: ExpertLayout, activation_bits: int, dtype: str) -> "ExpertTimes":
        """An estimate for experts of another shape: one token by bytes, more tokens by weights."""
        own = self.layout
        by_bytes = layout.num_bytes / own.num_bytes
        by_weights = (layout.hidden_size * layout.intermediate_size) / (
            own.hidden_size * own.intermediate_size
        )

        def scale(curve: Curve) -> Curve:
            first = curve.points[0][1]
            return Curve(
                points=tuple(
                    (size, max(0.0, first * by_bytes + (seconds - first) * by_weights))
                    for size, seconds in curve.points
                )
            )

        return self.of(
            layout,
            activation_bits=activation_bits,
            dtype=dtype,
            host=scale(self.host),
            device=scale(self.device),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """One machine: a host, a device, and the link between them.

    Attributes:
      name: for people.
      platform: "cpu", "gpu" or "tpu".
      device_kind: what the backend calls the device.
      num_cores: threads that the host computes with.
      host_bytes_per_s: reading host memory, all threads.
      device_bytes_per_s: reading device memory.
      device_memory_bytes: that programs may use; None where that is the host's memory.
      host_memory_bytes: of the machine, or of the container.
      to_device: seconds of one copy by bytes, host to device, by the engines' own link.
      to_host: likewise back.
      round_trip_s: dispatching a small program and reading a tiny result back.
      dispatch_s: host time for one more dispatched program.
      hand_over_s: handing a token to the thread that computes experts on the host, and getting a
        result back to the device.
      fetch_s: what an engine's loop over layers and the thread that copies do for one expert,
        without the copy.
      experts: by shape and format, each once.
      spread: of repeated measurements: the distance of the quartiles as a share of the median, and
        of that the median over everything that was measured.
      source: "measured ...", or where each number comes from.
      fingerprint: what it was measured on (``machine.fingerprint``); empty for presets.

    Raises ConfigError for numbers that no machine has.
    """

    name: str
    platform: str
    device_kind: str
    num_cores: int
    host_bytes_per_s: float
    device_bytes_per_s: float
    device_memory_bytes: int | None
    host_memory_bytes: int
    to_device: Curve
    to_host: Curve
    round_trip_s: float
    dispatch_s: float
    hand_over_s: float = 0.0
    fetch_s: float = 0.0
    experts: tuple[ExpertTimes, ...]
    spread: float
    source: str
    fingerprint: str

    def __post_init__(self):
        for name in ("name", "platform", "device_kind", "source", "fingerprint"):
            value = getattr(self, name)
            _require(isinstance(value, str), name, value, "a text")
        for name in ("num_cores", "host_memory_bytes", "device_memory_bytes"):
            value = getattr(self, name)
            if name == "device_memory_bytes" and value is None:
                continue
            _require(_is_count(value) and value > 0, name, value, "a whole number from 1")
        for name in ("host_bytes_per_s", "device_bytes_per_s"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "more than 0")
        for name in ("round_trip_s", "dispatch_s", "hand_over_s", "fetch_s", "spread"):
            value = getattr(self, name)
            _require(_is_number(value), name, value, "0 or more")

    def experts_of(
        self, layout: ExpertLayout, *, activation_bits: int, dtype: str
    ) -> ExpertTimes | None:
        """The times of experts of exactly this shape and format; None if there are none.

        Args:
          layout: of an expert.
          activation_bits: of host kernels; does not count for weights in float types.
          dtype: of activations.
        """
        wanted = _key(layout, activation_bits, dtype)
        return next((times for times in self.experts if times.key == wanted), None)

    def estimate_experts(
        self, layout: ExpertLayout, *, activation_bits: int, dtype: str
    ) -> ExpertTimes:
        """The times of such experts, or those of the most similar ones scaled by size.

        Raises:
          ConfigError: there are no times of experts at all.
        """
        exact = self.experts_of(layout, activation_bits=activation_bits, dtype=dtype)
        if exact is not None:
            return exact
        if not self.experts:
            raise ConfigError(
                "the hardware has no times of experts",
                got=self.name,
                do="use a calibration or a preset that has some",
            )
        wanted = _key(layout, activation_bits, dtype)

        def difference(times: ExpertTimes) -> tuple[int, float]:
            others = sum(a != b for a, b in zip(times.key, wanted, strict=True))
            is_other_format = times.formats != wanted[0]
            return len(wanted) * is_other_format + others, abs(
                math.log(times.layout.num_bytes / layout.num_bytes)
            )

        nearest = min(self.experts, key=difference)
        return nearest.scaled_to(layout, activation_bits, dtype)

    def with_experts(self, times: ExpertTimes) -> Self:
        """The same machine, with these times in place of those for the same experts, if any."""
        others = [other for other in self.experts if other.key != times.key]
        return dataclasses.replace(self, experts=(*others, times))

    def to_json(self) -> dict[str, Any]:
        """The contents of a hardware file."""
        return {"version": VERSION, **_fields_json(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of ``to_json``.

        Raises:
          ConfigError: another version; a field is missing, unknown, or of no machine.
        """
        version = value.get("version")
        if type(version) is not int or version != VERSION:
            raise ConfigError(
                "the hardware file is of another version",
                got="none" if version is None else json.dumps(version),
                expected=f'"version": {VERSION}',
            )
        fields = {name: item for name, item in value.items() if name != "version"}
        _check_names(cls, fields)
        experts = fields["experts"]
        _require(isinstance(experts, list), "experts", experts, "a list")
        for name in ("to_device", "to_host"):
            fields[name] = _curve(fields[name])
        fields["experts"] = tuple(map(_experts, experts))
        return cls(**fields)


def formats_text(formats: Sequence[Format]) -> str:
    """Formats of w1, w3 and w2: one if all are equal."""
    names = [str(fmt) for fmt in formats]
    return names[0] if len(set(names)) == 1 else ",".join(names)


def _key(layout: ExpertLayout, activation_bits: int, dtype: str) -> tuple[str, int, int, int, str]:
    is_dense = isinstance(layout.formats[0], DenseFormat)
    return (
        formats_text(layout.formats),
        layout.hidden_size,
        layout.intermediate_size,
        0 if is_dense else activation_bits,
        dtype,
    )


def _mean(seconds: Sequence[float]) -> float:
    """Geometric; of a single one exactly."""
    return seconds[0] if len(seconds) == 1 else statistics.geometric_mean(seconds)


def _fields_json(value: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return [list(point) for point in value.points]
    if isinstance(value, tuple):
        return [_fields_json(item) for item in value]
    return value


def _curve(value: Any) -> Curve:
    fits = isinstance(value, list) and all(isinstance(point, list) for point in value)
    _require(fits, "curve", value, "[[size, seconds], ...]")
    return Curve(points=tuple(map(tuple, value)))


def _experts(value: Any) -> ExpertTimes:
    _require(isinstance(value, dict), "experts", value, "a list of objects")
    _check_names(ExpertTimes, value)
    return ExpertTimes(**value | {name: _curve(value[name]) for name in ("host", "device")})


def _check_names(kind: type, value: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [name for name in names if name not in value]:
        raise ConfigError("the hardware file lacks a field", got=", ".join(missing))
    if unknown := [name for name in value if name not in names]:
        raise ConfigError(
            "a hardware file has no such field", got=repr(unknown[0]), expected=", ".join(names)
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < _MAX  # type: ignore[operator]


def _require(is_right: bool, name: str, got: object, expected: str) -> None:
    if not is_right:
        raise ConfigError(
            f"the hardware's {name} is not usable",
            got=json.dumps(got, default=repr)[:200],
            expected=expected,
        )
