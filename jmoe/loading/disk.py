"""Experts of a store that stay in mapped files: what of them is kept in memory."""

import dataclasses

from jmoe.config import ModelConfig
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError
from jmoe.loading.building import Engine, Setup
from jmoe.loading.options import LoadOptions
from jmoe.planning.memory import available_host_bytes
from jmoe.planning.policy import Policy
from jmoe.planning.traces import RoutingTrace
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.expert_store import ExpertStore
from jmoe.store.host_memory import choose_host_memory, format_size
from jmoe.store.reading_queue import BlobKey

# Layers. What is predicted wrongly takes the disk's time: docs/disk.md.
LOOKAHEAD = 1

# Experts, and the share of tokens that used each.
Shares = dict[BlobKey, float]


def check_no_store(options: LoadOptions) -> None:
    """Raises RequestError if something is asked for that only a store has."""
    if (asked := options.asks_of_disk) is not None:
        raise RequestError(
            f"{asked} is for a converted store, whose experts can be mapped",
            got="a model that is none",
            do="convert the model (scripts/convert.py), or leave it out",
        )


def read_popularity(options: LoadOptions, config: ModelConfig) -> Shares:
    """How often tokens of recorded runs used each expert; empty if no record is named.

    Raises:
      CheckpointError: the file is missing, damaged, or something else.
      RequestError: it is of a model of another shape, or has no tokens.
    """
    if options.popularity is None:
        return {}
    router = config.router
    trace = RoutingTrace.load(options.popularity, num_experts=router.num_experts)
    counts_LE = trace.popularity() + trace.popularity(prompts=True)
    shape = config.num_hidden_layers, router.num_experts
    if counts_LE.shape != shape or trace.top_k != router.top_k:
        raise RequestError(
            "the recorded routing is of another model",
            where=options.popularity,
            got="{} layers of {} experts, top {}".format(*counts_LE.shape, trace.top_k),
            expected="{} layers of {} experts, top {}".format(*shape, router.top_k),
        )
    num_tokens = counts_LE[0].sum() / router.top_k
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


def plan_disk(setup: Setup, model: ConvertedModel) -> Setup:
    """Says in the plan that experts will be mapped because they do not fit into host memory."""
    available_bytes = available_host_bytes()
    kind, _ = choose_host_memory(model.expert_bytes, "auto", available_bytes)
    if kind == "ram" or setup.options.host_memory == "ram" or not setup.is_mapped:
        return setup
    reason = (
        f"{format_size(model.expert_bytes)} of experts, {format_size(available_bytes)} of host "
        "memory free: they stay in mapped files, and one that is not in memory is "
        f"{format_size(model.layout.num_bytes)} to be read from the disk"
    )
    plan = dataclasses.replace(setup.plan, reasons=(*setup.plan.reasons, reason))
    return setup._replace(plan=plan)


def check_engine(setup: Setup) -> None:
    """Raises RequestError if memory is to be locked, and nobody will know for which experts."""
    options = setup.options
    if options.lock_memory_gib and options.popularity is None and not setup.is_offload:
        raise RequestError(
            "an engine that computes where experts lie does not say which ones it uses most",
            got=f"lock_memory_gib {options.lock_memory_gib:g}, the policy {setup.plan.policy.mode}",
            do="name a record of routing by popularity, or choose the policy offload",
        )


def use_disk(
    setup: Setup, engine: Engine, store: ExpertStore, popularity: Shares
) -> tuple[str, ...]:
    """Fits an engine to experts that do not all fit into memory.

    It predicts one layer ahead, if nobody asked for another number, and the experts are locked that
    are used most.

    Returns:
      What became of mapped experts, a sentence each.
    """
    disk, options, plan = store.disk, setup.options, setup.plan
    if disk is None:
        asked = options.asks_of_disk
        return (f"{asked} has no effect: no expert is mapped",) if asked else ()
    if isinstance(engine, ResidentEngine):
        engine.disk = disk
        if not popularity:
            return (
                *disk.notes,
                "disk: nothing is locked in memory: an engine that computes where experts lie does "
                "not say which it uses (name a record by popularity, or choose the policy offload)",
            )
    requested = options.requested_policy
    is_open = not isinstance(requested, Policy) or requested.lookahead is None
    if isinstance(engine, OffloadEngine) and disk.is_larger and disk.reads_ahead and is_open:
        engine.lookahead = min(LOOKAHEAD, engine.num_layers - 1)
    reserve_bytes = 0
    if setup.device.platform == "cpu":  # whose memory is the host's, and which is not in use yet
        reserve_bytes = max(0, plan.device_bytes - engine.parameter_bytes)
    if disk.is_larger or options.lock_memory_gib or popularity:
        shares = sorted(popularity.items(), key=lambda item: -item[1])
        disk.lock_most_used(
            available_host_bytes, shares, reserve_bytes=reserve_bytes, max_bytes=options.lock_bytes
        )
    return tuple(disk.notes)
