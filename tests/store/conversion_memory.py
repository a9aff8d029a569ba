"""Peak host memory of a conversion: run as a process of its own, prints JSON.

    python -m tests.store.conversion_memory QUANT LAYERS

Linux only. Random weights, of one large shape: 0.7 GB in bfloat16 with 4 layers.
"""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.equivalence.peak_memory import CLEAR_REFS, ROOT

_CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def measure(quant: str, num_layers: int = 4) -> dict[str, int]:
    """Converts in a fresh process.

    Returns:
      baseline_bytes: resident memory just before, with all imports done;
      peak_bytes: the most resident memory while converting;
      layer_bytes: the experts of one layer in bfloat16;
      model_bytes: all weights in bfloat16.
    """
    command = [sys.executable, "-m", "tests.store.conversion_memory", quant, str(num_layers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    import jax
    import numpy as np

    from jmoe.quant.spec import parse_spec
    from jmoe.store.convert import Conversion
    from jmoe.store.source import RandomSource

    quant, num_layers = parse_spec(sys.argv[1]), int(sys.argv[2])
    source = RandomSource(_CONFIG | {"num_hidden_layers": num_layers}, "large")
    source.read("layers.0.router")  # makes its tables
    jax.device_put(np.ones(1)).block_until_ready()  # starts the backend
    with tempfile.TemporaryDirectory() as directory:
        conversion = Conversion(source, Path(directory) / "out", quant, method="rtn")
        gc.collect()
        baseline_bytes = _status_bytes("VmRSS")
        CLEAR_REFS.write_text("5")  # the peak starts from here
        conversion.run()
        figures = {
            "baseline_bytes": baseline_bytes,
            "peak_bytes": _status_bytes("VmHWM"),
            "layer_bytes": 2 * 8 * 3 * _CONFIG["hidden_size"] * _CONFIG["intermediate_size"],
            "model_bytes": source.total_bytes,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
