"""Peak host memory of loading a model: run as a process of its own, prints JSON.

    python -m tests.equivalence.peak_memory DIRECTORY DTYPE

Linux only: the kernel keeps the peak (VmHWM), and forgets it when told to.
"""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLEAR_REFS = Path("/proc/self/clear_refs")


def measure(directory: Path, dtype: str) -> dict[str, int]:
    """Loads a model in a fresh process.

    Returns:
      baseline_bytes: resident memory just before loading, with all imports done;
      peak_bytes: the most resident memory while loading;
      model_bytes: the parameters.
    """
    command = [sys.executable, "-m", "tests.equivalence.peak_memory", str(directory), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, field
    return int(match[1]) * 1024


def main() -> None:
    import jax
    import numpy as np

    import jmoe
    from tests.resident_engine import resident_engine

    directory, dtype = sys.argv[1:]
    jax.device_put(np.ones(1)).block_until_ready()  # starts the backend
    gc.collect()
    baseline_bytes = _status_bytes("VmRSS")
    CLEAR_REFS.write_text("5")  # the peak starts from here
    llm = jmoe.load(directory, dtype=dtype)
    jax.block_until_ready(resident_engine(llm).parameters)
    figures = {
        "baseline_bytes": baseline_bytes,
        "peak_bytes": _status_bytes("VmHWM"),
        "model_bytes": llm.engine.parameter_bytes,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
