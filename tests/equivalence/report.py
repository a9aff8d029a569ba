"""Prints the measured accuracy of the foundation as markdown tables.

    python -m tests.equivalence.report

Needs torch and transformers, Linux, and a few minutes. What the tests bound, this measures.
"""

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

import jmoe
from jmoe.api import EMBEDDED_MODEL
from jmoe.store.tokenizer import Tokenizer
from tests.equivalence import embedded, measures, peak_memory
from tests.equivalence.checkpoints import RANDOM_MIXTRALS, write_large_mixtral
from tests.equivalence.comparing import Pair
from tests.equivalence.measures import LONG_PROMPT, PROMPT_LENGTHS, SAMPLED
from tests.equivalence.reference import Reference
from tests.resident_engine import resident_engine

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "tokenizers")
FULL_WINDOW = 256  # what the embedded model was trained on
MIB = 2**20


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    print(flush=True)


def environment() -> None:
    cpu_info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpu_info, re.MULTILINE)
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    memory_gib = psutil.virtual_memory().total / 2**30
    distribution = platform.freedesktop_os_release()["PRETTY_NAME"]
    kernel = ".".join(platform.release().split(".")[:2])
    isa = "with AVX-512" if "avx512f" in cpu_info else "without AVX-512"
    rows = [
        ("CPU", f"{model[1] if model else '?'}, {os.cpu_count()} cores, {isa}"),
        ("memory", f"{memory_gib:.0f} GiB"),
        ("system", f"{distribution}, Linux {kernel}, {platform.machine()}"),
        ("Python", platform.python_version()),
        *((package, version(package)) for package in PACKAGES),
        ("commit", commit),
        ("command", "`python -m tests.equivalence.report`"),
    ]
    print("## Where\n")
    table(("", ""), rows)


def pairs() -> Iterator[Pair]:
    for spec in RANDOM_MIXTRALS:
        with tempfile.TemporaryDirectory() as directory:
            yield Pair.random(spec, Path(directory))
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    yield Pair("tiny-mixtral (embedded)", EMBEDDED_MODEL, tokenizer.encode(measures.eval_text()))


def against_transformers() -> None:
    print("## Against transformers, both in float32\n")
    print("Prompts are random tokens; those of the embedded model are its held-out text.")
    errors, continuations = [], []
    for pair in pairs():
        lengths = (*PROMPT_LENGTHS, LONG_PROMPT)
        errors.append((pair.name, *(f"{pair.max_nmse(length):.1e}" for length in lengths)))
        expected = [pair.reference_greedy(length) for length in lengths]
        singles = [pair.greedy(length) == e for length, e in zip(lengths, expected, strict=True)]
        batch = [got == e for got, e in zip(pair.greedy_batch(), expected[:-1], strict=True)]
        continuations.append((pair.name, of(singles), of(batch)))
    print("\nLargest NMSE of the logits over all positions, by tokens of the prompt:\n")
    table(("checkpoint", *map(str, PROMPT_LENGTHS), f"{LONG_PROMPT} (two chunks)"), errors)
    print(f"Greedy continuations of {measures.NEW_TOKENS} tokens that are equal:\n")
    table(("checkpoint", "single prompts", "prompts of one unequal batch"), continuations)


def of(equal: Sequence[bool]) -> str:
    return f"{sum(equal)} of {len(equal)}"


def embedded_model() -> None:
    llm = jmoe.load(dtype="float32")
    tokenizer = llm.tokenizer
    models = {
        "transformers float32": Reference(EMBEDDED_MODEL).logits,
        "jmoe float32": llm.engine.logits,
        "jmoe bfloat16": jmoe.load(dtype="bfloat16").engine.logits,
        "transformers bfloat16": Reference(EMBEDDED_MODEL, "bfloat16").logits,
    }
    windows = embedded.top1_windows(tokenizer)
    full = measures.eval_windows(tokenizer, FULL_WINDOW)
    reference = None
    rows = []
    for name, logits in models.items():
        got = [logits(window.token_ids) for window in windows]
        reference = reference or got
        errors = np.concatenate([measures.nmse(g, r) for g, r in zip(got, reference, strict=True)])
        same, positions = measures.top1_agreement(got, reference)
        rows.append(
            (
                name,
                f"{same} of {positions}",
                *(f"{x:.1e}" for x in (errors.mean(), np.median(errors), errors.max())),
                f"{measures.perplexity(logits, windows):.4f}",
                f"{measures.perplexity(logits, full):.4f}",
            )
        )
    print("## The embedded model on its held-out text\n")
    print(
        f"Against transformers in float32, at {embedded.TOP1_WINDOWS} windows of "
        f"{embedded.TOP1_WINDOW} predictions. Full text: {len(full)} windows of {FULL_WINDOW} "
        f"predictions, {len(full) * FULL_WINDOW:,} in all.\n"
    )
    header = ("", "top-1 equal", "NMSE mean", "median", "max", "perplexity", "of the full text")
    table(header, rows)
    same_text(llm)


def same_text(llm: jmoe.LLM) -> None:
    print("## The same text however it is asked for\n")
    prompt = "def read(self, size):\n    "
    texts = [llm.generate(prompt, seed=7, **SAMPLED).text for _ in range(20)]
    difference = embedded.batch_difference(resident_engine(llm), llm.tokenizer, num_batches=20)
    rows = [
        ("same seed, same text", of([text == texts[0] for text in texts])),
        ("positions run in batches of three unequal prompts and alone", difference.positions),
        (
            f"of these with every router margin over {measures.MIN_ROUTER_MARGIN:g}",
            f"{difference.compared} ({difference.share_compared:.1%})",
        ),
        ("largest NMSE of batch against single at these", f"{difference.max_nmse_compared:.1e}"),
        ("largest NMSE at all positions", f"{difference.max_nmse:.1e}"),
    ]
    table(("embedded model, float32", "measured"), rows)


def loading_memory() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        largest_bytes = write_large_mixtral(Path(directory), EMBEDDED_MODEL / "tokenizer.json")
        for dtype in ("float32", "bfloat16"):
            figures = peak_memory.measure(Path(directory), dtype)
            peak_bytes = figures["peak_bytes"] - figures["baseline_bytes"]
            over_bytes = peak_bytes - figures["model_bytes"]
            sizes = (figures["model_bytes"], largest_bytes, peak_bytes, over_bytes)
            rows.append((dtype, *(f"{size / MIB:.1f}" for size in sizes)))
    print("## Peak host memory of loading\n")
    print("A checkpoint stored in bfloat16, in MiB; the peak is above the process before.\n")
    table(("loaded as", "model", "largest tensor, stored", "peak", "peak - model"), rows)


def main() -> None:
    environment()
    against_transformers()
    embedded_model()
    loading_memory()


if __name__ == "__main__":
    main()
