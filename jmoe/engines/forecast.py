"""How long a token will take, by the cost model, for each way of taking decode steps.

What a prompt's tokens chose is the best guess at what those after it will choose: so they are
replayed (``planning.replay``) as if they were decoded. Each half of them begins with the experts
that the other half used most: from those that are there now, which are the favourites of the very
tokens that are replayed, more would be found than by tokens yet to come.
"""

import statistics
from collections import Counter
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

# Steps that are timed with all experts on the device, after the first one; the fastest counts.
NUM_TIMED = 5

# Fewer steps are too few to say what is used most.
_MIN_HALF = 4

# By layer of one step: chosen experts, then those predicted for later layers, as
# ``DecodeLoop.choices``: int32 [1 + N, T, W].
Choices = Sequence[np.ndarray]


def step_times_s(
    ways: Sequence[Way],
    steps: Sequence[Choices],
    held: Mapping[int, Sequence[int]],
    policy: Policy,
    costs: ExpertCosts,
    *,
    step_s: Mapping[Way, float],
    num_experts: int,
    top_k: int,
) -> list[float]:
    """Seconds that each decode step takes.

    Args:
      ways: of taking each of them.
      steps: what tokens chose, those of all sequences in a step together.
      held: by layer the experts that have a slot at first, the most recently used last.
      policy: of places and prefetches; leaves nothing out.
      costs: of an expert.
      step_s: that a step takes in each way when all experts are on the device.
      num_experts: of a layer.
      top_k: experts of a token.
    """
    assert policy.slots is not None and policy.eviction is not None
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
    # As in the engine, which without a splitter copies what is predicted for any layer.
    splitter = None if policy.misses == "load" else Splitter(costs)
    replay = Replay(cache, ModelledLink(costs.copy_s), 0.0, splitter, top_k=top_k)
    by_loop = costs.fetch_s, costs.copying_s
    ends = [0.0]
    for way, choices in zip(ways, steps, strict=True):
        replay.layer_s = step_s[way] / num_layers
        replay.fetch_s, replay.copying_s = (0.0, 0.0) if way == "compiled" else by_loop
        if splitter is not None:
            splitter.misses = MISSES.get(way, "load")
        for layer, choices_NTW in enumerate(choices):
            chosen = choices_NTW[0, :, :top_k]
            experts, tokens = np.unique(chosen[chosen >= 0], return_counts=True)
            ahead = [] if way == "compiled" else _ahead(layer, choices_NTW[1:], num_layers)
            replay.run_layer(layer, experts.tolist(), tokens.tolist(), ahead)
        ends.append(replay.now)
    return np.diff(ends).tolist()


def forecasts_s(
    model: "OffloadEngine",
    batch_size: int,
    ways: Iterable[Way],
    steps: Sequence[Choices],
    held: Mapping[int, Sequence[int]],
) -> dict[Way, float]:
    """Seconds of a step for each way, after the prompts; none if they are unknown.

    Args:
      model: whose batch's prompts have been read.
      batch_size: of the batch.
      ways: to take decode steps.
      steps: what tokens chose (``last_steps``).
      held: experts with a slot after these tokens, by layer, the most recently used last.
    """
    if not steps:
        return {}
    top_k = model.config.router.top_k
    halves = rehearsals(steps, held, top_k)
    forecasts = {}
    for way in ways:
        times = [replay_s(model, batch_size, way, part, held) for held, part in halves]
        if not all(times):
            return {}
        forecasts[way] = statistics.fmean(seconds for part in times for seconds in part)
    return forecasts


def replay_s(
    model: "OffloadEngine",
    batch_size: int,
    ways: Way | Sequence[Way],
    steps: Sequence[Choices],
    held: Mapping[int, Sequence[int]],
) -> list[float]:
    """Seconds of each of these steps; none if they are unknown.

    Args:
      model: that takes them.
      batch_size: whose steps were timed (``model.step_s``).
      ways: of taking each, or one for all.
      steps: what tokens chose.
      held: experts with a slot at first, by layer, the most recently used last.
    """
    side, step_s = model.host_side, model.step_s.get(batch_size)
    if side is None or step_s is None:
        return []
    of_each: list[Way] = [ways] * len(steps) if isinstance(ways, str) else list(ways)
    compiled_s = max(step_s - model.num_layers * side.loop_s, step_s / 10)
    try:
        return step_times_s(
            of_each,
            steps,
            held,
            model.plan.policy,
            side.costs,
            step_s={way: compiled_s if way == "compiled" else step_s for way in of_each},
            num_experts=model.config.router.num_experts,
            top_k=model.config.router.top_k,
        )
    except NoRoom:  # one pool for all layers whose staging is full
        return []


def rehearsals(
    steps: Sequence[Choices], held: Mapping[int, Sequence[int]], top_k: int
) -> list[tuple[Mapping[int, Sequence[int]], Sequence[Choices]]]:
    """Halves of the steps, each with the experts that the other half used most.

    Args:
      steps: what tokens chose.
      held: experts with a slot after these tokens, by layer, the most recently used last.
      top_k: experts of a token.
    """
    middle = len(steps) // 2
    if middle < _MIN_HALF:
        return [(held, steps)]
    first, second = steps[:middle], steps[middle:]
    return [(_most_used(second, held, top_k), first), (_most_used(first, held, top_k), second)]


def _most_used(
    steps: Sequence[Choices], held: Mapping[int, Sequence[int]], top_k: int
) -> dict[int, list[int]]:
    """As many experts of each layer as are held, the most used last."""
    result = {}
    for layer, experts in held.items():
        chosen = np.concatenate([choices[layer][0, :, :top_k].ravel() for choices in steps])
        uses = Counter(chosen[chosen >= 0].tolist())
        order = {expert: i for i, expert in enumerate(reversed(experts))}
        candidates = sorted({*uses, *experts}, key=lambda e: (-uses[e], order.get(e, len(order))))
        result[layer] = candidates[: len(experts)][::-1]
    return result


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


def _ahead(layer: int, predicted_NTW: np.ndarray, num_layers: int) -> list[tuple[int, list[int]]]:
    targets = range(layer + 1, min(num_layers, layer + 1 + len(predicted_NTW)))
    return [
        (target, by_votes(ids_TW)) for target, ids_TW in zip(targets, predicted_NTW, strict=False)
    ]
