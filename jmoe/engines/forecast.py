"""How long a token will take, by the cost model, for each way of taking decode steps.

What a prompt's tokens chose is the best guess at what those after it will choose: so they are
replayed (``planning.replay``) as if they were decoded, from the experts that are there now.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jmoe.engines.contest import MISSES, Way
from jmoe.engines.prediction import by_votes
from jmoe.planning.cost import ExpertCosts
from jmoe.planning.modelled_link import ModelledLink
from jmoe.planning.policy import Policy
from jmoe.planning.replay import Replay
from jmoe.planning.splitting import Splitter
from jmoe.residency.cache import SlotCache
from jmoe.residency.entries import ExpertKey, NoRoom
from jmoe.residency.eviction import make_eviction

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine

# Of a prompt, the last ones: more would take too long to replay.
MAX_TOKENS = 32

# Steps that are timed with all experts on the device, after the first one.
NUM_TIMED = 3

# By layer of one step: chosen experts, then those predicted for later layers, as
# ``DecodeLoop.choices``: int32 [1 + N, T, W].
Choices = Sequence[np.ndarray]


def forecast_s(
    way: Way,
    steps: Sequence[Choices],
    held: Mapping[int, Sequence[int]],
    policy: Policy,
    costs: ExpertCosts,
    *,
    step_s: float,
    num_experts: int,
    top_k: int,
) -> float:
    """Seconds that a decode step takes on average.

    Args:
      way: of taking them.
      steps: what tokens chose, those of all sequences in a step together.
      held: by layer the experts that have a slot, the most recently used last.
      policy: of places and prefetches; leaves nothing out.
      costs: of an expert.
      step_s: that a step takes in this way when all experts are on the device.
      num_experts: of a layer.
      top_k: experts of a token.
    """
    assert policy.slots is not None and policy.eviction is not None and steps
    num_layers = len(steps[0])
    slots = policy.slots
    smallest = slots // num_layers if isinstance(slots, int) else min(slots)
    cache = SlotCache(
        slots,
        num_layers=num_layers,
        num_experts=num_experts,
        num_staging=policy.num_staging,
        eviction=make_eviction(policy.eviction),
        min_free=max(0, top_k - smallest),
    )
    cache.fill(ExpertKey(layer, expert) for layer in held for expert in held[layer])
    misses = MISSES.get(way, "load")
    splitter = None if misses == "load" else Splitter(costs, misses=misses)
    replay = Replay(cache, ModelledLink(costs.copy_s), step_s / num_layers, splitter)
    for choices in steps:
        for layer, choices_NTW in enumerate(choices):
            chosen = choices_NTW[0, :, :top_k]
            experts, tokens = np.unique(chosen[chosen >= 0], return_counts=True)
            ahead = [] if way == "compiled" else _ahead(layer, choices_NTW[1:], num_layers, way)
            replay.run_layer(layer, experts.tolist(), tokens.tolist(), ahead)
    return replay.now / len(steps)


def forecasts_s(
    model: "OffloadEngine", batch_size: int, ways: Iterable[Way], steps: Sequence[Choices]
) -> dict[Way, float]:
    """Seconds of a step for each way, with what is on the device now; none if they are unknown.

    Args:
      model: whose batch's prompts have been read.
      batch_size: of the batch.
      ways: to take decode steps.
      steps: what tokens chose (``last_steps``).
    """
    side, step_s = model.host_side, model.step_s.get(batch_size)
    if side is None or step_s is None or not steps:
        return {}
    forecasts = {}
    for way in ways:
        spared_s = model.num_layers * side.loop_s if way == "compiled" else 0.0
        try:
            forecasts[way] = forecast_s(
                way,
                steps,
                model.places.held(),
                model.plan.policy,
                side.costs,
                step_s=max(step_s - spared_s, step_s / 10),
                num_experts=model.config.router.num_experts,
                top_k=model.config.router.top_k,
            )
        except NoRoom:  # more experts at once than places, which go in several groups
            return {}
    return forecasts


def last_steps(
    choices: Choices,
    lengths: Sequence[int],
    batch_size: int,
    max_tokens: int = MAX_TOKENS,
    num_beams: int = 1,
) -> list[list[np.ndarray]]:
    """The last tokens of a batch of prompts, as the steps that would have decoded them.

    Args:
      choices: by layer, of a chunk: [1 + N, batch_size * length, W].
      lengths: valid tokens of each prompt in the chunk, from its start.
      batch_size: prompts.
      max_tokens: of each prompt at most.
      num_beams: of a prompt: so many neighbouring tokens make one step.
    """
    size = choices[0].shape[1] // batch_size
    num_steps = min(max_tokens, max(lengths, default=0))
    steps = []
    for back in range(num_steps, 0, -1):
        tokens = [b * size + n - back for b, n in enumerate(lengths) if n >= back]
        steps.append([choices_NTW[:, tokens] for choices_NTW in choices])
    groups = [steps[i : i + num_beams] for i in range(0, len(steps), num_beams)]
    return [
        [np.concatenate(by_layer, axis=1) for by_layer in zip(*group, strict=True)]
        for group in groups
    ]


def _ahead(
    layer: int, predicted_NTW: np.ndarray, num_layers: int, way: Way
) -> list[tuple[int, list[int]]]:
    distances = predicted_NTW[: 1 if way == "thread" else None]
    targets = range(layer + 1, min(num_layers, layer + 1 + len(distances)))
    return [(target, by_votes(ids_TW)) for target, ids_TW in zip(targets, distances, strict=False)]
