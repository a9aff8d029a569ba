"""Says what this machine can do with the experts of a model, as measured at the first start.

The link by size, both memories, an expert on the host and on the device by its tokens, and where
to compute it: what plans and engines decide by. Measured in a few seconds and kept, in a directory
that JMOE_CACHE_DIR names. Text goes to stdout, or JSON, which --hardware reads again;
--hardware=list names the presets of other machines.

Examples:
  python scripts/hardware.py
  python scripts/hardware.py --model=mixtral-8x7b --quant=int4
  python scripts/hardware.py --model=mixtral-8x7b --quant=int4 --link_gb_per_s=4
  python scripts/hardware.py --model=mixtral-8x7b --quant=bf16 --hardware=rtx6000-xeon6126
  python scripts/hardware.py --recalibrate --output=json > machine.json
"""

import _common
import _model_flags
from absl import flags

_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")


def main() -> None:
    _model_flags.limit_threads()
    from _hardware.report import Report

    from jmoe.errors import RequestError
    from jmoe.loading import LoadOptions, find_model
    from jmoe.loading.hardware import find_hardware, subject_of
    from jmoe.planning.hardware_files import load_preset, preset_names
    from jmoe.store.known_models import is_known_model

    named = _model_flags.HARDWARE.value
    if named == "list":
        presets = {name: load_preset(name).name for name in preset_names()}
        if _OUTPUT.value == "json":
            _common.print_json(presets)
        else:
            print("\n".join(f"{name:24}{what}" for name, what in presets.items()))
        return
    if named is not None and _model_flags.RECALIBRATE.value:
        raise RequestError(
            "what is named is not measured",
            got=f"--hardware={named} and --recalibrate",
            do="leave one of them out",
        )
    arguments = _model_flags.arguments()
    model = _model_flags.MODEL.value
    # A shape is enough: no weights are read.
    arguments["random_weights"] |= is_known_model(model)
    setup = find_model(model, LoadOptions(**arguments, check_memory=False)).setup
    subject = subject_of(setup)
    is_held = setup.options.link_gb_per_s is not None
    with _common.status("measuring this machine ..."):
        found = find_hardware(
            subject,
            setup.make_link(subject.quant) if is_held else None,
            named=named,
            recalibrate=_model_flags.RECALIBRATE.value,
        )
    for note in found.notes:
        _common.note(note)
    report = Report(found, subject)
    if _OUTPUT.value == "json":
        _common.print_json(report.to_json())
    else:
        print(report)


if __name__ == "__main__":
    _common.run(main)
