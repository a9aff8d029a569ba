"""What this machine can do: as the user says, as it was measured before, or measured now."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jmoe.engines import calibration
from jmoe.engines.measuring import Clock
from jmoe.engines.probes import Subject
from jmoe.native import library
from jmoe.planning import hardware_files
from jmoe.planning.hardware import HardwareSpec
from jmoe.quant.spec import PRESETS
from jmoe.residency.link import DeviceLink, Link

if TYPE_CHECKING:
    from jmoe.loading.building import Setup


class FoundHardware(NamedTuple):
    """A machine, and how it became known.

    Attributes:
      spec: the machine.
      notes: what was decided on the way, a sentence each.
      path: where the measurement is kept; None if it is not, or was not measured here.
    """

    spec: HardwareSpec
    notes: tuple[str, ...]
    path: Path | None


def subject_of(setup: "Setup") -> Subject:
    """What is calibrated for a model that will run like this."""
    options, quant = setup.options, setup.quant
    if quant is None:  # experts are blobs when they are offloaded
        quant = PRESETS["f32" if setup.dtype == "float32" else "bf16"]
    has_kernels = options.host_kernels and library.status().available
    return Subject(
        device=setup.device,
        config=setup.config,
        dtype=setup.dtype,
        quant=quant,
        host=options.kernel_options if has_kernels else None,
    )


def find_hardware(
    subject: Subject,
    link: Link | None = None,
    *,
    named: str | None = None,
    recalibrate: bool = False,
    directory: Path | None = None,
    budget_s: float = calibration.BUDGET_S,
    clock: Clock = time.perf_counter,
) -> FoundHardware:
    """What a machine can do with the experts of a model.

    At the first start it is measured, in a few seconds, and kept. Later ones look whether it still
    is so, and measure it again if it is not. Experts of a shape that was not met before are added.

    Args:
      subject: the machine and the model.
      link: that copies experts, if not the device's own: it is measured at every start, and not
        kept. Nobody else may use it meanwhile.
      named: a preset, or a hardware file, instead of measuring.
      recalibrate: measure in any case.
      directory: where measurements are kept; None is ``hardware_files.cache_directory()``.
      budget_s: about how long measuring may take.
      clock: what time it is, in seconds.

    Raises:
      ConfigError: what is named is not there, not usable, or of another machine; JAX has no CPU
        backend.
      CapacityError: there is no memory for two experts.
    """
    fingerprint = calibration.fingerprint(subject)
    if named is not None:
        spec = hardware_files.read_named(named, fingerprint)
        if link is not None:
            spec = calibration.calibrate_link(spec, subject, link, clock=clock)
        return FoundHardware(spec, (f"hardware: {spec.name}",), None)
    own = DeviceLink(subject.device, subject.layout.dtype)
    directory = directory or hardware_files.cache_directory()
    notes: list[str] = []
    kept = None if recalibrate else _kept(fingerprint, subject, directory, clock, notes)
    start_s = clock()
    if kept is None:
        spec = calibration.calibrate(subject, own, budget_s=budget_s, clock=clock)
        notes.append(f"hardware: {spec.source}, in {clock() - start_s:.1f} s")
    elif _lacks(kept, subject):
        budget_s *= calibration.EXPERTS_SHARE
        spec = calibration.calibrate_experts(kept, subject, own, budget_s=budget_s, clock=clock)
        notes.append(f"hardware: {spec.source}; these experts now, in {clock() - start_s:.1f} s")
    else:
        spec = kept
    path: Path | None = hardware_files.cache_path(fingerprint, directory)
    if spec is not kept and (problem := hardware_files.save_cached(spec, directory)) is not None:
        notes.append(problem)
        path = None
    if link is not None:
        spec = calibration.calibrate_link(spec, subject, link, clock=clock)
    return FoundHardware(spec, tuple(notes), path)


def _kept(
    fingerprint: str, subject: Subject, directory: Path, clock: Clock, notes: list[str]
) -> HardwareSpec | None:
    """What was measured before, if it still is so; else it says why not."""
    spec, problem = hardware_files.load_cached(fingerprint, directory)
    if problem is not None:
        notes.append(problem)
    if spec is None:
        return None
    change = calibration.changes(spec, subject, clock=clock)
    if change is not None:
        notes.append(f"measured this machine again: {change}")
        return None
    return spec


def _lacks(spec: HardwareSpec, subject: Subject) -> bool:
    times = spec.experts_of(
        subject.layout, activation_bits=subject.activation_bits, dtype=subject.dtype
    )
    return times is None
