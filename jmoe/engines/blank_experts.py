"""Experts of zeros, with which the programs of the offload engine are run for the first time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from jmoe.engines.expert_model import ExpertModel
from jmoe.residency.experts import Outlook
from jmoe.residency.timeline import Timeline


class BlankExperts:
    """Stands for a model's experts while its programs are run for the first time: all zeros."""

    def __init__(self, model: ExpertModel):
        self.timeline: Timeline | None = None
        self._blob = model.zeros(model.abstract_blob())

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook:
        return Outlook(list(experts), {}, 0.0)

    def need(self, layer: int, experts: Sequence[int], elsewhere: Sequence[int] = ()) -> None:
        pass

    def keep(self, layer: int, experts: Sequence[int], only_free: bool = False) -> None:
        pass

    def fill(self, layer: int, wanted: Sequence[int]) -> None:
        pass

    def foresee(self, predictions: Iterable[tuple[int, Sequence[int]]]) -> None:
        pass

    def predict(
        self,
        predictions: Iterable[tuple[int, Sequence[int]]],
        fence: Callable[[], None] | None = None,
        in_time: Callable[[int, int], bool] | None = None,
    ) -> None:
        pass

    def pass_layer(self, layer: int) -> None:
        pass

    def release(self) -> None:
        pass

    def take(self, layer: int, experts: Sequence[int]) -> list[jax.Array]:
        return [self._blob] * len(experts)

    def stream(
        self, layer: int, experts: Sequence[int], wanted: Sequence[int], fence: Callable[[], None]
    ) -> Iterator[tuple[int, jax.Array, bool]]:
        return ((expert, self._blob, True) for expert in experts)
