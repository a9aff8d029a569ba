"""Quantization errors that every machine and version must reproduce.

They were made once, and show that an algorithm changed, for the better or not:

    python -m tests.quant.golden > tests/quant/golden.json        # makes them again
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jmoe.api
from jmoe.quant.formats import QuantFormat
from jmoe.quant.solver import METHODS, quantize
from jmoe.store.source import CheckpointSource
from tests.quant import cases
from tests.quant.cases import quant_format

GOLDEN_FILE = Path(__file__).with_name("golden.json")

# The formats of the presets, and one of every other kind.
FORMATS = ("8g64sf", "8g64", "4g64", "4g64s", "4g32f", "3g64", "3g32", "2g16", "2g64f")

SHAPE = (256, 192)  # of the embedded model's gate and up projections
SEED = 20240116
EMBEDDED = ("layers.0.experts.w1", "layers.11.experts.w3")


def heavy_tailed() -> np.ndarray:
    """Student's t with four degrees of freedom, by its quantiles: the same on every machine."""
    u = np.random.Generator(np.random.PCG64(SEED)).random(SHAPE)
    a = 4 * u * (1 - u)
    magnitude = 2 * np.sqrt(np.cos(np.arccos(np.sqrt(a)) / 3) / np.sqrt(a) - 1)
    return (np.sign(u - 0.5) * magnitude / np.sqrt(SHAPE[1])).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """By name, all of one shape."""
    source = CheckpointSource(jmoe.api.EMBEDDED_MODEL)
    return {"heavy-tailed": heavy_tailed()} | {
        f"{path}, expert 3": source.read(path, 3).astype(np.float32) for path in EMBEDDED
    }


def measure(w: np.ndarray, fmt: QuantFormat, method) -> dict[str, float]:
    """Squared error over squared weights; and the same, each weighted by its squared weight."""
    w64 = w.astype(np.float64)
    back = cases.reference_dequantize(quantize(jnp.asarray(w), fmt, method).array)
    squares, importance = (w64 - back) ** 2, w64**2
    return {
        "nmse": float(squares.sum() / importance.sum()),
        "weighted": float((squares * importance).sum() / (importance**2).sum()),
    }


def compute() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Errors by weights, format and method."""
    return {
        name: {
            text: {method: measure(w, quant_format(text), method) for method in METHODS}
            for text in FORMATS
        }
        for name, w in weights().items()
    }


def main() -> None:
    print("{")
    blocks = []
    for name, by_format in compute().items():
        lines = [
            f"  {json.dumps(text)}: "
            + json.dumps({m: {k: float(f"{v:.6g}") for k, v in e.items()} for m, e in by.items()})
            for text, by in by_format.items()
        ]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    print(",\n".join(blocks) + "\n}")


if __name__ == "__main__":
    main()
