"""The experts of a layer in a decode step: from what its tokens chose to what a program takes.

Three forms, each a program of its own: *whole*, a program takes all experts that the layer needs;
*rest*, it takes the last ones, and outputs of those that were too many for it; *host*, it takes
outputs only, since the host computes some of the experts.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.expert_model import ExpertModel, Supply
from jmoe.engines.host_compute import HostCompute
from jmoe.engines.layer_programs import Group, Routed
from jmoe.engines.prediction import Predictor
from jmoe.planning.splitting import Splitting, Ways
from jmoe.residency.host_experts import HostExperts
from jmoe.residency.mailbox import Mailbox

Form = Literal["whole", "rest", "host"]


class LayerInputs(NamedTuple):
    """What programs take of a layer's experts: see ``layer_programs.next_layer``."""

    blobs: tuple[jax.Array, ...]
    group: Group | None
    routed: Routed
    y_TKD: jax.Array | None
    y_host_TKD: jax.Array | None

    @property
    def form(self) -> Form:
        if self.y_host_TKD is not None:
            return "host"
        return "whole" if self.y_TKD is None else "rest"


class Hybrid(NamedTuple):
    """What a layer needs if the host computes experts, too.

    Attributes:
      splitter: says which.
      host: computes them in the background.
      compute: does it, and has to be compiled before.
    """

    splitter: Splitting
    host: HostExperts
    compute: HostCompute


class LayerExperts:
    """Gets the experts of one layer after another, for batches of one size.

    Attributes:
      inputs: shapes of what programs take, by form; those forms that may occur.
      hybrid: computes experts on the host; None if the device computes all.
    """

    def __init__(
        self,
        model: ExpertModel,
        batch_size: int,
        predictor: Predictor | None,
        hybrid: Hybrid | None,
    ):
        self._model = model
        self._predictor = predictor
        self.hybrid = hybrid
        top_k = self._top_k = model.config.router.top_k
        # Of one token the experts are taken in its order, which the device knows.
        self._is_single = batch_size == 1
        self._shape = batch_size, top_k, model.config.hidden_size
        self._rows_R = np.arange(batch_size * top_k, dtype=np.int32)
        self._ids = model.expert_ids
        # Shapes stand for arrays.
        y_TKD: Any = model.abstract(self._shape, "float32")
        routed = model.abstract_routed(batch_size, 1)
        blobs: Any = (model.abstract_blob(),) * top_k
        group: Any = None if self._is_single else (model.abstract((), "int32"),) * top_k
        self.inputs: dict[Form, LayerInputs] = {
            "whole": LayerInputs(blobs, group, routed, None, None)
        }
        if not self._is_single:
            self.inputs["rest"] = LayerInputs(blobs, group, routed, y_TKD, None)
        self._mailbox: Mailbox | None = None
        if hybrid is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError, RuntimeError):
                self._mailbox = Mailbox(model.device, self._shape)
            y_host_TKD = self._mailbox.array if self._mailbox else y_TKD
            self.inputs["host"] = LayerInputs((), None, routed, y_TKD, y_host_TKD)

    def compile(self) -> None:
        """Compiles what computes experts alone."""
        model, (batch_size, top_k, _) = self._model, self._shape
        if self.hybrid is not None:
            self.hybrid.compute.compile(batch_size, batch_size * top_k)
        if len(self.inputs) == 1:
            return
        sizes = _group_sizes(top_k) if self.hybrid is not None else [top_k]
        routed = self.inputs["whole"].routed
        y_shape = model.abstract(self._shape, "float32")
        self._some = {
            (size, y_TKD is not None): model.program(
                layer_programs.some_experts,
                (model.abstract_blob(),) * size,
                (model.abstract((), "int32"),) * size,
                routed,
                y_TKD,
                layer=0,
            )
            for size in sizes
            for y_TKD in (None, y_shape)
        }
        self._zeros_TKD = model.zeros(y_shape)

    def get(
        self, experts: Supply, layer: int, choices_NTW: np.ndarray, routed: Routed
    ) -> LayerInputs:
        """Gets the experts of a layer, and applies those that are too many for one program.

        Args:
          experts: where they come from.
          layer: whose router has ended.
          choices_NTW: chosen experts, then predicted ones; see ``layer_programs.first_layer``.
          routed: state of the layer.

        Raises:
          TransferError: an expert could not be copied.
          ComputeError: the host failed to compute one.
        """
        chosen_TK = choices_NTW[0, :, : self._top_k]
        if self.hybrid is not None:
            used, tokens = np.unique(chosen_TK[chosen_TK >= 0], return_counts=True)
            ways = self.hybrid.splitter.split(experts, layer, used.tolist(), tokens.tolist())
            if ways.host:
                return self._get_with_host(experts, layer, choices_NTW, routed, ways, self.hybrid)
        if self._is_single:
            ids = chosen_TK[0].tolist()
            experts.need(layer, ids)
            self._predict(experts, layer, choices_NTW)
            return LayerInputs(tuple(experts.take(layer, ids)), None, routed, None, None)

        used = sorted(set(chosen_TK.ravel().tolist()) - {-1})
        groups = _groups(used, self._top_k)
        fits = len(used) <= self._model.max_needed(layer)
        if fits:
            experts.need(layer, used)
            self._predict(experts, layer, choices_NTW)
        y_TKD = None
        for i, ids in enumerate(groups):
            is_last = i + 1 == len(groups)
            if not fits:
                experts.need(layer, ids)
                if is_last:
                    self._predict(experts, layer, choices_NTW)
            if is_last:
                blobs, group = self._fill_up(experts.take(layer, ids), ids, self._top_k)
                return LayerInputs(blobs, group, routed, y_TKD, None)
            y_TKD = self._apply(experts, layer, ids, routed, y_TKD)
            if not fits:  # these experts are given up for the next group
                y_TKD.block_until_ready()
                experts.release()
        raise AssertionError("no sequence is active")

    def _get_with_host(
        self,
        experts: Supply,
        layer: int,
        choices_NTW: np.ndarray,
        routed: Routed,
        ways: Ways,
        hybrid: Hybrid,
    ) -> LayerInputs:
        """Has the host compute its share while the device computes what is there or comes."""
        chosen_A = choices_NTW[0, :, : self._top_k].ravel()
        ids_R = np.where(np.isin(chosen_A, ways.host), chosen_A, -1).astype(np.int32)
        hybrid.compute.expect(layer, ways.host)
        job = hybrid.host.start(layer, routed.normed_TD, self._rows_R, ids_R)
        others = [*ways.here, *ways.coming]
        fits = len(others) <= self._model.max_needed(layer)
        experts.need(layer, others if fits else [], elsewhere=ways.host)
        self._predict(experts, layer, choices_NTW)
        if hybrid.splitter.slots_pay:
            experts.keep(layer, ways.host, only_free=not hybrid.splitter.copies_pay)
        y_TKD = None
        # What is there first: it is computed while the others come.
        for ids in (*_groups(ways.here, self._top_k), *_groups(ways.coming, self._top_k)):
            if not fits:
                experts.need(layer, ids)
            y_TKD = self._apply(experts, layer, ids, routed, y_TKD)
            if not fits:
                y_TKD.block_until_ready()
                experts.release()
        if y_TKD is None:
            y_TKD = self._zeros_TKD
        y_host = hybrid.host.wait(job).reshape(self._shape)
        y_host_TKD = self._mailbox.post(y_host) if self._mailbox else self._model.put(y_host)
        return LayerInputs((), None, routed, y_TKD, y_host_TKD)

    def _apply(
        self,
        experts: Supply,
        layer: int,
        ids: list[int],
        routed: Routed,
        y_TKD: jax.Array | None,
    ) -> jax.Array:
        """Enters the outputs of a few experts."""
        size = min(size for size, _ in self._some if size >= len(ids))
        blobs, group = self._fill_up(experts.take(layer, ids), ids, size)
        return self._some[size, y_TKD is not None](blobs, group, routed, y_TKD)

    def _fill_up(
        self, arrays: list[jax.Array], ids: list[int], size: int
    ) -> tuple[tuple[jax.Array, ...], Group]:
        """Experts of a group that may not be full: any one will do for the rest, as none."""
        missing = size - len(ids)
        group = (*(self._ids[expert] for expert in ids), *(self._ids[-1],) * missing)
        return tuple(arrays + arrays[:1] * missing), group

    def _predict(self, experts: Supply, layer: int, choices_NTW: np.ndarray) -> None:
        experts.pass_layer(layer)
        if self._predictor is not None:
            predictions = self._predictor.predict(layer, choices_NTW[1:])
            in_time = self.hybrid.splitter.in_time if self.hybrid is not None else None
            experts.predict(predictions, in_time=in_time)


def _groups(ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]


def _group_sizes(top_k: int) -> list[int]:
    """Numbers of experts that there are programs for: powers of two, and all of a token's."""
    return sorted({1 << i for i in range(top_k.bit_length())} | {top_k})
