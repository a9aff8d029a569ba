"""Experts of a store that stay in mapped files: what of them is kept in memory."""

import dataclasses

from jmoe.engines.offload import OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError
from jmoe.loading.building import Engine, Setup
from jmoe.loading.options import LoadOptions
from jmoe.planning.memory import available_host_bytes
from jmoe.planning.policy import Policy
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.expert_store import ExpertStore
from jmoe.store.host_memory import choose_host_memory, format_size

# Layers. What is predicted wrongly takes the disk's time: docs/disk.md.
LOOKAHEAD = 1


def check_no_store(options: LoadOptions) -> None:
    """Raises RequestError if something is asked for that only a store has."""
    if (asked := options.asks_of_disk) is not None:
        raise RequestError(
            f"{asked} is for a converted store, whose experts can be mapped",
            got="a model that is none",
            do="convert the model (scripts/convert.py), or leave it out",
        )


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
    """Raises RequestError if memory is to be locked, and nobody will know for which experts.

    Or if popular experts are named, and there is nothing to hold them in.
    """
    options = setup.options
    if options.popularity is not None and options.lock_memory_gib == 0 and not setup.is_offload:
        raise RequestError(
            "popular experts are to be locked in memory, and nothing is to be locked",
            got=f"lock_memory_gib 0, and the routing {options.popularity}",
            do="leave one of them out, or choose the policy offload",
        )
    if options.lock_memory_gib and options.popularity is None and not setup.is_offload:
        raise RequestError(
            "an engine that computes where experts lie does not say which ones it uses most",
            got=f"lock_memory_gib {options.lock_memory_gib:g}, the policy {setup.plan.policy.mode}",
            do="name a record of routing by popularity, or choose the policy offload",
        )


def use_disk(setup: Setup, engine: Engine, store: ExpertStore) -> tuple[str, ...]:
    """Fits an engine to experts that do not all fit into memory.

    It predicts one layer ahead, if nobody asked for another number, and the experts are locked that
    are used most.

    Returns:
      What became of mapped experts, a sentence each.
    """
    disk, options, plan = store.disk, setup.options, setup.plan
    popularity = setup.popularity
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
