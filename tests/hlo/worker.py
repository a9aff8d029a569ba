"""Compiles cases on request, in a process of its own: XLA ends the process if it meets a form
that it cannot handle.

    python -m tests.hlo.worker

Reads names of cases from standard input, one per line; answers each with a line of JSON, the
fields of ``compiling.Report`` or an error.
"""

import dataclasses
import json
import sys
import time

from tests.hlo import h100, optimized
from tests.hlo.cases import CASES
from tests.hlo.compiling import Report


def report(name: str) -> Report:
    lowered = CASES[name].lower()
    start = time.perf_counter()
    compiled = h100.compile_lowered(lowered)
    compile_s = time.perf_counter() - start
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    arrays = [
        (array.dtype, str(array), array.num_bytes)
        for array in optimized.written_arrays(hlo)
        if array.num_bytes >= Report.LISTED_BYTES
    ]
    return Report(
        temp_bytes=memory.temp_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        arrays=arrays,
        num_kernels=optimized.num_kernels(hlo),
        num_launches=optimized.num_launches(hlo),
        num_host_loops=optimized.num_host_loops(hlo),
        compile_s=compile_s,
    )


def main() -> None:
    for line in sys.stdin:
        try:
            answer = dataclasses.asdict(report(line.strip()))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
