"""Which experts recorded runs used most: what the device holds to begin with."""

import time

from jmoe.config import ModelConfig
from jmoe.engines.offload import OffloadEngine
from jmoe.errors import RequestError
from jmoe.loading.options import LoadOptions
from jmoe.planning.budget import format_bytes
from jmoe.planning.traces import read_trace_of
from jmoe.residency.entries import ExpertKey
from jmoe.store.reading_queue import BlobKey

# Experts, and the share of tokens that used each.
Shares = dict[BlobKey, float]


def read_popularity(options: LoadOptions, config: ModelConfig) -> Shares:
    """How often tokens of recorded runs used each expert; empty if no record is named.

    Raises:
      CheckpointError: the file is missing, damaged, or something else.
      RequestError: it is of a model of another shape, or has no tokens.
    """
    if options.popularity is None:
        return {}
    trace = read_trace_of(options.popularity, config)
    counts_LE = trace.popularity() + trace.popularity(prompts=True)
    num_tokens = counts_LE[0].sum() / trace.top_k
    if not num_tokens:
        raise RequestError(
            "the recorded routing has no tokens",
            where=options.popularity,
            do="record a longer generation (--record_routing)",
        )
    return {
        (layer, expert): float(count / num_tokens)
        for layer, counts_E in enumerate(counts_LE)
        for expert, count in enumerate(counts_E)
    }


def hold_popular(engine: OffloadEngine, popularity: Shares) -> tuple[str, ...]:
    """Copies the most used experts to the device, as far as there are slots.

    Not if the host computes as fast as the device whatever is missing: they are better off there.

    Returns:
      What was done, a sentence each; nothing without popularity.

    Raises:
      CapacityError, TransferError: a copy failed.
    """
    if not popularity:
        return ()
    splitter = engine.splitter
    may_load = "load" in engine.plan.policy.possible_misses
    if splitter is not None and not may_load and not splitter.slots_pay:
        return ("popularity: no expert is copied, since the host computes as fast",)
    ranked = sorted(popularity, key=lambda key: -popularity[key])
    start_s = time.perf_counter()
    num_held = engine.places.favour([ExpertKey(*key) for key in ranked])
    seconds = time.perf_counter() - start_s
    size = format_bytes(num_held * engine.layout.num_bytes)
    return (
        f"popularity: {num_held} of {len(ranked)} experts are on the device to begin with, those "
        f"used most ({size}, copied in {seconds:.2g} s)",
    )
