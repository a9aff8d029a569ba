"""The plan of a model before it is loaded, and records of what its experts did."""

import contextlib
from collections.abc import Callable, Iterator

import _common
import _interrupt
import _model_flags

import jmoe
from jmoe.loading import FoundModel
from jmoe.residency.timeline import Timeline, check_writable


def print_plan(found: FoundModel, output: str) -> None:
    """Prints where every byte of a model would go."""
    config, plan = found.config, found.plan
    quant = found.setup.quant
    formats = found.setup.dtype if quant is None else f"{quant} in {found.setup.dtype}"
    if output == "json":
        value = {"name": found.name, "model_type": config.model_type, "formats": formats}
        _common.print_json(value | {"plan": plan.to_json()})
        return
    print(
        f"{found.name}: {config.num_hidden_layers} layers of {config.router.num_experts} experts "
        f"(top {config.router.top_k}); {formats} on {found.setup.device}\n\n{plan}"
    )


@contextlib.contextmanager
def recording(
    routing_file: str | None, timeline_file: str | None
) -> Iterator[Callable[[], jmoe.LLM]]:
    """Gives a function that loads the model; afterwards writes the records that were asked for.

    They are written after Ctrl-C and errors too, with what there is by then.
    """
    for path in filter(None, (routing_file, timeline_file)):
        check_writable(path)
    timeline = Timeline() if timeline_file else None
    loaded: list[jmoe.LLM] = []

    def load() -> jmoe.LLM:
        llm = _model_flags.load(record_routing=routing_file is not None, timeline=timeline)
        loaded.append(llm)
        if timeline is not None and llm.plan.policy.mode != "offload":
            raise jmoe.RequestError(
                "a timeline shows copies of experts, and there are none",
                got=f"the policy {llm.plan.policy.mode}",
                do="add --policy=offload, or leave out --trace_timeline",
            )
        return llm

    def save() -> None:
        for llm in loaded:
            if routing_file is not None:
                trace = llm.routing()
                trace.save(routing_file)
                _common.note(f"routing of {trace.num_tokens} decode tokens: {routing_file}")
            if timeline is not None and timeline_file is not None:
                timeline.save(timeline_file)
                _common.note(f"timeline: {timeline_file} (open it in ui.perfetto.dev)")

    _interrupt.last_words.append(save)
    try:
        yield load
    finally:
        for llm in loaded:
            llm.close()
        save()
