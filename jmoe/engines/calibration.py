"""Measures what this machine can do, in a few seconds, with the very objects that engines use."""

import dataclasses
import datetime
import functools
import time
from collections.abc import Hashable

from jmoe.engines import probes
from jmoe.engines.expert_probes import ExpertsOnDevice, ExpertsOnHost, fetch, hand_over
from jmoe.engines.measuring import Clock, Rounds, num_needed
from jmoe.engines.probes import Arena, Run, Subject
from jmoe.planning import machine
from jmoe.planning.hardware import Curve, ExpertTimes, HardwareSpec
from jmoe.planning.machine import cache_bytes
from jmoe.planning.memory import device_memory, host_memory_bytes
from jmoe.residency.link import Link
from jmoe.store.host_memory import allocate

BUDGET_S = 4.0
EXPERTS_SHARE = 0.5  # of that, for the experts of one more model
EXPERTS_BUDGET_S = EXPERTS_SHARE * BUDGET_S
LINK_BUDGET_S = 0.5
CHECK_BUDGET_S = 0.15

# With more than that the machine is busy: measured again, and said so.
MAX_SPREAD = 0.25
# A cached number that is off by more than this factor is not of this machine, as it is now.
MAX_CHANGE = 1.5

_COPY_BYTES = (1 << 16, 1 << 20, 1 << 23, 1 << 26)
_SMALL_BYTES = 1 << 20
_BACK_BYTES = (1 << 12, 1 << 18, 1 << 24)
_NUM_DISPATCHES = 32

_BUSY = " on a busy machine: spread"

# What is measured, by name; with a size where there are several.
_READ_HOST, _READ_DEVICE = "read_host", "read_device"
_ROUND_TRIP, _DISPATCH = "round_trip", "dispatch"
_HAND_OVER, _FETCH = "hand_over", "fetch"
_TO_DEVICE, _TO_HOST, _HOST, _DEVICE = "to_device", "to_host", "host", "device"

# Tokens of an expert: first the ends, upwards, as each says what the next may take; then between.
_LEAST_ROWS = (1, 8)
_MORE_ROWS = (64, 16, 256, 4, 2)

# Of the quick check: an expert that takes longer is not looked at.
_MAX_CHECK_BYTES = 1 << 27
_MAX_CHECK_BLOBS = 32
_CHECK_S = 0.02
# As floats of any type 0.01, and so no denormal numbers, which are slow.
_CHECK_BYTE = 0x3C


def calibrate(
    subject: Subject,
    link: Link,
    *,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> HardwareSpec:
    """Measures a machine, and the experts of one model on it.

    Args:
      subject: the machine and the model.
      link: for blobs of this model, used by nobody else meanwhile.
      budget_s: about how long that may take. It decides for how many numbers of tokens experts
        are measured, and how often everything is repeated.
      clock: what time it is, in seconds.

    Returns:
      Medians. Real runs add up hundreds of such times on the same machine, with whatever else
      runs there; the best ones of a busy machine would promise what it does not keep.

    Raises:
      ConfigError: JAX has no CPU backend.
      CapacityError: there is no memory for two experts.
    """
    rounds = Rounds(budget_s, clock, lambda: probes.settle(subject))
    with (
        Arena(subject, min_bytes=max(_COPY_BYTES)) as arena,
        hand_over(subject, arena) as hand,
        fetch(subject) as fetch_one,
    ):
        rounds.add(_HAND_OVER, hand, in_rows=True)
        rounds.add(_FETCH, fetch_one, in_rows=True)
        read_bytes = _add_machine(rounds, subject, arena)
        _add_link(rounds, subject, arena, link)
        experts = _Experts(rounds, subject, arena)
        experts.add()
        _repeat(rounds, experts, budget_s)
    device = subject.device
    rates = {name: num_bytes / rounds.seconds(name) for name, num_bytes in read_bytes.items()}
    host_rate = rates[_READ_HOST]
    return HardwareSpec(
        name=machine.processor_name() + ("" if subject.is_cpu else f", {device.device_kind}"),
        platform=device.platform,
        device_kind=device.device_kind,
        num_cores=_num_threads(subject),
        host_bytes_per_s=host_rate,
        device_bytes_per_s=rates.get(_READ_DEVICE, host_rate),
        device_memory_bytes=device_memory(device).limit_bytes,
        host_memory_bytes=host_memory_bytes(),
        to_device=_curve(rounds, _TO_DEVICE),
        to_host=_curve(rounds, _TO_HOST),
        round_trip_s=rounds.seconds(_ROUND_TRIP),
        dispatch_s=rounds.seconds(_DISPATCH),
        hand_over_s=rounds.seconds(_HAND_OVER),
        fetch_s=rounds.seconds(_FETCH),
        experts=(_times(rounds, subject),),
        spread=rounds.spread,
        source=_source(f"measured {_now()}", rounds.spread),
        fingerprint=fingerprint(subject),
    )


def calibrate_experts(
    spec: HardwareSpec,
    subject: Subject,
    link: Link,
    *,
    budget_s: float = EXPERTS_BUDGET_S,
    clock: Clock = time.perf_counter,
) -> HardwareSpec:
    """Measures the experts of another model on a machine that is known.

    Returns:
      The machine with these experts, and with the time to copy one. Raises as ``calibrate``.
    """
    rounds = Rounds(budget_s, clock, lambda: probes.settle(subject))
    with Arena(subject) as arena:
        _add_copy(rounds, link, arena, subject.layout.num_bytes)
        experts = _Experts(rounds, subject, arena)
        experts.add()
        _repeat(rounds, experts, budget_s)
    copies = _curve(rounds, _TO_DEVICE).points
    spread = max(spec.spread, rounds.spread)
    spec = dataclasses.replace(
        spec,
        to_device=spec.to_device.with_points(copies),
        spread=spread,
        source=_source(spec.source.partition(_BUSY)[0], spread),
    )
    return spec.with_experts(_times(rounds, subject))


def calibrate_link(
    spec: HardwareSpec,
    subject: Subject,
    link: Link,
    *,
    budget_s: float = LINK_BUDGET_S,
    clock: Clock = time.perf_counter,
) -> HardwareSpec:
    """Measures another link on a machine that is known: a slower one, for experiments.

    Returns:
      The machine with this link. Raises as ``calibrate``.
    """
    rounds = Rounds(budget_s, clock, lambda: probes.settle(subject))
    with Arena(subject) as arena:
        _add_link(rounds, subject, arena, link)
        rounds.repeat()
    return dataclasses.replace(spec, to_device=_curve(rounds, _TO_DEVICE))


def changes(
    spec: HardwareSpec, subject: Subject, *, clock: Clock = time.perf_counter
) -> str | None:
    """Looks whether a machine still is as it was measured; in a quarter of a second.

    Returns:
      None, or what is off by more than MAX_CHANGE: a clause with both numbers.
    """
    layout = subject.layout
    memory = allocate(min(max(2 * cache_bytes(), layout.num_bytes), _MAX_CHECK_BYTES))
    memory[:] = _CHECK_BYTE
    rounds = Rounds(CHECK_BUDGET_S, clock, lambda: probes.settle(subject))
    run, num_bytes = probes.read_host(subject, memory)
    rounds.add(_READ_HOST, run)
    times = spec.experts_of(layout, activation_bits=subject.activation_bits, dtype=subject.dtype)
    if times is not None and times.host(1) <= _CHECK_S and layout.num_bytes <= memory.size:
        num_blobs = memory.size // layout.num_bytes
        blobs = memory[: num_blobs * layout.num_bytes].reshape(num_blobs, -1)
        # What is read in between drives the others out of the caches.
        host = ExpertsOnHost(subject, blobs[:_MAX_CHECK_BLOBS])
        _add_expert(rounds, (_HOST, 1), host.run(1), host.num_warm)
    rounds.repeat()
    now_s, best_s = rounds.seconds(_READ_HOST), rounds.best_s(_READ_HOST)
    before_s = num_bytes / spec.host_bytes_per_s
    if _differs(now_s, best_s, before_s):
        return (
            f"host memory is read at {num_bytes / now_s / 1e9:.1f} GB/s now, and was at "
            f"{spec.host_bytes_per_s / 1e9:.1f} GB/s"
        )
    if times is not None and (_HOST, 1) in rounds.names:
        now_s, best_s = rounds.seconds((_HOST, 1)), rounds.best_s((_HOST, 1))
        before_s = times.host(1)
        if _differs(now_s, best_s, before_s):
            return (
                f"the host takes {now_s * 1e3:.3g} ms for an expert now, and took "
                f"{before_s * 1e3:.3g} ms"
            )
    return None


def fingerprint(subject: Subject) -> str:
    """Of the machine that would be measured."""
    return machine.fingerprint(subject.device, _num_threads(subject))


def _num_threads(subject: Subject) -> int:
    threads = machine.num_threads()
    return min(threads, (subject.host and subject.host.num_threads) or threads)


def _add_machine(rounds: Rounds, subject: Subject, arena: Arena) -> dict[str, int]:
    """Everything but the link and experts; returns how many bytes are read of each memory."""
    device = subject.device
    rounds.add(_ROUND_TRIP, probes.round_trip(device), in_rows=True)
    rounds.add(_DISPATCH, probes.dispatch(device), num=_NUM_DISPATCHES)
    run, host_bytes = probes.read_host(subject, arena.memory)
    rounds.add(_READ_HOST, run)
    read_bytes = {_READ_HOST: host_bytes}
    if not subject.is_cpu:  # else it is the same memory
        run, read_bytes[_READ_DEVICE] = probes.read_device(subject, arena.memory)
        rounds.add(_READ_DEVICE, run)
    for num_bytes in _BACK_BYTES:
        run, prepare = probes.copy_to_host(device, num_bytes)
        rounds.add((_TO_HOST, num_bytes), run, prepare=prepare)
    return read_bytes


def _add_link(rounds: Rounds, subject: Subject, arena: Arena, link: Link) -> None:
    """Copies of several sizes, smallest first: as many as there is time for, but small ones."""
    sizes = {*_COPY_BYTES, subject.layout.num_bytes}
    per_byte_s = 0.0
    for num_bytes in sorted(size for size in sizes if size <= arena.memory.size):
        expected_s = 2 * per_byte_s * num_bytes  # each behind one that is not counted
        repeats = 1 + num_needed(expected_s)
        if num_bytes <= _SMALL_BYTES or rounds.affords(repeats * expected_s):
            per_byte_s = _add_copy(rounds, link, arena, num_bytes) / num_bytes


def _add_copy(rounds: Rounds, link: Link, arena: Arena, num_bytes: int) -> float:
    run = probes.copy_to_device(link, arena, num_bytes)
    # Into memory that was given up a moment ago, as in an engine. What was free for longer may
    # have to be fetched by the system, or by that of which it is a guest, page by page.
    warm = functools.partial(run, 1)
    return rounds.add((_TO_DEVICE, num_bytes), run, prepare=warm, in_rows=True)


def _add_expert(rounds: Rounds, name: Hashable, run: Run, num_warm: int, per: int = 1) -> float:
    # Others have driven out of the caches what a model would find there.
    warm = functools.partial(run, num_warm) if num_warm else None
    return rounds.add(name, run, prepare=warm, per=per, in_rows=True)


class _Experts:
    """Experts with several numbers of tokens."""

    def __init__(self, rounds: Rounds, subject: Subject, arena: Arena):
        self._rounds = rounds
        self._host = ExpertsOnHost(subject, arena.blobs)
        self._device = ExpertsOnDevice(subject, arena)
        self._both_s: dict[int, float] = {}  # by tokens
        self._prepare_s = 0.0

    def add(self) -> None:
        """Adds as many numbers of tokens as there is time for, but two; more if called again."""
        for rows in (*_LEAST_ROWS, *_MORE_ROWS):
            if rows not in self._both_s and (rows in _LEAST_ROWS or self._affords(rows)):
                self._add(rows)

    def _affords(self, rows: int) -> bool:
        expected_s = Curve(points=tuple(sorted(self._both_s.items())))(rows)
        repeats = 1 + num_needed(expected_s / 2)
        return self._rounds.affords(self._prepare_s + repeats * expected_s)

    def _add(self, rows: int) -> None:
        rounds = self._rounds
        start_s = rounds.now_s()
        host, (device, num_experts) = self._host.run(rows), self._device.run(rows)
        self._prepare_s = rounds.now_s() - start_s  # mostly compiling
        num_warm = self._host.num_warm
        self._both_s[rows] = _add_expert(rounds, (_HOST, rows), host, num_warm)
        num_warm = -(-self._device.num_warm // num_experts)
        self._both_s[rows] += num_experts * _add_expert(
            rounds, (_DEVICE, rows), device, num_warm, num_experts
        )


def _repeat(rounds: Rounds, experts: _Experts, budget_s: float) -> None:
    """Repeats everything, on a busy machine once more."""
    rounds.repeat()
    if rounds.spread > MAX_SPREAD:
        rounds.extend(budget_s)
        experts.add()
        rounds.repeat()


def _source(measured: str, spread: float) -> str:
    return measured + (f"{_BUSY} {spread:.0%}" if spread > MAX_SPREAD else "")


def _curve(rounds: Rounds, what: str) -> Curve:
    sizes = sorted(name[1] for name in rounds.names if isinstance(name, tuple) and name[0] == what)
    return Curve.rising([(size, rounds.seconds((what, size))) for size in sizes])


def _times(rounds: Rounds, subject: Subject) -> ExpertTimes:
    return ExpertTimes.of(
        subject.layout,
        activation_bits=subject.activation_bits,
        dtype=subject.dtype,
        host=_curve(rounds, _HOST),
        device=_curve(rounds, _DEVICE),
    )


def _differs(median_s: float, best_s: float, before_s: float) -> bool:
    """Whether even the best of some repetitions is slower, or most of them are faster."""
    return best_s > before_s * MAX_CHANGE or median_s < before_s / MAX_CHANGE


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
