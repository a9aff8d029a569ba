"""Which experts to copy ahead of time, and how often that was right."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


class Predictor(Protocol):
    """Says in each layer which experts later layers will need."""

    def predict(self, layer: int, predicted_NTW: np.ndarray) -> Iterable[tuple[int, Sequence[int]]]:
        """Layers and their experts, the most urgent first.

        Args:
          layer: whose experts were chosen just now.
          predicted_NTW: what routers of the next N layers would choose for its residual stream,
            int32, -1 for none.
        """
        ...


class GatePredictor:
    """What the routers say: https://arxiv.org/abs/2312.17238, section 3.2."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers

    def predict(self, layer: int, predicted_NTW: np.ndarray) -> Iterable[tuple[int, Sequence[int]]]:
        for distance, ids_TW in enumerate(predicted_NTW[: self._num_layers - 1 - layer], 1):
            yield layer + distance, by_votes(ids_TW)


class OraclePredictor:
    """Knows what a run of the same tokens chose: how far could prefetching go?

    Calls are counted, one for each layer of each step: ``restart`` before every run.
    """

    def __init__(self, chosen_SLK: np.ndarray, num_ahead: int):
        """Args:
        chosen_SLK: ids by step and layer, as ``RoutingTrace.decode_expert_ids`` of one sequence.
        num_ahead: for how many layers to predict; those after the last one are the next token's.
        """
        num_layers = chosen_SLK.shape[1]
        chosen = chosen_SLK.reshape(-1, chosen_SLK.shape[2]).tolist()
        self._chosen = [(i % num_layers, experts) for i, experts in enumerate(chosen)]
        self._num_ahead = num_ahead
        self.restart()

    def restart(self) -> None:
        self._next = 0

    def predict(self, layer: int, predicted_NTW: np.ndarray) -> Iterable[tuple[int, Sequence[int]]]:
        # A generator: programs are warmed up with calls that nobody looks at, and do not count.
        assert self._next >= len(self._chosen) or self._chosen[self._next][0] == layer
        self._next += 1
        yield from self._chosen[self._next : self._next + self._num_ahead]


def by_votes(ids_TW: np.ndarray) -> list[int]:
    """The experts that occur, those first that most tokens name, then those named earlier."""
    if len(ids_TW) == 1:
        return [expert for expert in ids_TW[0].tolist() if expert >= 0]
    votes = Counter(expert for expert in ids_TW.T.ravel().tolist() if expert >= 0)
    return [expert for expert, _ in votes.most_common()]


class Recall:
    """Counts how many of the experts that layers chose had been predicted.

    By distance, the number of layers between prediction and layer, and by number of predictions
    per token.
    """

    def __init__(self, max_distance: int, num_predicted: int):
        self._found = np.zeros((max_distance, num_predicted), np.int64)
        self._chosen = np.zeros(max_distance, np.int64)

    def add(self, chosen_LTK: np.ndarray, predicted_LNTW: np.ndarray) -> None:
        """Enters one step.

        Args:
          chosen_LTK: int32 ids by layer, -1 for tokens that are not computed.
          predicted_LNTW: ids predicted in each layer for the N layers after it; what is predicted
            for layers beyond the last one is not looked at.
        """
        num_layers, num_predicted = len(chosen_LTK), self._found.shape[1]
        for d in range(min(len(self._chosen), num_layers - 1)):
            chosen = chosen_LTK[d + 1 :]
            predicted = predicted_LNTW[: num_layers - 1 - d, d, :, :num_predicted]
            is_chosen = chosen >= 0
            equal = (chosen[..., None] == predicted[:, :, None]) & is_chosen[..., None]
            self._found[d] += np.cumsum(np.count_nonzero(equal, axis=(0, 1, 2)))
            self._chosen[d] += np.count_nonzero(is_chosen)

    def rates(self) -> tuple[tuple[float, ...], ...]:
        """Recall by distance and number; distances that were never tried are left out."""
        return tuple(
            tuple((found / chosen).tolist())
            for found, chosen in zip(self._found, self._chosen, strict=True)
            if chosen
        )
