"""The suite decode: prefill and decode speed of the resident engine."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from _bench import bounds
from _bench.ceiling import Ceiling
from _bench.engine import XlaPeer, run_engine
from _bench.machine import Neighbours
from _bench.peer import TransformersPeer
from _bench.report import Report
from _bench.settings import Settings, Subject, load_subject
from _bench.statistics import compare, summarize, take_turns
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError

TG_PROMPT_TOKENS = 1

_PEERS = {"transformers": TransformersPeer, "xla": XlaPeer}


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Measures and reports the ceiling, then every test; returns all of it."""
    subject = load_subject(settings)
    engine = subject.engine
    _check_lengths(settings, engine.config.max_position_embeddings)
    peer = None if settings.peer == "none" else _PEERS[settings.peer](subject)
    ceiling = Ceiling(engine.device, engine.dtype)
    ceiling_json = ceiling.to_json()
    formats = engine.dtype if engine.quant is None else f"{engine.quant} in {engine.dtype}"
    kernels = f"; {'; '.join(subject.notes)}" if subject.notes else ""
    report.ceiling(f"{subject.name} in {formats} on {engine.device}{kernels}", ceiling_json)
    rows = []
    for batch_size in settings.batch_sizes:
        tests = [(f"pp{n}", n, 0) for n in settings.prompt_lengths]
        if settings.new_tokens:
            tests.append((f"tg{settings.new_tokens}", TG_PROMPT_TOKENS, settings.new_tokens))
        for name, prompt_tokens, new_tokens in tests:
            prompts = _random_prompts(subject, batch_size, prompt_tokens)
            rows.append(_measure(name, engine, peer, prompts, new_tokens, ceiling, settings))
            report.row(rows[-1])
    return {
        "subject": {
            "name": subject.name,
            "dtype": engine.dtype,
            "quant": None if engine.quant is None else str(engine.quant),
            "host_kernels": engine.host and dataclasses.asdict(engine.host),
            "notes": list(subject.notes),
            "num_hidden_layers": engine.config.num_hidden_layers,
            "parameter_bytes": engine.parameter_bytes,
        },
        "ceiling": ceiling_json,
        "rows": rows,
    }


def _measure(
    name: str,
    engine: ResidentEngine,
    peer: TransformersPeer | XlaPeer | None,
    prompts: np.ndarray,
    new_tokens: int,
    ceiling: Ceiling,
    settings: Settings,
) -> dict[str, Any]:
    contestants: dict[str, Callable[[], Any]] = {
        "jmoe": lambda: run_engine(engine, prompts, new_tokens),
        "ceiling": ceiling.read_bytes_per_s if new_tokens else ceiling.matmul_flop_per_s,
    }
    if peer is not None:
        contestants["peer"] = lambda: peer.run(prompts, new_tokens)
    total = (settings.warmup + settings.repeats) * len(contestants)
    quiet = not sys.stderr.isatty()
    with (
        Neighbours() as neighbours,
        tqdm(desc=name, total=total, leave=False, delay=2, disable=quiet) as bar,
    ):
        results = take_turns(
            contestants, repeats=settings.repeats, warmup=settings.warmup, progress=bar.update
        )

    batch_size, prompt_tokens = prompts.shape
    if new_tokens:
        work = bounds.decode_work(engine, results["jmoe"][0].tokens_BL, prompt_tokens)
    else:
        work = bounds.prefill_work(engine, prompt_tokens)
    phase, num_tokens = (1, batch_size * new_tokens) if new_tokens else (0, prompts.size)
    speeds, peer_speeds = (
        [num_tokens / run[phase] for run in results.get(who, [])] for who in ("jmoe", "peer")
    )
    return {
        "test": name,
        "batch": batch_size,
        "dtype": engine.dtype,
        "repeats": settings.repeats,
        "tok_per_s": summarize(speeds).to_json(),
        **work,
        **bounds.compare_with_bound(work, speeds, results["ceiling"]),
        "neighbours_cpu_share": neighbours.share,
        "peer": peer and {"name": peer.name} | compare(speeds, peer_speeds),
    }


def _random_prompts(subject: Subject, batch_size: int, num_tokens: int) -> np.ndarray:
    """Token ids int64 [B, L], the same in every run."""
    generator = np.random.default_rng(0)
    return generator.integers(subject.engine.config.vocab_size, size=(batch_size, num_tokens))


def _check_lengths(settings: Settings, limit: int) -> None:
    longest = max([TG_PROMPT_TOKENS + settings.new_tokens, *settings.prompt_lengths]) + 1
    if longest > limit:
        raise RequestError(
            "the tests are longer than the model's context",
            got=f"{longest} tokens",
            expected=f"at most {limit}",
            do="lower --prompt_lengths or --new_tokens",
        )
