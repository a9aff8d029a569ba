"""The suite convert: conversions to a store beside plain copies of the same files.

Copies and conversions take turns, and all of them wait until the disk has what they wrote.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _bench.machine import Neighbours
from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize, take_turns
from jmoe.api import EMBEDDED_MODEL
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.models.weights import component_format
from jmoe.quant.formats import QuantFormat
from jmoe.quant.layout import MATRICES, ExpertLayout
from jmoe.quant.solver import METHODS, Method
from jmoe.quant.spec import QuantSpec, parse_spec
from jmoe.store import hub
from jmoe.store.convert import Conversion
from jmoe.store.open_source import open_source
from jmoe.store.quantize import matrix_paths
from jmoe.store.safetensors_writer import NewFile, TensorFile, write_file
from jmoe.store.source import CheckpointSource, RandomSource

_DEFAULT_QUANT = "attn4-experts4"


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports copying and both methods; returns all of it."""
    quant = parse_spec(settings.loading["quant"] or _DEFAULT_QUANT)
    with tempfile.TemporaryDirectory(prefix="jmoe-bench-") as directory:
        source = _open(settings, Path(directory))
        output = Path(directory) / "output"
        contestants: dict[str, Callable[[], float]] = {"copy": lambda: _copy(source, output)}
        for method in METHODS:
            contestants[method] = lambda method=method: _convert(source, output, quant, method)
        total = (settings.warmup + settings.repeats) * len(contestants)
        quiet = not sys.stderr.isatty()
        with (
            Neighbours() as neighbours,
            tqdm(desc="converting", total=total, leave=False, disable=quiet) as bar,
        ):
            seconds = take_turns(
                contestants, repeats=settings.repeats, warmup=settings.warmup, progress=bar.update
            )
        subject = {
            "name": source.name,
            "quant": str(quant),
            "input_bytes": source.total_bytes,
            "output_bytes": Conversion(source, output, quant, method="rtn").output_bytes,
            "quantized_weights": _quantized_weights(source, quant),
        }
    rows = [_row(name, seconds, subject) for name in contestants]
    for row in rows:
        report.table(_cells(row, neighbours.share))
    return {"subject": subject, "rows": rows, "neighbours_cpu_share": neighbours.share}


def _open(settings: Settings, directory: Path) -> CheckpointSource:
    if not settings.loading["random_weights"]:
        name = settings.model
        return CheckpointSource(EMBEDDED_MODEL if name is None else hub.resolve(name))
    source = open_source(
        settings.model or EMBEDDED_MODEL,
        random_weights=True,
        num_layers=settings.loading["num_layers"],
    )
    assert isinstance(source, RandomSource)
    return CheckpointSource(_write_checkpoint(source, directory / "input"), source.name)


def _write_checkpoint(source: RandomSource, directory: Path) -> Path:
    """Writes random weights as a checkpoint in Hugging Face format, of one file."""
    places = {
        name: (path, i if parameter.stacked else None)
        for path, parameter in families.parameter_sources(source.config).items()
        for i, name in enumerate(parameter.tensors)
    }
    shapes, _ = families.tensor_shapes(source.config)
    form = TensorFile({name: (shape, "bfloat16") for name, shape in shapes.items()}, alignment=1)
    directory.mkdir()
    write_file(directory, "config.json", json.dumps(source.config_json).encode())
    file = NewFile(directory, "model.safetensors")
    file.write(form.head)
    for name in shapes:
        file.write(source.read(*places[name]))
    file.finish()
    return directory


def _copy(source: CheckpointSource, output: Path) -> float:
    """Copies the files of weights; returns the seconds until the disk has them."""
    output.mkdir()
    started = time.perf_counter()
    for file in source.files:
        shutil.copyfile(file, output / file.name)
        with (output / file.name).open("rb+") as copy:
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def _convert(source: CheckpointSource, output: Path, quant: QuantSpec, method: Method) -> float:
    seconds = Conversion(source, output, quant, method=method).run().seconds
    shutil.rmtree(output)
    return seconds


def _quantized_weights(source: CheckpointSource, quant: QuantSpec) -> int:
    config = source.config
    layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
    experts = config.num_hidden_layers * config.router.num_experts
    shapes = abstract_parameters(config)
    return sum(
        experts * math.prod(layout.matrix_shape(matrix))
        for matrix in MATRICES
        if isinstance(layout.format(matrix), QuantFormat)
    ) + sum(
        math.prod(shapes[path].shape)
        for path in matrix_paths(source, quant)
        if isinstance(component_format(path, quant), QuantFormat)
    )


def _row(name: str, seconds: dict[str, list[float]], subject: dict[str, Any]) -> dict[str, Any]:
    speeds = [subject["input_bytes"] / s for s in seconds[name]]
    ratios = [copy / s for copy, s in zip(seconds["copy"], seconds[name], strict=True)]
    row = {
        "what": name,
        "seconds": summarize(seconds[name]).to_json(),
        "input_bytes_per_s": summarize(speeds).to_json(),
        "ratio_to_copy": summarize(ratios).to_json(),
    }
    if name in METHODS and subject["quantized_weights"]:
        billions = subject["quantized_weights"] / 1e9
        per_billion = [s / billions for s in seconds[name]]
        row["seconds_per_billion_weights"] = summarize(per_billion).to_json()
    return row


def _cells(row: dict[str, Any], neighbours_cpu_share: float) -> dict[str, str]:
    speed, ratio = row["input_bytes_per_s"], row["ratio_to_copy"]
    per_billion = row.get("seconds_per_billion_weights")
    return {
        "what": row["what"],
        "GB/s read": f"{speed['median'] / 1e9:.3f}",
        "  min - max": f"{speed['min'] / 1e9:.3f} - {speed['max'] / 1e9:.3f}",
        "of copy": f"{ratio['median']:.2f}",
        "of copy, range": f"{ratio['min']:.2f} - {ratio['max']:.2f}",
        "s per 1e9 weights": f"{per_billion['median']:.1f}" if per_billion else "",
        "neighbours": f"{neighbours_cpu_share:.0%}",
    }
