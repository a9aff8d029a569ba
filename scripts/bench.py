"""Measures the speed of jmoe beside what this machine could reach, and beside a peer.

First comes the ceiling: the read bandwidth of the memory and the speed of a large matrix product,
measured in the same run. Then one row per test, named as llama-bench does: pp64 is processing a
prompt of 64 tokens, tg64 is generating 64 tokens after a prompt of one. Figures are medians over
--repeats; with --peer the two programs take turns, repetition by repetition, on the same weights.
Compilation and warm-up are never part of a figure. The last line of stdout is one JSON object.
--threads holds for everything that is measured, the ceiling and the peer too.

Suites:
  decode  prefill and decode of the resident engine: all weights in one memory. On a CPU it computes
          with the host kernels, if there are any; --peer=xla is the same engine without them
  kernels the host kernels one by one, in every format and with every number of bits of activations:
          share of the memory's speed for one token, arithmetic for more, and the ratio to what XLA
          does instead; --peer=torch puts the experts in bfloat16 beside them. --model names a shape
  load    from a new process to the first token, for several forms of a model
  convert conversions to a store, beside plain copies of the same files
  offload decoding with experts in host memory, on links held to --links: how much of copying hides
          behind computing, with experts predicted by an oracle, by the routers, or not at all; the
          rows of a paper's table; and what a loop over layers costs where nothing moves
  engines what takes decode steps: the resident engine, the thread and the compiled one, with places
          for all experts and for half of them; how fast a program fetches experts, beside plain
          copies; what a missing expert costs in a program that copies it, or computes it where it
          lies; what fetching ahead gives in a program; how long the program takes to compile
  hybrid  missing experts copied, computed on the host, or both, on links held to --links and a host
          held to --host_gb_per_s, beside what was predicted; time to the first token of long
          prompts; beams together, beside as many sequences one after the other
  disk    a store, and a limit of memory (--memory_gib; as root): how fast the disk gives experts,
          by the way they are asked for; decoding from there, with experts read ahead, and with the
          most used ones locked. Without --model that of the embedded one, with larger experts

Examples:
  python scripts/bench.py
  python scripts/bench.py --dtype=bfloat16 --batch=1,4 --repeats=9
  python scripts/bench.py --model=mixtral-8x7b --random_weights --num_layers=4 --quant=int4
  python scripts/bench.py --quant=int4 --peer=xla --threads=2
  python scripts/bench.py --suite=kernels --peer=torch
  python scripts/bench.py --suite=kernels --formats=4g64,bf16 --tokens=1,16 --activation_bits=8
  python scripts/bench.py --suite=kernels --operation=linear --operation=attend --threads=1
  python scripts/bench.py --suite=load --models=path/to/model,path/to/store
  python scripts/bench.py --suite=convert --model=mixtral-8x7b --random_weights --num_layers=1
  python scripts/bench.py --suite=offload --links=0.5,1,2 --parts=overlap,overhead
  python scripts/bench.py --suite=engines --parts=decode,ahead --repeats=9
  python scripts/bench.py --suite=engines --parts=compile --model=mixtral-8x7b --random_weights
  python scripts/bench.py --suite=hybrid --parts=decode --links=0.5,1,2,4 --host_gb_per_s=2
  python scripts/bench.py --suite=disk --expert_times=128 --memory_gib=1.1 --new_tokens=32
  python scripts/bench.py --peer=transformers --output_file=results.jsonl
  python scripts/bench.py --format=jsonl | tail -n 1 | jq .ceiling
"""

import importlib

import _common
import _model_flags
from absl import flags

# Modules with run(settings, report), which returns its part of the last line.
_SUITES = {
    "decode": "_bench.decode",
    "kernels": "_bench.kernels",
    "load": "_bench.load",
    "convert": "_bench.convert",
    "offload": "_bench.offload",
    "engines": "_bench.engines",
    "hybrid": "_bench.hybrid",
    "disk": "_bench.disk",
}
_PEERS = {"decode": ("transformers", "xla"), "kernels": ("torch",)}

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
    "peer",
    "none",
    ["none", "transformers", "xla", "torch"],
    "Program to compare with; of suite decode transformers (with torch) or xla, of kernels torch.",
)
_OPERATIONS = flags.DEFINE_multi_enum(
    "operation",
    ["experts", "linear", "attend"],
    ["experts", "linear", "attend"],
    "Suite kernels: what to measure; linear is the projections and head in the formats of --quant.",
)
_FORMATS = flags.DEFINE_list(
    "formats", "8g64sf,4g64,3g64,2g16,bf16,f32", "Suite kernels: of the experts."
)
_TOKENS = flags.DEFINE_list("tokens", "1,16,64,512", "Suite kernels: tokens at once.")
_PARTS = flags.DEFINE_list(
    "parts",
    None,
    "What to measure of the suite offload: overlap,paper,overhead; of engines: "
    "decode,fetch,misses,ahead,compile; of hybrid: decode,prompts,beams; of disk: read,decode. "
    "Default: all of it.",
)
_LAYERS = flags.DEFINE_list("layers", "12,32,56", "Suite engines: of the models to compile.")
_LINKS = flags.DEFINE_list(
    "links", "0.5,1,2", "Suites offload and hybrid: speeds in GB/s (10^9 bytes)."
)
_SLOTS = flags.DEFINE_list("slots", "2,4", "Suite hybrid: experts per layer on the device.")
_MEMORY_GIB = flags.DEFINE_float(
    "memory_gib", None, "Suite disk: memory to hold this process to, page cache included."
)
_EXPERT_TIMES = flags.DEFINE_integer(
    "expert_times", 16, "Suite disk without --model: a power of two.", lower_bound=1
)
_COPIES = flags.DEFINE_bool(
    "copies",
    True,
    "Suite offload on a CPU: really copy; --nocopies takes as long, without cores and memory.",
)
_PLOT = flags.DEFINE_string(
    "plot", None, "SVG file for the part paper of the suite offload, or decode of hybrid."
)
_FORMAT = flags.DEFINE_enum(
    "format", "md", ["md", "jsonl"], "Of the ceiling and the rows; the last line is always JSON."
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "File to append the last line to.")


def main() -> None:
    _model_flags.limit_threads()
    from _bench import machine, report
    from _bench.settings import Settings, check_parts, check_peer, read_integers, read_speeds

    import jmoe

    check_peer(_SUITE.value, _PEER.value, _PEERS.get(_SUITE.value, ()))
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
        operations=tuple(_OPERATIONS.value),
        formats=tuple(_FORMATS.value),
        tokens=read_integers("tokens", _TOKENS.value),
        parts=check_parts(_PARTS.value, _SUITE.value),
        links=read_speeds("links", _LINKS.value),
        slots=read_integers("slots", _SLOTS.value),
        copies=_COPIES.value,
        plot=_PLOT.value,
        layers=read_integers("layers", _LAYERS.value),
        memory_gib=_MEMORY_GIB.value,
        expert_times=_EXPERT_TIMES.value,
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
