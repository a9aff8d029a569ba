"""Measures the speed of jmoe beside what this machine could reach, and beside a peer.

First comes the ceiling: the read bandwidth of the memory and the speed of a large matrix product,
measured in the same run. Then one row per test, named as llama-bench does: pp64 is processing a
prompt of 64 tokens, tg64 is generating 64 tokens after a prompt of one. Figures are medians over
--repeats; with --peer the two programs take turns, repetition by repetition, on the same weights.
Compilation and warm-up are never part of a figure. The last line of stdout is one JSON object.

Suites:
  decode  prefill and decode of the resident engine: all weights in one memory
  load    from a new process to the first token, for several forms of a model
  convert conversions to a store, beside plain copies of the same files

Examples:
  python scripts/bench.py
  python scripts/bench.py --dtype=bfloat16 --batch=1,4 --repeats=9
  python scripts/bench.py --model=mixtral-8x7b --random_weights --num_layers=1 --quant=int4
  python scripts/bench.py --suite=load --models=path/to/model,path/to/store
  python scripts/bench.py --suite=convert --model=mixtral-8x7b --random_weights --num_layers=1
  python scripts/bench.py --peer=transformers --output_file=results.jsonl
  python scripts/bench.py --format=jsonl | tail -n 1 | jq .ceiling
"""

import importlib

import _common
import _model_flags
from absl import flags

# Modules with run(settings, report), which returns its part of the last line.
_SUITES = {"decode": "_bench.decode", "load": "_bench.load", "convert": "_bench.convert"}

_SUITE = flags.DEFINE_enum("suite", "decode", list(_SUITES), "What to measure.")
_MODELS = flags.DEFINE_list("models", [], "Suite load: models or stores to compare: A,B")
_BATCH = flags.DEFINE_list("batch", "1", "Numbers of sequences to run at once: 1,4,16")
_PROMPT_LENGTHS = flags.DEFINE_list("prompt_lengths", "64,512", "Tokens of the pp tests, or none.")
_NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 64, "Tokens of the tg test; 0 leaves it out.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measured repetitions of each test.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Repetitions before, not measured.", lower_bound=0)
_PEER = flags.DEFINE_enum(
    "peer", "none", ["none", "transformers"], "Program to compare with (transformers with torch)."
)
_FORMAT = flags.DEFINE_enum(
    "format", "md", ["md", "jsonl"], "Of the ceiling and the rows; the last line is always JSON."
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "File to append the last line to.")


def main() -> None:
    from _bench import machine, report
    from _bench.settings import Settings, read_integers

    import jmoe

    settings = Settings(
        model=_model_flags.MODEL.value,
        models=tuple(_MODELS.value),
        loading=_model_flags.arguments(),
        batch_sizes=read_integers("batch", _BATCH.value),
        prompt_lengths=read_integers("prompt_lengths", _PROMPT_LENGTHS.value),
        new_tokens=_NEW_TOKENS.value,
        repeats=_REPEATS.value,
        warmup=_WARMUP.value,
        peer=_PEER.value,
    )
    with report.ResultFile(_OUTPUT_FILE.value) as result_file:
        header = {
            "suite": _SUITE.value,
            **machine.describe_commit(),
            "version": jmoe.__version__,
            "date": machine.now(),
            "machine": machine.describe_machine(),
            "settings": settings.to_json(),
        }
        suite = importlib.import_module(_SUITES[_SUITE.value])
        summary = header | suite.run(settings, report.REPORTS[_FORMAT.value]())
        _common.print_json(summary)
        result_file.append(summary)


if __name__ == "__main__":
    _common.run(main)
