"""One token through a model whose experts come and go: a program and a read-back per layer.

For each layer the host learns from the device which experts the layer chose and which ones later
layers will probably choose; starts copies of the missing ones, then those of the predicted ones;
and only then dispatches the program that computes the layer and goes on to the next router: a copy
into new device memory waits for everything that was dispatched before it, so whatever should hide a
copy has to come after it.
"""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.expert_model import ExpertModel, Supply
from jmoe.engines.prediction import Predictor
from jmoe.models.kv_cache import LayerCache

# Takes the experts of the last layer, their ids, the layer's state, and outputs of its other
# experts; returns what is made of that.
Finish = Callable[..., jax.Array]


class DecodeLoop:
    """Takes steps of one token per sequence through all layers.

    Attributes:
      choices: of the last step, by layer: int32 [1 + N, T, W], chosen experts, then predicted ones.
    """

    def __init__(self, model: ExpertModel, batch_size: int, predictor: Predictor | None):
        self.choices: list[np.ndarray] = []
        self._model = model
        self._batch_size = batch_size
        self._predictor = predictor
        self._top_k = model.config.router.top_k
        # Of one token the experts are taken in its order, which the device knows.
        self._is_single = batch_size == 1

    def compile(self, caches: Sequence[LayerCache], token_ids_B: jax.ShapeDtypeStruct) -> None:
        """Compiles the programs of all layers but the end of the last one."""
        model, batch_size = self._model, self._batch_size
        lengths_B = model.abstract((batch_size,), "int32")
        valid_B = model.abstract((batch_size,), "bool")
        self.group = None if self._is_single else model.abstract((self._top_k,), "int32")
        self.blobs = (model.abstract_blob(),) * self._top_k
        self.routed = model.abstract_routed(batch_size, 1)
        y_shape = (batch_size, self._top_k, model.config.hidden_size)
        self.y_TKD = model.abstract(y_shape, "float32")
        self._first = model.program(
            layer_programs.first_layer,
            model.ends,
            model.layers[0],
            model.ahead(0),
            caches[0],
            token_ids_B,
            lengths_B,
            valid_B,
            layer=0,
        )
        self._next, self._next_after_some = [], []
        for layer in range(1, model.num_layers):
            for programs, y_TKD in ((self._next, None), (self._next_after_some, self.y_TKD)):
                if y_TKD is not None and self._is_single:
                    continue
                programs.append(
                    model.program(
                        layer_programs.next_layer,
                        self.blobs,
                        self.group,
                        self.routed,
                        y_TKD,
                        model.layers[layer],
                        model.ahead(layer),
                        caches[layer],
                        lengths_B,
                        valid_B,
                        layer=layer,
                    )
                )
        if not self._is_single:
            self._some = model.program(
                layer_programs.some_experts,
                self.blobs,
                self.group,
                self.routed,
                self.y_TKD,
                layer=0,
            )

    def run(
        self,
        experts: Supply,
        caches: list[LayerCache],
        token_ids_B: jax.Array,
        start_B: jax.Array,
        valid_B: jax.Array,
        finish: Finish,
    ) -> jax.Array:
        """Takes one token of each sequence through the model.

        Args:
          experts: where they come from.
          caches: by layer; donated, and replaced by the new ones.
          token_ids_B: the tokens.
          start_B: their positions.
          valid_B: sequences that are computed.
          finish: makes the result, after the last layer's router.
        """
        model = self._model
        timeline = experts.timeline
        self.choices = []
        routed, caches[0], choices = self._first(
            model.ends, model.layers[0], model.ahead(0), caches[0], token_ids_B, start_B, valid_B
        )
        dispatched = time.perf_counter()
        for layer in range(model.num_layers):
            # The only wait for the device. Nothing is done in between that an asynchronous copy
            # could hide behind, and on the CPU backend that takes 25 us more.
            choices_NTW = np.asarray(choices)
            self.choices.append(choices_NTW)
            if timeline is not None:
                timeline.span("device", f"layer {layer}", dispatched, time.perf_counter())
            blobs, group, y_TKD = self._experts(experts, layer, choices_NTW, routed)
            if layer + 1 < model.num_layers:
                programs = self._next if y_TKD is None else self._next_after_some
                routed, caches[layer + 1], choices = programs[layer](
                    blobs,
                    group,
                    routed,
                    y_TKD,
                    model.layers[layer + 1],
                    model.ahead(layer + 1),
                    caches[layer + 1],
                    start_B,
                    valid_B,
                )
                dispatched = time.perf_counter()
                del blobs  # or they would outlive their places
                experts.release()
            else:
                result = finish(blobs, group, routed, y_TKD)
                experts.release()
                return result
        raise AssertionError("a model has layers")

    def _experts(
        self,
        experts: Supply,
        layer: int,
        choices_NTW: np.ndarray,
        routed: layer_programs.Routed,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, jax.Array | None]:
        """Gets the experts of a layer, and applies those that are too many for one program.

        Returns:
          The last ones, their ids if there are several tokens, and outputs of the others.
        """
        if self._is_single:
            ids = choices_NTW[0, 0, : self._top_k].tolist()
            experts.need(layer, ids)
            self._predict(experts, layer, choices_NTW)
            return tuple(experts.take(layer, ids)), None, None

        used = sorted(set(choices_NTW[0].ravel().tolist()) - {-1})
        groups = [used[i : i + self._top_k] for i in range(0, len(used), self._top_k)]
        # Before the experts: copies to a GPU come one after another.
        groups_G = [self._put_group(ids) for ids in groups]
        fits = len(used) <= self._model.max_needed(layer)
        if fits:
            experts.need(layer, used)
            self._predict(experts, layer, choices_NTW)
        y_TKD = None
        for i, (ids, group_G) in enumerate(zip(groups, groups_G, strict=True)):
            is_last = i + 1 == len(groups)
            if not fits:
                experts.need(layer, ids)
                if is_last:
                    self._predict(experts, layer, choices_NTW)
            arrays = experts.take(layer, ids)
            # A last group that is not full: any expert will do for the rest, as none.
            blobs = tuple(arrays + arrays[:1] * (self._top_k - len(ids)))
            if is_last:
                return blobs, group_G, y_TKD
            if y_TKD is None:
                y_TKD = self._model.zeros(self.y_TKD)
            y_TKD = self._some(blobs, group_G, routed, y_TKD)
            if not fits:  # these experts are given up for the next group
                y_TKD.block_until_ready()
                del arrays, blobs
                experts.release()
        raise AssertionError("no sequence is active")

    def _put_group(self, ids: list[int]) -> jax.Array:
        """Ids of a group, filled up with -1."""
        return self._model.put(np.array(ids + [-1] * (self._top_k - len(ids)), np.int32))

    def _predict(self, experts: Supply, layer: int, choices_NTW: np.ndarray) -> None:
        experts.pass_layer(layer)
        if self._predictor is not None:
            experts.predict(self._predictor.predict(layer, choices_NTW[1:]))
