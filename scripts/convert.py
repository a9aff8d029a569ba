"""Converts a model to a store: experts as blobs of few bits, ready to be mapped and moved.

Reads a directory in Hugging Face format, a hub id, or a known shape filled with random weights,
layer by layer. The output appears when it is complete, and not before; what was interrupted goes
on with --resume. The last line of stdout is a summary.

Examples:
  python scripts/convert.py --model=mistralai/Mixtral-8x7B-v0.1 --output=mixtral-4bit
  python scripts/convert.py --model=path/to/model --output=out --quant=attn4-experts3
  python scripts/convert.py --model=path/to/model --output=out --quant=experts=4g64 --method=rtn
  python scripts/convert.py --model=mixtral-8x7b --num_layers=4 --random_weights --output=out
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import _common
from absl import flags

if TYPE_CHECKING:
    from jmoe.store.convert import ConversionReport

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Directory in Hugging Face format, or hub id; with --random_weights also a known model, "
    "such as mixtral-8x7b.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.")
_QUANT = flags.DEFINE_string(
    "quant", "attn4-experts4", "A preset, or formats by component: attention=4g64,experts=3g32"
)
_METHOD = flags.DEFINE_enum(
    "method", "hqq", ["hqq", "rtn"], "Half-quadratic quantization, or round to nearest."
)
_RESUME = flags.DEFINE_bool("resume", False, "Go on with an interrupted conversion.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
_RANDOM_WEIGHTS = flags.DEFINE_bool(
    "random_weights", False, "Take only the shape of the model, and fill it with random weights."
)
_NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "With --random_weights: instead of the model's.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of random weights.", lower_bound=0)
_OUTPUT_FORMAT = flags.DEFINE_enum(
    "output_format", "text", ["text", "json"], "Form of the summary on stdout."
)


def main() -> None:
    from tqdm import tqdm

    from jmoe.errors import RequestError
    from jmoe.quant.spec import parse_spec
    from jmoe.store.convert import Conversion
    from jmoe.store.open_source import open_source

    if not _MODEL.value or not _OUTPUT.value:
        missing = "--output" if _MODEL.value else "--model"
        raise RequestError(f"{missing} is missing", do="convert.py --help shows examples")
    quant = parse_spec(_QUANT.value)
    source = open_source(
        _MODEL.value,
        revision=_REVISION.value,
        random_weights=_RANDOM_WEIGHTS.value,
        num_layers=_NUM_LAYERS.value,
        seed=_SEED.value,
    )
    conversion = Conversion(
        source, Path(_OUTPUT.value), quant, method=_METHOD.value, resume=_RESUME.value
    )
    quiet = not sys.stderr.isatty()
    try:
        with tqdm(
            total=source.total_bytes, unit="B", unit_scale=True, desc="converting", disable=quiet
        ) as bar:
            report = conversion.run(bar.update)
    finally:
        if conversion.kept:
            _common.note(f"kept in {conversion.kept}: finished files; --resume goes on from there")
    if _OUTPUT_FORMAT.value == "json":
        _common.print_json(_to_json(report, str(quant)))
    else:
        print(_to_text(report, str(quant)))


def _to_json(report: "ConversionReport", quant: str) -> dict:
    return {
        "output": str(report.output),
        "quant": quant,
        "method": _METHOD.value,
        "input_bytes": report.input_bytes,
        "output_bytes": report.output_bytes,
        "seconds": report.seconds,
        "bytes_per_s": report.bytes_per_s,
        "resumed_files": report.resumed_files,
    }


def _to_text(report: "ConversionReport", quant: str) -> str:
    resumed = f", {report.resumed_files} files from before" if report.resumed_files else ""
    return (
        f"{report.output}: {quant} by {_METHOD.value}{resumed}\n"
        f"{_gib(report.input_bytes)} in, {_gib(report.output_bytes)} out, "
        f"{report.seconds:.1f} s, {report.bytes_per_s / 1e9:.2f} GB/s"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"


if __name__ == "__main__":
    _common.run(main)
