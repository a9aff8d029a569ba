"""What could be predicted of a recorded run: from the ids alone, by its own routers, or perfectly.

Every predictor gives one array, of the form that RoutingTrace.predictions has: what a layer is
predicted to use, by the layers before it. Prediction from ids alone is the floor: what routers
predict from the hidden state has to be better.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from jmoe.errors import RequestError
from jmoe.planning.traces import RoutingTrace

PredictorName = Literal["none", "oracle", "noisy", "recorded", "popularity", "markov"]
PREDICTORS: tuple[PredictorName, ...] = get_args(PredictorName)

# Of the popularity of experts, in what follows a pair that was seen rarely.
_PRIOR_TOKENS = 4


def predict(
    trace: RoutingTrace,
    name: str,
    lookahead: int,
    fetch: int,
    train: RoutingTrace | None = None,
    *,
    recall: Sequence[float] = (),
    seed: int = 0,
) -> np.ndarray:
    """Predictions for every token and layer of a trace.

    Args:
      trace: what is to be predicted.
      name: "none"; "oracle", the truth; "noisy", the truth with errors; "recorded", what is in the
        trace; "popularity", the experts that tokens of the layer use most; "markov", those that
        they use most after the two best experts of the layer that predicts.
      lookahead: number of distances, N.
      fetch: experts for each token and layer, W; oracle and noisy stop at top_k.
      train: the trace to learn from, for popularity and markov; None is the trace itself.
      recall: for noisy the share of needed experts that it predicts, by distance, with top_k of
        them. In place of each of the others is an expert that the token does not use; what is
        right at some distance is so at all with a higher recall.
      seed: of these errors.

    Returns:
      int16 [T, L, N, W], -1 for none. Nothing is predicted from one token to the next.

    Raises:
      RequestError: unknown name; or so many predictions are not recorded; or the recall is not
        known for every distance, or not possible.
    """
    if name not in PREDICTORS:
        raise RequestError(
            "unknown predictor",
            got=name,
            expected=" or ".join(PREDICTORS),
            do="choose one of these",
        )
    fetch = min(fetch, trace.num_experts)
    ids = trace.decode_expert_ids
    predictions = np.full((*ids.shape[:2], lookahead, fetch), -1, np.int16)
    if name == "none" or predictions.size == 0:
        return predictions
    if name == "recorded":
        return _recorded(trace, lookahead, fetch)
    if name == "noisy":
        return _noisy(trace, lookahead, fetch, recall, seed)
    train = trace if train is None else train
    _check_same_shape(trace, train)
    popularity = train.popularity()
    for d in range(lookahead):
        for layer in range(d + 1, trace.num_layers):
            if name == "oracle":
                predictions[:, layer, d, : trace.top_k] = ids[:, layer, :fetch]
            elif name == "popularity":
                predictions[:, layer, d] = _best(popularity[layer], fetch)
            else:
                before = layer - d - 1
                seen, counts = _followers(train, before, layer, popularity[layer])
                pairs = _pairs(trace, before)
                row = np.minimum(np.searchsorted(seen, pairs), len(seen) - 1)
                row = np.where(seen[row] == pairs, row, -1)
                predictions[:, layer, d] = _best(counts, fetch)[row]
    return predictions


def recall(trace: RoutingTrace, predictions: np.ndarray) -> np.ndarray:
    """Share of the needed experts that were predicted: float64 [N, W], by number fetched.

    Layers that a distance cannot reach are not counted; 0 if there are none.
    """
    num_distances, width = predictions.shape[2:]
    rates = np.zeros((num_distances, width))
    for d in range(num_distances):
        needed = trace.decode_expert_ids[:, d + 1 :, None, :].astype(np.int16)
        found = (predictions[:, d + 1 :, d, :, None] == needed).any(-1)
        if needed.size:
            rates[d] = np.cumsum(found.sum((0, 1))) / needed.size
    return rates


def _recorded(trace: RoutingTrace, lookahead: int, fetch: int) -> np.ndarray:
    recorded = trace.predictions
    if recorded is None:
        raise RequestError(
            "the trace has no predictions",
            do="record it with prefetching, or use another predictor",
        )
    if recorded.shape[2] < lookahead or recorded.shape[3] < fetch:
        raise RequestError(
            "the trace has fewer predictions",
            got=f"{lookahead} layers ahead, {fetch} experts",
            expected=f"at most {recorded.shape[2]} layers, {recorded.shape[3]} experts",
        )
    return recorded[:, :, :lookahead, :fetch]


def _noisy(
    trace: RoutingTrace, lookahead: int, fetch: int, recall: Sequence[float], seed: int
) -> np.ndarray:
    if len(recall) != lookahead or not all(0 <= share <= 1 for share in recall):
        raise RequestError(
            "a noisy prediction needs its recall for every distance",
            got=", ".join(f"{share:g}" for share in recall) or "none",
            expected=f"{lookahead} shares from 0 to 1, of the layer ahead first",
        )
    ids, num_experts, top_k = trace.decode_expert_ids, trace.num_experts, trace.top_k
    rng = np.random.default_rng(seed)
    # The experts of a layer in any order, but those that the token uses last.
    order_TLE = rng.random((*ids.shape[:2], num_experts))
    np.put_along_axis(order_TLE, ids.astype(np.int64), 2.0, axis=-1)
    wrong_TLW = np.argsort(order_TLE, axis=-1)[..., :top_k].astype(np.int16)
    wrong_TLW[..., num_experts - top_k :] = -1  # all others are in use
    luck_TLK = rng.random(ids.shape)
    predictions = np.full((*ids.shape[:2], lookahead, fetch), -1, np.int16)
    for d, share in enumerate(recall):
        named = np.where(luck_TLK < share, ids, wrong_TLW)
        predictions[:, d + 1 :, d, :top_k] = named[:, d + 1 :, :fetch]
    return predictions


def _check_same_shape(trace: RoutingTrace, train: RoutingTrace) -> None:
    shapes = [(t.num_layers, t.num_experts, t.top_k) for t in (trace, train)]
    if shapes[0] != shapes[1]:
        raise RequestError(
            "the trace to learn from is of another model",
            got="{} layers of {} experts, top {}".format(*shapes[1]),
            expected="{} layers of {} experts, top {}".format(*shapes[0]),
        )


def _pairs(trace: RoutingTrace, layer: int) -> np.ndarray:
    """A number for the two best experts of a layer, in any order: [T]."""
    best = np.sort(trace.decode_expert_ids[:, layer, :2].astype(np.int64), axis=-1)
    return best[:, 0] * trace.num_experts + best[:, -1]


def _followers(
    train: RoutingTrace, layer: int, target: int, popularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a layer, ascending, and how often which expert of a later layer comes after.

    float64 [pairs + 1, E]; the last row is for pairs that do not occur.
    """
    pairs = _pairs(train, layer)
    seen, row = np.unique(np.append(pairs, -1), return_inverse=True)
    flat = (row[:-1, None] - 1) * train.num_experts + train.decode_expert_ids[:, target]
    counts = np.bincount(flat.reshape(-1), minlength=len(seen) * train.num_experts)
    prior = _PRIOR_TOKENS * popularity / max(1, train.num_tokens)
    return seen[1:], counts.reshape(len(seen), train.num_experts) + prior


def _best(scores: np.ndarray, number: int) -> np.ndarray:
    """The experts of the highest scores, best first; ties go to the lowest id."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :number]
