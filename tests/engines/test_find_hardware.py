"""Where a machine's numbers come from: named, kept, measured again, or for the first time."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jmoe.engines import calibration
from jmoe.engines.calibration import fingerprint
from jmoe.errors import ConfigError
from jmoe.loading import LoadOptions, find_model
from jmoe.loading.hardware import find_hardware, subject_of
from jmoe.planning import hardware_files
from jmoe.planning.hardware import ExpertTimes, HardwareSpec
from jmoe.planning.hardware_files import cache_path, load_cached
from jmoe.residency.link import ThrottledLink
from tests.engines.calibrated import make_subject, own_link
from tests.engines.clocks import FakeClock
from tests.planning.hardware import small_experts, small_spec


class Measured:
    """In place of calibration: numbers of no time, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[str] = []
        self.change: str | None = None
        for name in ("calibrate", "calibrate_experts", "changes"):
            monkeypatch.setattr(calibration, name, getattr(self, f"_{name}"))

    def _calibrate(self, subject, link, **_: Any) -> HardwareSpec:
        self.asked.append("all")
        spec = small_spec(fingerprint=fingerprint(subject), experts=())
        return spec.with_experts(self._experts(subject))

    def _calibrate_experts(self, spec, subject, link, **_: Any) -> HardwareSpec:
        self.asked.append("experts")
        return spec.with_experts(self._experts(subject))

    def _changes(self, spec, subject, **_: Any) -> str | None:
        self.asked.append("check")
        return self.change

    def _experts(self, subject) -> ExpertTimes:
        any_times = small_experts()
        return ExpertTimes.of(
            subject.layout,
            activation_bits=subject.activation_bits,
            dtype=subject.dtype,
            host=any_times.host,
            device=any_times.device,
        )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


def test_a_machine_is_measured_once_and_looked_at_afterwards(measured, tmp_path: Path):
    first = find_hardware(make_subject(), directory=tmp_path)
    assert measured.asked == ["all"]
    assert first.path == cache_path(fingerprint(make_subject()), tmp_path)
    assert first.notes[0].startswith("hardware: measured by hand, in ")
    again = find_hardware(make_subject(), directory=tmp_path)
    assert measured.asked == ["all", "check"]
    assert again == (first.spec, (), first.path)


def test_other_experts_are_added_to_what_is_kept(measured, tmp_path: Path):
    find_hardware(make_subject(), directory=tmp_path)
    found = find_hardware(make_subject("int4"), directory=tmp_path)
    assert measured.asked == ["all", "check", "experts"]
    assert [times.formats for times in found.spec.experts] == ["f32", "4g64"]
    assert load_cached(found.spec.fingerprint, tmp_path) == (found.spec, None)


def test_a_machine_that_changed_is_measured_again_with_a_note(measured, tmp_path: Path):
    find_hardware(make_subject(), directory=tmp_path)
    measured.change = "it is at 2 now, and was at 1"
    found = find_hardware(make_subject(), directory=tmp_path)
    assert measured.asked == ["all", "check", "all"]
    assert found.notes[0] == "measured this machine again: it is at 2 now, and was at 1"


def test_recalibrating_measures_in_any_case(measured, tmp_path: Path):
    for _ in range(2):
        find_hardware(make_subject(), directory=tmp_path, recalibrate=True)
    assert measured.asked == ["all", "all"]


def test_a_damaged_file_is_replaced_with_a_note(measured, tmp_path: Path):
    path = cache_path(fingerprint(make_subject()), tmp_path)
    path.write_text('{"version": 1')
    found = find_hardware(make_subject(), directory=tmp_path)
    assert measured.asked == ["all"] and "ignored" in found.notes[0]
    assert load_cached(found.spec.fingerprint, tmp_path) == (found.spec, None)


def test_where_nothing_can_be_kept_it_goes_on(measured, tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = find_hardware(make_subject(), directory=tmp_path / "file")
    assert found.path is None and "calibration not kept" in found.notes[-1]


def test_a_throttled_link_is_measured_and_not_kept(measured, tmp_path: Path):
    subject, clock = make_subject(), FakeClock(1e-7)
    link = ThrottledLink(own_link(subject), 1e9, clock=clock, wait=clock.wait)
    found = find_hardware(subject, link, directory=tmp_path, clock=clock)
    assert found.spec.to_device(1e9) == pytest.approx(1.0, rel=0.01)
    kept, _ = load_cached(found.spec.fingerprint, tmp_path)
    assert kept == dataclasses.replace(found.spec, to_device=small_spec().to_device)


def test_what_is_named_is_not_measured(measured, tmp_path: Path):
    found = find_hardware(make_subject(), named="rtx4090-ddr5", directory=tmp_path)
    assert found.spec == hardware_files.load_preset("rtx4090-ddr5") and found.path is None
    path = tmp_path / "file.json"
    path.write_text(hardware_files.to_text(small_spec(fingerprint=fingerprint(make_subject()))))
    assert find_hardware(make_subject(), named=str(path)).spec.name == "a machine"
    path.write_text(hardware_files.to_text(small_spec()))
    with pytest.raises(ConfigError, match="another machine"):
        find_hardware(make_subject(), named=str(path))
    assert measured.asked == []


def test_other_threads_are_another_machine():
    subject = make_subject()
    if subject.host is None:
        pytest.skip("no host kernels")
    one = dataclasses.replace(subject, host=dataclasses.replace(subject.host, num_threads=1))
    assert fingerprint(one) != fingerprint(subject) or "1 of 1" in fingerprint(subject)


def test_a_model_is_calibrated_for_as_it_will_run():
    options: dict[str, Any] = {"random_weights": True, "num_layers": 1, "check_memory": False}
    setup = find_model("mixtral-8x7b", LoadOptions(quant="int4", **options)).setup
    subject = subject_of(setup)
    assert subject.layout.formats == setup.quant.experts_formats  # type: ignore[union-attr]
    plain = subject_of(find_model(None, LoadOptions(dtype="bfloat16", host_kernels=False)).setup)
    assert str(plain.quant) == "bf16" and plain.host is None and plain.dtype == "bfloat16"
