"""Compares the speed of jmoe with other programs on the same shape, in turn, on this machine's CPU.

Runs whichever peers are installed: llama.cpp through llama-cpp-python (in Q4_0; a Python of its own
can be named), transformers with torch (in bfloat16). All have random weights of the same shape, the
same prompt and the same number of threads, and choose the most probable token. Every repetition
runs each of them once, in turn, each in a process that stays loaded; where memory is too small for
all at once they are loaded one after another, and the output says so. A peer that is not there, or
does not fit, is left out, with the reason.

A table: tokens per second (medians), the weights that a token must read, how fast that is, as a
share of the memory's read speed too (measured beside jmoe's runs), and jmoe's speed as a multiple
of the peer's, repetition by repetition. Formats differ: see the bytes of a token.

Examples:
  python scripts/compare_peers.py
  python scripts/compare_peers.py --llama_cpp_python=path/to/llama/bin/python --threads=2
  python scripts/compare_peers.py --quant=attn4-experts4 --activation_bits=8 --num_layers=2
  python scripts/compare_peers.py --peers=transformers --prompt_tokens=512 --output=json | jq .rows
"""

import os

import _common
import _model_flags
from absl import flags

_PEERS = flags.DEFINE_list("peers", "llama.cpp,transformers", "Programs to compare with.")
_LLAMA_CPP_PYTHON = flags.DEFINE_string(
    "llama_cpp_python", None, "Python with llama-cpp-python and gguf. Default: this one."
)
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jmoe", "peers"),
    "Where the files of llama.cpp are kept: 3.3 GB for four layers of mixtral-8x7b.",
)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "Of the prefill.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 24, "Decode steps.", lower_bound=1)
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Measured, of each program.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Repetitions before, not measured.", lower_bound=0)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")

_QUIET = 0.05
_MODEL = "mixtral-8x7b"
flags.set_default(_model_flags.MODEL, _MODEL)
flags.set_default(_model_flags.RANDOM_WEIGHTS, True)
flags.set_default(_model_flags.NUM_LAYERS, 4)
flags.set_default(_model_flags.QUANT, "int4")


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    _model_flags.limit_threads()
    from _bench import machine
    from _bench.report import MarkdownReport
    from _peers import measure, peers

    from jmoe.planning.machine import num_threads

    comparison = peers.Comparison(
        model=_model_flags.MODEL.value or _MODEL,
        loading=_model_flags.arguments(),
        prompt_tokens=_PROMPT_TOKENS.value,
        new_tokens=_NEW_TOKENS.value,
        threads=num_threads(),
        peers=tuple(_PEERS.value),
        llama_cpp_python=_LLAMA_CPP_PYTHON.value,
        cache_dir=os.path.expanduser(_CACHE_DIR.value),
    )
    candidates, skipped = peers.find(comparison)
    for name, reason in skipped.items():
        _common.note(f"without {name}: {reason}")
    together = peers.fit_together(candidates)
    if not together:
        _common.note("not enough memory for all at once: loaded one after another, not in turns")
    with machine.Neighbours() as neighbours:
        results, facts = measure.measure(
            candidates,
            comparison,
            repetitions=_REPETITIONS.value,
            warmup=_WARMUP.value,
            together=together,
            skipped=skipped,
        )
    if neighbours.share > _QUIET:
        _common.note(
            f"other processes used {neighbours.share:.0%} of this machine: programs whose threads "
            "spin while they wait suffer more from that than others; compare on a quiet machine"
        )
    rows = [
        row | {"neighbours_cpu_share": neighbours.share}
        for row in measure.rows(results, facts, comparison)
    ]
    if _OUTPUT.value == "text":
        table = MarkdownReport()
        for row in rows:
            table.table(measure.cells(row))
        for fact in facts.values():
            _common.note("; ".join([fact["name"], *fact.get("notes", ())]))
        return
    _common.print_json(
        {
            **machine.describe_commit(),
            "date": machine.now(),
            "machine": machine.describe_machine(),
            "comparison": comparison.to_json(),
            "in_turns": together,
            "skipped": skipped,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    _common.run(main)
