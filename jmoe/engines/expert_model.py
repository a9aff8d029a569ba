"""A model whose experts are in host memory and, as many as there is room for, on a device."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.device_model import adopt
from jmoe.engines.layer_programs import LayerStatic, Routed
from jmoe.engines.programs import ProgramCache
from jmoe.generation.sampling import SamplingKind
from jmoe.models.decoder import abstract_parameters
from jmoe.native.choice import HostKernels
from jmoe.planning.policy import Policy
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import QuantSpec
from jmoe.residency.experts import MAX_IN_FLIGHT, DeviceExperts, Outlook
from jmoe.residency.switching import SwitchingExperts
from jmoe.residency.timeline import Timeline


class PromptSupply(Protocol):
    """Where prompts get experts from: ``DeviceExperts``, which explains it, or another one."""

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook: ...
    def fill(self, layer: int, wanted: Sequence[int]) -> None: ...
    def foresee(self, predictions: Iterable[tuple[int, Sequence[int]]]) -> object: ...
    def predict(
        self,
        predictions: Iterable[tuple[int, Sequence[int]]],
        fence: Callable[[], None] | None = None,
        in_time: Callable[[int, int], bool] | None = None,
    ) -> None: ...
    def stream(
        self, layer: int, experts: Sequence[int], wanted: Sequence[int], fence: Callable[[], None]
    ) -> Iterator[tuple[int, jax.Array, bool]]: ...


class Supply(PromptSupply, Protocol):
    """And decode steps in a loop over layers."""

    @property
    def timeline(self) -> Timeline | None: ...
    def need(self, layer: int, experts: Sequence[int], elsewhere: Sequence[int] = ()) -> None: ...
    def keep(self, layer: int, experts: Sequence[int], only_free: bool = False) -> None: ...
    def take(self, layer: int, experts: Sequence[int]) -> list[jax.Array]: ...
    def pass_layer(self, layer: int) -> None: ...
    def release(self) -> None: ...


class ExpertModel:
    """Weights without experts, and programs, of one model on one device.

    Attributes:
      config: the model.
      dtype: of activations, KV cache and plain parameters.
      quant: formats; experts are blobs.
      device: where it runs.
      host: kernels that compute instead of XLA, on the CPU backend.
      layout: of blobs.
      ends: parameters of no layer.
      layers: parameters of each layer but its experts.
      places: the experts on the device, and how decode steps see them.
      lookahead: for how many later layers experts are predicted.
      num_predicted: experts per token that are predicted for each.
      programs: what has been compiled so far.
      last_programs: what was asked for since somebody cleared it.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Iterable[np.ndarray | jax.Array],
        dtype: str,
        device: jax.Device,
        quant: QuantSpec,
        host: HostKernels | None,
        policy: Policy,
    ):
        """Moves the parameters to the device one by one, but blobs, which stay where they are.

        Args:
          parameters: in the order of ``decoder.abstract_parameters``; blobs may be of any kind of
            host memory, and are kept as ``host_layers``.
          policy: that leaves nothing out.
        """
        self.config = config
        self.dtype = dtype
        self.quant = quant
        self.device = device
        self.host = host
        self.layout = ExpertLayout.of(config.hidden_size, config.intermediate_size, quant)
        assert policy.lookahead is not None
        self.lookahead: int = policy.lookahead
        self.num_predicted = policy.fetch
        self.programs = ProgramCache(device)
        self.last_programs: list[jax.stages.Compiled] = []
        self.host_layers: list[np.ndarray] = []
        ends: list[jax.Array] = []
        layers: list[list[jax.Array]] = [[] for _ in range(config.num_hidden_layers)]
        names = abstract_parameters(config, dtype, quant)
        for name, parameter in zip(names, parameters, strict=True):
            if name.endswith(".blobs"):
                self.host_layers.append(np.asarray(parameter))
            elif name.startswith("layers."):
                layers[int(name.split(".")[1])].append(adopt(parameter, device))
            else:
                ends.append(adopt(parameter, device))
        self.ends = tuple(ends)
        self.layers = tuple(map(tuple, layers))
        self.places: SwitchingExperts

    @property
    def experts(self) -> DeviceExperts:
        """Experts in arrays of their own."""
        return self.places.experts

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def parameter_bytes(self) -> int:
        """Of what is always on the device."""
        return sum(array.nbytes for array in jax.tree.leaves((self.ends, self.layers)))

    def put(self, array: Any) -> jax.Array:
        """Copies an array to the device."""
        return jax.device_put(array, self.device)

    def zeros(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(like.shape, like.dtype, device=self.device)

    @functools.cached_property
    def expert_ids(self) -> tuple[jax.Array, ...]:
        """The number of every expert as an array on the device, and -1 behind them."""
        num_experts = self.config.router.num_experts
        return tuple(self.put(np.int32(i)) for i in (*range(num_experts), -1))

    def ahead(self, layer: int) -> tuple[tuple[jax.Array, ...], ...]:
        """Parameters of the layers after this one whose experts are predicted in it.

        Always as many, so that all layers run the same program: what is predicted for layers
        beyond the last one is not used.
        """
        last = self.num_layers - 1
        return tuple(self.layers[min(layer + 1 + i, last)] for i in range(self.lookahead))

    def max_needed(self, layer: int) -> int:
        """How many experts of a layer can be needed at once."""
        cache = self.experts.cache
        slots = cache.slots if isinstance(cache.slots, int) else cache.slots[layer]
        return slots + cache.num_staging - MAX_IN_FLIGHT

    def program(self, program: Any, *args: Any, layer: int, **static: Any) -> jax.stages.Compiled:
        """Compiles a program of layer_programs, for the attention of a layer if it has one."""
        compiled = self.programs.get(program, *args, static=self.static(layer), **static)
        self.last_programs.append(compiled)
        return compiled

    def static(self, layer: int) -> LayerStatic:
        """What the programs of a layer are compiled for."""
        return self._statics[layer]

    @functools.cached_property
    def _statics(self) -> tuple[LayerStatic, ...]:
        return tuple(
            LayerStatic(
                config=self.config,
                dtype=self.dtype,
                quant=self.quant,
                host=self.host,
                platform=self.device.platform,
                window=window,
                num_predicted=self.num_predicted,
            )
            for window in self.config.sliding_windows
        )

    def abstract(self, shape: Sequence[int], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))

    def abstract_seen(self, batch_size: int, kind: SamplingKind) -> jax.ShapeDtypeStruct | None:
        """Of the tokens that each sequence has so far, if sampling looks at them."""
        return (
            self.abstract((batch_size, self.config.vocab_size), "bool") if kind.penalized else None
        )

    def abstract_blob(self) -> jax.ShapeDtypeStruct:
        return self.abstract((self.layout.num_items,), self.layout.dtype)

    def abstract_routed(self, batch_size: int, num_positions: int) -> Routed:
        hidden, top_k = self.config.hidden_size, self.config.router.top_k
        num_tokens = batch_size * num_positions
        return Routed(
            x_BLD=self.abstract((batch_size, num_positions, hidden), self.dtype),  # type: ignore[arg-type]
            normed_TD=self.abstract((num_tokens, hidden), self.dtype),  # type: ignore[arg-type]
            weights_TK=self.abstract((num_tokens, top_k), "float32"),  # type: ignore[arg-type]
            ids_TK=self.abstract((num_tokens, top_k), "int32"),  # type: ignore[arg-type]
        )
