"""One token through a model whose experts come and go: a program and a read-back per layer.

For each layer the host learns from the device which experts the layer chose and which ones later
layers will probably choose; starts copies of the missing ones, then those of the predicted ones;
and only then dispatches the program that computes the layer and goes on to the next router: a copy
into new device memory waits for everything that was dispatched before it, so whatever should hide a
copy has to come after it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.expert_model import ExpertModel, Supply
from jmoe.engines.layer_experts import Form, Hybrid, LayerExperts, LayerInputs
from jmoe.engines.prediction import Predictor
from jmoe.models.kv_cache import LayerCache

# Makes something of the last layer and its experts.
Finish = Callable[[LayerInputs], Any]


class DecodeLoop:
    """Takes steps of one token per sequence through all layers.

    Attributes:
      choices: of the last step, by layer: int32 [1 + N, T, W], chosen experts, then predicted ones.
    """

    def __init__(
        self,
        model: ExpertModel,
        batch_size: int,
        predictor: Predictor | None,
        hybrid: Hybrid | None = None,
    ):
        self.choices: list[np.ndarray] = []
        self._model = model
        self._batch_size = batch_size
        self._experts = LayerExperts(model, batch_size, predictor, hybrid)

    @property
    def inputs(self) -> dict[Form, LayerInputs]:
        """Shapes of what programs take of a layer's experts."""
        return self._experts.inputs

    @contextlib.contextmanager
    def using(self, hybrid: Hybrid | None) -> Iterator[None]:
        """Splits experts in another way within."""
        before, self._experts.hybrid = self._experts.hybrid, hybrid
        try:
            yield
        finally:
            self._experts.hybrid = before

    def compile(self, caches: Sequence[LayerCache], token_ids_B: jax.ShapeDtypeStruct) -> None:
        """Compiles the programs of all layers but the end of the last one."""
        model, batch_size = self._model, self._batch_size
        lengths_B = model.abstract((batch_size,), "int32")
        valid_B = model.abstract((batch_size,), "bool")
        self._experts.compile()
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
        self._next = [
            {
                form: model.program(
                    layer_programs.next_layer,
                    *inputs,
                    model.layers[layer],
                    model.ahead(layer),
                    caches[layer],
                    lengths_B,
                    valid_B,
                    layer=layer,
                )
                for form, inputs in self.inputs.items()
            }
            for layer in range(1, model.num_layers)
        ]

    def run(
        self,
        experts: Supply,
        caches: list[LayerCache],
        token_ids_B: jax.Array,
        start_B: jax.Array,
        valid_B: jax.Array,
        finish: Finish,
    ) -> Any:
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
            inputs = self._experts.get(experts, layer, choices_NTW, routed)
            if layer + 1 < model.num_layers:
                routed, caches[layer + 1], choices = self._next[layer][inputs.form](
                    *inputs,
                    model.layers[layer + 1],
                    model.ahead(layer + 1),
                    caches[layer + 1],
                    start_B,
                    valid_B,
                )
                dispatched = time.perf_counter()
                del inputs  # or experts would outlive their places
                experts.release()
            else:
                result = finish(inputs)
                experts.release()
                return result
        raise AssertionError("a model has layers")
