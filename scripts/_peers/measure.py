"""Runs of all peers in turn, and what comes of them."""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from _bench.statistics import compare, summarize, take_turns
from tqdm import tqdm

from _peers.peers import OURS, Candidate, Comparison
from jmoe.errors import RequestError

_FIRST_TOKEN = 300  # after the tokens for bytes and control, in any vocabulary

Runs = list[dict[str, Any]]


def measure(
    candidates: Sequence[Candidate],
    comparison: Comparison,
    *,
    repetitions: int,
    warmup: int,
    together: bool,
    skipped: dict[str, str],
) -> tuple[dict[str, Runs], dict[str, dict[str, Any]]]:
    """Every peer's runs, and facts.

    Args:
      candidates: what to run.
      comparison: on what.
      repetitions: runs of each.
      warmup: runs before these.
      together: all are loaded at once, and take turns; else one after another is loaded, and runs
        all its repetitions.
      skipped: gets the names of those that cannot be loaded, and why.
    """
    vocabulary = comparison.config_json()["vocab_size"]
    rng = random.Random(0)
    prompt = [rng.randrange(_FIRST_TOKEN, vocabulary) for _ in range(comparison.prompt_tokens)]
    groups = [list(candidates)] if together else [[candidate] for candidate in candidates]
    results: dict[str, Runs] = {}
    facts: dict[str, dict[str, Any]] = {}
    total = len(candidates) * (1 + warmup + repetitions)
    with tqdm(desc="comparing", total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        for group in groups:
            with ExitStack() as stack:
                contestants: dict[str, Callable[[], dict[str, Any]]] = {}
                for candidate in group:
                    bar.set_description(f"loading {candidate.name}")
                    try:
                        process = candidate.start()
                    except RequestError as error:
                        if candidate.name == OURS:
                            raise
                        skipped[candidate.name] = f"{error.what}: {error.got}"
                        bar.write(f"without {candidate.name}: {error.got}", file=sys.stderr)
                        continue
                    stack.callback(process.close)
                    facts[candidate.name] = process.facts
                    bar.update()

                    def run(process=process) -> dict[str, Any]:
                        return process.run(prompt, comparison.new_tokens)

                    contestants[candidate.name] = run
                bar.set_description("comparing")
                results |= take_turns(
                    contestants, repeats=repetitions, warmup=warmup, progress=bar.update
                )
    return results, facts


def rows(
    results: Mapping[str, Runs], facts: Mapping[str, dict[str, Any]], comparison: Comparison
) -> list[dict[str, Any]]:
    """What is said of each peer; of the others the ratio of jmoe's speed to theirs."""
    tokens = {"prefill": comparison.prompt_tokens, "decode": comparison.new_tokens}
    speeds = {
        name: {phase: [n / run[f"{phase}_s"] for run in runs] for phase, n in tokens.items()}
        for name, runs in results.items()
    }
    reads = [run["read_bytes_per_s"] for run in results[OURS]]
    values = []
    for name, speed in speeds.items():
        per_token = facts[name]["bytes_per_token"]
        rates = [tok_per_s * per_token for tok_per_s in speed["decode"]]
        value: dict[str, Any] = {
            "peer": name,
            "facts": facts[name],
            "prefill_tok_per_s": summarize(speed["prefill"]).to_json(),
            "decode_tok_per_s": summarize(speed["decode"]).to_json(),
            "decode_bytes_per_s": summarize(rates).to_json(),
            "share_of_read": summarize(
                [rate / read for rate, read in zip(rates, reads, strict=True)]
            ).to_json(),
        }
        if name != OURS:
            for phase in tokens:
                ratios = compare(speeds[OURS][phase], speed[phase])
                del ratios["tok_per_s"]
                value[f"jmoe_to_peer_{phase}"] = ratios
        values.append(value)
    return values


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""

    def ratio(phase: str) -> str:
        ratios = row.get(f"jmoe_to_peer_{phase}")
        return f"{ratios['pair_ratio']['median']:.2f}" if ratios else ""

    def speed(name: str) -> tuple[str, str]:
        value = row[name]
        return f"{value['median']:.3g}", f"{value['min']:.3g} - {value['max']:.3g}"

    prefill, prefill_range = speed("prefill_tok_per_s")
    decode, decode_range = speed("decode_tok_per_s")
    return {
        "program     ": row["peer"],
        "weights ": row["facts"]["weights"],
        "prefill tok/s": prefill,
        "     range    ": prefill_range,
        "decode tok/s": decode,
        "    range    ": decode_range,
        "MB/token": f"{row['facts']['bytes_per_token'] / 1e6:,.0f}",
        "GB/s": f"{row['decode_bytes_per_s']['median'] / 1e9:.1f}",
        "of read": f"{row['share_of_read']['median']:.0%}",
        "jmoe/it prefill": ratio("prefill"),
        "jmoe/it decode": ratio("decode"),
        "neighbours": f"{row['neighbours_cpu_share']:.0%}",
    }
