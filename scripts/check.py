"""Reports what this machine offers jmoe, and verifies a model directory without running it.

Examples:
  python scripts/check.py
  python scripts/check.py --model=path/to/Mixtral-8x7B-v0.1
  python scripts/check.py --model=jmoe/data/tiny-mixtral --deep
  python scripts/check.py --model=path/to/model --output=json | jq .model

Without --deep only headers are read, which takes a moment, whatever the size of the model. With it
every weight is read once and searched for NaN and infinity. Exit status 2: not usable, and why.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import _common
from absl import flags

if TYPE_CHECKING:
    import jax

    from jmoe.store.verify import CheckpointReport

_MODEL = flags.DEFINE_string("model", None, "Model directory or hub id to verify; none by default.")
_DEEP = flags.DEFINE_bool("deep", False, "Also read all weights and search for NaN and infinity.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "Form of the report on stdout.")

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "safetensors", "tokenizers")


def _describe_machine() -> dict[str, Any]:
    import jax

    import jmoe
    from jmoe.planning import memory

    try:
        devices, problem = jax.devices(), None
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
        devices, problem = [], str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
    return {
        "versions": {"python": platform.python_version(), "jmoe": jmoe.__version__}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "num_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": memory.host_memory_bytes(),
        "available_host_bytes": memory.available_host_bytes(),
        "devices": [
            {"name": str(device), "kind": device.device_kind}
            | memory.device_memory(device)._asdict()
            for device in devices
        ],
        "devices_problem": problem,
        "cuda": _cuda_status(devices),
        "native_kernels": "none in this version, experts run through XLA",
    }


def _cuda_status(devices: "list[jax.Device]") -> str:
    import jax

    if any(device.platform == "gpu" for device in devices):
        return "usable"
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return "not usable: no CUDA plugin of jax (pip install 'jax[cuda12]' or 'jax[cuda13]')"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"not usable: {error}"
    return "usable, but not the default"


def _verify(model: str) -> "CheckpointReport":
    import tqdm

    from jmoe.store import hub, verify

    directory = hub.resolve(model)
    quiet = not (_DEEP.value and sys.stderr.isatty())
    with tqdm.tqdm(desc="reading", unit="B", unit_scale=True, leave=False, disable=quiet) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        return verify.verify_directory(directory, deep=_DEEP.value, progress=show)


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
    _print("native kernels", machine["native_kernels"])


def _print_model(report: "CheckpointReport") -> None:
    dtypes = ", ".join(f"{number} {dtype}" for dtype, number in report.dtypes.items())
    _print("model", f"{report.directory} ({report.family})")
    _print("weights", f"{report.num_parameters:,} parameters, {_size(report.total_bytes)}")
    _print("tensors", f"{dtypes}, in {report.num_shards} files, all as config.json demands")
    if not report.non_finite:
        _print("values", "not read (add --deep)" if report.non_finite is None else "all finite")
    for name, counts in (report.non_finite or {}).items():
        _print("not finite", f"{name}: {counts.num_nan} NaN, {counts.num_inf} infinite")


def _print(label: str, text: str) -> None:
    indents = f"{label:16}", " " * 16
    print(textwrap.TextWrapper(100, *indents, break_long_words=False).fill(text))


def main() -> None:
    machine = _describe_machine()
    if _OUTPUT.value == "text":
        _print_machine(machine)
    report = None if _MODEL.value is None else _verify(_MODEL.value)
    if _OUTPUT.value == "json":
        model = report and dataclasses.asdict(report) | {"directory": str(report.directory)}
        _common.print_json({"machine": machine, "model": model})
    elif report:
        print()
        _print_model(report)
    if report and report.non_finite:
        what = f"tensors that hold NaN or infinity: {len(report.non_finite)}"
        _common.fail(f"{what}\n  in {report.directory}\n  do: download the weights again")


if __name__ == "__main__":
    _common.run(main)
