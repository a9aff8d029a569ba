"""Calibration: every number is there and possible, and links, noise and changes are noticed."""

import dataclasses
import math

import pytest

from jmoe.engines import calibration, measuring
from jmoe.engines.calibration import (
    MAX_CHANGE,
    calibrate,
    calibrate_experts,
    calibrate_link,
    changes,
    fingerprint,
)
from jmoe.planning.hardware import Curve, ExpertTimes, HardwareSpec
from jmoe.planning.machine import cache_bytes
from jmoe.residency.link import ThrottledLink
from tests.engines.calibrated import make_subject, own_link
from tests.engines.clocks import FakeClock, NoisyClock


@pytest.fixture(scope="module")
def spec() -> HardwareSpec:
    """This machine, in as little time as can be."""
    subject = make_subject()
    return calibrate(subject, own_link(subject), budget_s=0.0)


def times_of(spec: HardwareSpec, quant: str = "f32") -> ExpertTimes:
    subject = make_subject(quant)
    times = spec.experts_of(
        subject.layout, activation_bits=subject.activation_bits, dtype=subject.dtype
    )
    assert times is not None
    return times


def test_every_number_is_measured_however_little_time_there_is(spec):
    for number in (
        spec.host_bytes_per_s,
        spec.device_bytes_per_s,
        spec.round_trip_s,
        spec.dispatch_s,
        spec.hand_over_s,
        spec.fetch_s,
    ):
        assert 0 < number < math.inf
    assert 0 <= spec.spread < math.inf
    times = times_of(spec)
    for curve in (spec.to_device, spec.to_host, times.host, times.device):
        assert len(curve.points) >= 2
        assert all(0 < seconds < math.inf for _, seconds in curve.points)
    assert times.host.points[0][0] == times.device.points[0][0] == 1
    assert spec.platform == "cpu" and spec.device_memory_bytes is None
    assert spec.device_bytes_per_s == spec.host_bytes_per_s  # the same memory
    assert spec.source.startswith("measured ")
    assert spec.fingerprint == fingerprint(make_subject())


def test_a_measured_machine_is_read_as_it_was_written(spec):
    assert HardwareSpec.from_json(spec.to_json()) == spec


def test_with_time_there_are_more_sizes_and_numbers_of_tokens(monkeypatch):
    monkeypatch.setattr(measuring, "MAX_SAMPLES", measuring.MIN_SAMPLES)
    subject = make_subject()
    found = calibrate(subject, own_link(subject), budget_s=60.0, clock=FakeClock(1e-3))
    sizes = [size for size, _ in found.to_device.points]
    assert subject.layout.num_bytes in sizes and max(sizes) == 64 << 20
    assert [n for n, _ in times_of(found).host.points] == [1, 2, 4, 8, 16, 64, 256]
    assert [n for n, _ in times_of(found).device.points] == [1, 2, 4, 8, 16, 64, 256]
    assert found.spread < 1e-9 and "busy" not in found.source


def test_without_host_kernels_xla_is_measured():
    subject = make_subject("f32", kernels=False)
    found = calibrate(subject, own_link(subject), budget_s=0.0)
    (times,) = found.experts
    assert times.activation_bits == 0 and times.host(1) > 0 and times.device(1) > 0


def test_a_throttled_link_is_seen_as_throttled(spec):
    subject, clock = make_subject(), FakeClock(1e-7)
    link = ThrottledLink(own_link(subject), 1e9, 5e-3, clock=clock, wait=clock.wait)
    held = calibrate_link(spec, subject, link, budget_s=10.0, clock=clock)
    assert held.to_device(1e6) == pytest.approx(6e-3, rel=0.01)
    assert held.to_device(1e9) == pytest.approx(1.005, rel=0.01)
    assert held.to_device(0) == pytest.approx(5e-3, rel=0.01)
    assert dataclasses.replace(held, to_device=spec.to_device) == spec


def test_a_link_too_slow_to_measure_large_copies_is_known_from_small_ones(spec):
    subject, clock = make_subject(), FakeClock(1e-7)
    link = ThrottledLink(own_link(subject), 1e7, clock=clock, wait=clock.wait)
    held = calibrate_link(spec, subject, link, budget_s=0.5, clock=clock)
    assert held.to_device(1e9) == pytest.approx(100, rel=0.01)
    assert clock.now_s < 5


def test_a_busy_machine_is_measured_again_and_said_to_be_busy():
    subject = make_subject()
    quiet, noisy = FakeClock(), NoisyClock()
    calibrate(subject, own_link(subject), budget_s=0.01, clock=quiet)
    found = calibrate(subject, own_link(subject), budget_s=0.01, clock=noisy)
    assert found.spread > calibration.MAX_SPREAD
    assert f"on a busy machine: spread {found.spread:.0%}" in found.source
    assert noisy.now_s > 1.5 * quiet.now_s


def test_experts_of_another_model_are_added(spec):
    subject = make_subject("int4")
    both = calibrate_experts(spec, subject, own_link(subject), budget_s=0.0)
    assert times_of(both) == times_of(spec)
    assert times_of(both, "int4").formats == "4g64"
    sizes = [size for size, _ in both.to_device.points]
    assert subject.layout.num_bytes in sizes and len(sizes) > len(spec.to_device.points)
    assert both.host_bytes_per_s == spec.host_bytes_per_s


def test_a_busy_machine_is_said_to_be_so_once(spec):
    subject = make_subject("int4")
    busy = dataclasses.replace(spec, spread=9.0, source="measured on a busy machine: spread 900%")
    again = calibrate_experts(busy, subject, own_link(subject), budget_s=0.0, clock=NoisyClock())
    assert again.source == busy.source and again.spread == 9.0


def as_measured_by(clock: FakeClock, spec: HardwareSpec) -> HardwareSpec:
    """What the quick check finds if everything takes as long as a look at the clock."""
    tick_s = clock.tick_s
    num_bytes = max(2 * cache_bytes(), make_subject().layout.num_bytes)
    rate = min(num_bytes, calibration._MAX_CHECK_BYTES) / tick_s
    row = min(measuring.MAX_ROW, int(measuring.ROW_S / tick_s))
    times = dataclasses.replace(times_of(spec), host=Curve(points=((1, tick_s / row),)))
    return dataclasses.replace(spec, host_bytes_per_s=rate, experts=(times,))


def test_a_machine_that_is_as_it_was_passes_the_quick_check(spec):
    known = as_measured_by(FakeClock(), spec)
    assert changes(known, make_subject(), clock=FakeClock()) is None
    # Of experts that were not measured only the memory is looked at.
    assert changes(known, make_subject("int4"), clock=FakeClock()) is None


@pytest.mark.parametrize("factor", [1.1 * MAX_CHANGE, 0.9 / MAX_CHANGE])
def test_a_machine_that_changed_does_not(factor, spec):
    known, subject = as_measured_by(FakeClock(), spec), make_subject()
    rate = known.host_bytes_per_s
    other = dataclasses.replace(known, host_bytes_per_s=rate * factor)
    said = changes(other, subject, clock=FakeClock())
    assert said is not None
    assert f"{rate / 1e9:.1f} GB/s now" in said and f"was at {rate * factor / 1e9:.1f}" in said

    ((_, seconds),) = known.experts[0].host.points
    slower = dataclasses.replace(known.experts[0], host=Curve(points=((1, seconds * factor),)))
    said = changes(dataclasses.replace(known, experts=(slower,)), subject, clock=FakeClock())
    assert said is not None
    assert f"{seconds * 1e3:.3g} ms for an expert now" in said
    assert f"took {seconds * factor * 1e3:.3g} ms" in said
