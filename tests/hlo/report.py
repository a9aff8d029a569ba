"""Prints what the compiler makes of every case as markdown: docs/measurements/h100-hlo.md.

    python -m tests.hlo.report [--only=TEXT]  cases, or those with the text in their names
    python -m tests.hlo.report --layers=N,N   how long decode_tokens takes to compile by layers

Needs what the tests need: JAX's CUDA plugin, ptxas and libdevice. No GPU.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.hlo import h100, optimized
from tests.hlo.cases import CASES
from tests.hlo.compiling import Compilations, Report
from tests.hlo.offload_decode import OffloadDecode

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
  donated arguments that are updated in place do not, and of others updated in place it is the
  update. A loop's arrays are written in every iteration. A matrix of an expert has 112 MiB in
  bfloat16, 28 in 4 bits; a tile at most 32.
* kernels: kernels and copies in the program's text, a loop's once.
* run: those that run if loops of unknown length have nothing to do, as when every expert is there.
* host: loops that wait for the host at every iteration, because their end depends on data, and
  branches.

The tests bound temp, arrays and host.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")])
    options = parser.parse_args()
    reason = h100.why_unavailable()
    if reason is not None:
        sys.exit(f"error: {reason}")
    if options.layers:
        by_layers(options.layers)
    else:
        by_case([case for case in CASES if options.only in case])


def by_case(cases: list[str]) -> None:
    # One at a time, or the times of compilation would mean less.
    compilations = Compilations(cases, num_workers=1)
    try:
        print(INTRODUCTION)
        environment()
        print(
            "| case | temp MiB | largest arrays written, MiB | kernels | run | host | compile s |"
        )
        print("|---|---|---|---|---|---|---|")
        for case in cases:
            print(row(case, compilations.report(case)), flush=True)
    finally:
        compilations.close()


def by_layers(layers: list[int]) -> None:
    environment()
    print("| layers | trace s | compile s | processor s of both | kernels | host |")
    print("|---|---|---|---|---|---|")
    for num_layers in layers:
        start, start_cpu = time.perf_counter(), time.process_time()
        lowered = OffloadDecode(quant="attn4-experts4", slots=5, num_layers=num_layers).lower()
        middle = time.perf_counter()
        hlo = h100.compile_lowered(lowered).as_text()
        end, end_cpu = time.perf_counter(), time.process_time()
        assert hlo is not None
        cells = (
            num_layers,
            f"{middle - start:.1f}",
            f"{end - middle:.1f}",
            f"{end_cpu - start_cpu:.1f}",
            optimized.num_kernels(hlo),
            optimized.num_host_loops(hlo),
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


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
    print(f"| command | `python -m tests.hlo.report {' '.join(sys.argv[1:])}` |\n")


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
        report.num_launches,
        report.num_host_loops,
        f"{report.compile_s:.1f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
