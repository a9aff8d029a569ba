"""Reports what this machine offers jmoe, and verifies a model without running it.

Examples:
  python scripts/check.py
  python scripts/check.py --model=path/to/Mixtral-8x7B-v0.1
  python scripts/check.py --model=jmoe/data/tiny-mixtral --deep
  python scripts/check.py --model=path/to/converted/store --deep
  python scripts/check.py --model=path/to/model --output=json | jq .model

A model is a directory in Hugging Face format, or a store that convert.py wrote. Without --deep only
headers are read, which takes a moment, whatever the size of the model. With it all of it is read
once: weights are searched for NaN and infinity, files of a store are compared with their hashes.
Exit status 2: not usable, and why.
"""

import dataclasses
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import _common
import _machine
from absl import flags

if TYPE_CHECKING:
    from jmoe.store.verify import CheckpointReport
    from jmoe.store.verify_store import StoreReport

_MODEL = flags.DEFINE_string(
    "model", None, "Directory, store or hub id to verify; none by default."
)
_DEEP = flags.DEFINE_bool(
    "deep", False, "Also read everything: search for NaN and infinity, or verify a store's hashes."
)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "Form of the report on stdout.")


def _verify(model: str) -> "CheckpointReport | StoreReport":
    import tqdm

    from jmoe.store import hub, manifest, verify, verify_store

    directory = hub.resolve(model)
    manifest.require_complete(directory)
    is_store = manifest.is_store(directory)
    verify_it = verify_store.verify_store if is_store else verify.verify_directory
    quiet = not (_DEEP.value and sys.stderr.isatty())
    with tqdm.tqdm(desc="reading", unit="B", unit_scale=True, leave=False, disable=quiet) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        return verify_it(directory, deep=_DEEP.value, progress=show)


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:,.2f} GiB" if gib >= 1 else f"{1024 * gib:,.1f} MiB"


def _print_machine(machine: dict[str, Any]) -> None:
    _print("versions", ", ".join(" ".join(item) for item in machine["versions"].items()))
    _print("platform", machine["platform"])
    free, total = _size(machine["available_host_bytes"]), _size(machine["host_memory_bytes"])
    _print("host", f"{machine['num_cores']} cores, {free} of {total} available")
    if machine["devices_problem"]:
        _print("devices", f"none: {machine['devices_problem']}")
    for device in machine["devices"]:
        limit = device["limit_bytes"]
        memory = f"{_size(limit)} of its memory for XLA" if limit else "host memory"
        _print("device", f"{device['name']} ({device['kind']}), {memory}")
    _print("cuda", machine["cuda"])
    _print(*machine["host_kernels"]["reason"].split(": ", 1))


def _print_model(report: "CheckpointReport") -> None:
    dtypes = ", ".join(f"{number} {dtype}" for dtype, number in report.dtypes.items())
    _print("model", f"{report.directory} ({report.family})")
    _print("weights", f"{report.num_parameters:,} parameters, {_size(report.total_bytes)}")
    _print("tensors", f"{dtypes}, in {report.num_shards} files, all as config.json demands")
    if not report.non_finite:
        _print("values", "not read (add --deep)" if report.non_finite is None else "all finite")
    for name, counts in (report.non_finite or {}).items():
        _print("not finite", f"{name}: {counts.num_nan} NaN, {counts.num_inf} infinite")


def _print_store(report: "StoreReport") -> None:
    formats = ", ".join(f"{component} {fmt}" for component, fmt in report.formats.items())
    experts = f"{report.num_layers} x {report.num_experts} of {report.blob_bytes:,} bytes"
    _print("model", f"{report.directory} ({report.family}, converted from {report.source})")
    _print("formats", f"{report.quant}: {formats}; found by {report.method}")
    _print("weights", f"{report.num_parameters:,}, {report.bits_per_parameter:.2f} bits each")
    _print("experts", f"{experts}, {_size(report.expert_bytes)}")
    _print("others", _size(report.shared_bytes))
    _print("files", f"{report.num_files}, {_size(report.total_bytes)}, all as the manifest demands")
    _print("hashes", "all right" if report.hashes_verified else "not verified (add --deep)")


def _print(label: str, text: str) -> None:
    indents = f"{label:16}", " " * 16
    print(textwrap.TextWrapper(100, *indents, break_long_words=False).fill(text))


def main() -> None:
    from jmoe.store.verify import CheckpointReport
    from jmoe.store.verify_store import StoreReport

    machine = _machine.describe()
    if _OUTPUT.value == "text":
        _print_machine(machine)
    report = None if _MODEL.value is None else _verify(_MODEL.value)
    if _OUTPUT.value == "json":
        model = report and dataclasses.asdict(report) | {"directory": str(report.directory)}
        _common.print_json({"machine": machine, "model": model})
    elif report:
        print()
        if isinstance(report, StoreReport):
            _print_store(report)
        else:
            _print_model(report)
    if isinstance(report, CheckpointReport) and report.non_finite:
        what = f"tensors that hold NaN or infinity: {len(report.non_finite)}"
        _common.fail(f"{what}\n  in {report.directory}\n  do: download the weights again")


if __name__ == "__main__":
    _common.run(main)
