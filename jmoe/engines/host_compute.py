"""Experts computed on the host, by programs of the CPU backend, out of the store's own bytes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.engines.programs import ProgramCache
from jmoe.models.experts import experts_by_row
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import ExpertLayout
from jmoe.residency.host_experts import Tokens
from jmoe.store.expert_store import ExpertStore


@functools.partial(jax.jit, static_argnames=("layout", "activation", "top_k", "host"))
def host_rows(
    x_TD: Float[Array, "T D"],
    rows_R: Int[Array, " R"],
    ids_R: Int[Array, " R"],
    blobs_EI: jax.Array,
    *,
    layout: ExpertLayout,
    activation: str,
    top_k: int,
    host: HostKernels | None,
) -> Float[Array, "R D"]:
    """Takes assignments of a layer's tokens through their experts; see ``HostCompute``."""
    x_RD = x_TD[jnp.minimum(rows_R // top_k, x_TD.shape[0] - 1)]
    return experts_by_row(x_RD, ids_R, blobs_EI, layout, activation, host)


class HostCompute:
    """Computes experts where they lie; see ``residency.host_experts.Compute``."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        layout: ExpertLayout,
        store: ExpertStore,
        host: HostKernels | None,
    ):
        """Args:
        config: the model.
        dtype: of activations.
        layout: of blobs.
        store: whose blobs are read.
        host: kernels to compute with; None leaves it to XLA.
        """
        self._config = config
        self._dtype = dtype
        self._layout = layout
        self._store = store
        self._host = host
        self._device = jax.local_devices(backend="cpu")[0]
        self._programs = ProgramCache(self._device)
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._layers: dict[int, jax.Array] = {}

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Says that these will be computed now. By the engine's thread, before the job starts."""
        self._store.expect(layer, experts)

    def compile(self, num_tokens: int, num_rows: int) -> None:
        """Compiles the program for so many tokens and rows, if that was not done."""
        if (num_tokens, num_rows) in self._compiled:
            return
        config = self._config
        self._compiled[num_tokens, num_rows] = self._programs.get(
            host_rows,
            jax.ShapeDtypeStruct((num_tokens, config.hidden_size), jnp.dtype(self._dtype)),
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
            self._blobs(0),
            layout=self._layout,
            activation=config.hidden_act,
            top_k=config.router.top_k,
            host=self._host,
        )
        # Backends finish a program when it runs for the first time.
        x_TD = jnp.zeros((num_tokens, config.hidden_size), self._dtype)
        self(0, x_TD, np.zeros(num_rows, np.int32), np.full(num_rows, -1, np.int32))

    def __call__(
        self, layer: int, x_TD: Tokens, rows_R: np.ndarray, ids_R: np.ndarray, /
    ) -> np.ndarray:
        program = self._compiled[x_TD.shape[0], len(rows_R)]
        self._store.bring(layer, np.unique(ids_R[ids_R >= 0]).tolist())
        # Through numpy: the device may be another one.
        x_TD, rows_R, ids_R = jax.device_put((np.asarray(x_TD), rows_R, ids_R), self._device)
        return np.asarray(program(x_TD, rows_R, ids_R, self._blobs(layer)))

    def close(self) -> None:
        """Lets go of the store's memory; may be called again."""
        self._layers.clear()

    def _blobs(self, layer: int) -> jax.Array:
        """Of a layer: an array of the CPU backend that is the store's memory."""
        if layer not in self._layers:
            view = self._store.layer(layer).view(jnp.dtype(self._layout.dtype))
            self._layers[layer] = jax.device_put(view, self._device)
        return self._layers[layer]
