"""Prints what the compiler makes of every case as markdown: docs/measurements/h100-hlo.md.

    python -m tests.hlo.report

Needs what the tests need: JAX's CUDA plugin, ptxas and libdevice. No GPU.
"""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.hlo import h100
from tests.hlo.cases import CASES
from tests.hlo.compiling import Compilations, Report

MIB = 2**20
NUM_LISTED = 4

INTRODUCTION = """\
# What XLA makes of the programs on an H100

Compiled for an H100 SXM without one (tests/hlo), at the sizes of Mixtral-8x7B; nothing was run,
and nothing was tuned: on a GPU, XLA times some matrix products and may choose others. Weights are
those of a preset (`attn4-experts4` for whole programs, of two layers), activations bfloat16. A
token uses two experts of eight.

* temp: scratch memory of the program, beside its arguments and results.
* arrays: the largest that it writes to memory, if they have 0.25 MiB or more; results count,
  donated arguments that are updated in place do not. A loop's arrays are written in every
  iteration. A matrix of an expert has 112 MiB in bfloat16, 28 in 4 bits; a tile at most 32.
* kernels: kernels and copies in the program's text, a loop's once.
* host: loops that wait for the host at every iteration, because their end depends on data.

The tests bound temp, arrays and host.
"""


def main() -> None:
    reason = h100.why_unavailable()
    if reason is not None:
        sys.exit(f"error: {reason}")
    # One at a time, or the times of compilation would mean less.
    compilations = Compilations(CASES, num_workers=1)
    try:
        print(INTRODUCTION)
        environment()
        print("| case | temp MiB | largest arrays written, MiB | kernels | host | compile s |")
        print("|---|---|---|---|---|---|")
        for case in CASES:
            print(row(case, compilations.report(case)), flush=True)
    finally:
        compilations.close()


def environment() -> None:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    directory = h100.cuda_directory()
    assert directory is not None
    ptxas = subprocess.run([directory / "bin/ptxas", "--version"], capture_output=True, text=True)
    release = re.search(r"release [\d.]+, V([\d.]+)", ptxas.stdout)
    print("| | |\n|---|---|")
    print(f"| compiled on | {model[1] if model else '?'}, {os.cpu_count()} cores |")
    print(f"| Python | {platform.python_version()} |")
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "flax"):
        print(f"| {package} | {version(package)} |")
    print(f"| ptxas | {release[1] if release else '?'} |")
    print(f"| commit | {commit} |")
    print("| command | `python -m tests.hlo.report` |\n")


def row(case: str, report: Report) -> str:
    arrays: dict[str, int] = {}
    for _, text, num_bytes in report.arrays:
        arrays.setdefault(text, num_bytes)
    listed = [f"`{text}` {size / MIB:.1f}" for text, size in list(arrays.items())[:NUM_LISTED]]
    cells = (
        case,
        f"{report.temp_bytes / MIB:.2f}",
        ", ".join(listed) or "none",
        report.num_kernels,
        report.num_host_loops,
        f"{report.compile_s:.1f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
