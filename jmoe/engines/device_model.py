"""A model whose parameters all live on one device, and the programs compiled for it."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.programs import ProgramCache
from jmoe.models.experts import choose_form
from jmoe.native.choice import HostKernels
from jmoe.quant.layout import aligned_empty, is_aligned
from jmoe.quant.spec import QuantSpec

# From which numpy asks for large pages.
LARGE_BYTES = 4 * 2**20


def adopt(array: np.ndarray | jax.Array, device: jax.Device) -> jax.Array:
    """Moves a parameter to a device; on the CPU backend, a large one to large pages.

    XLA's own buffers have small pages, of which memory reads a tenth slower. An aligned numpy array
    is taken over there without a copy, and must not be changed afterwards.
    """
    is_large = device.platform == "cpu" and array.nbytes >= LARGE_BYTES
    if is_large and not (isinstance(array, np.ndarray) and is_aligned(array)):
        copy = aligned_empty(array.shape, array.dtype)
        copy[...] = array
        array = copy
    return jax.device_put(array, device)


class DeviceModel:
    """Weights and programs of one model on one device.

    Attributes:
      config: the model.
      dtype: of activations, KV cache and plain parameters: "float32" or "bfloat16".
      quant: formats of the quantized parameters; None if all are plain.
      device: where it runs.
      host: kernels that compute instead of XLA, on the CPU backend; None without.
      parameters: flat tuple of arrays in the order of ``decoder.abstract_parameters``.
      programs: what has been compiled so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Iterable[np.ndarray | jax.Array],
        dtype: str,
        device: jax.Device,
        quant: QuantSpec | None = None,
        host: HostKernels | None = None,
    ):
        """Moves the parameters to the device one by one, as the iterable yields them."""
        self.config = config
        self.dtype = dtype
        self.quant = quant
        self.host = host
        self.device = device
        self.parameters = tuple(adopt(parameter, device) for parameter in parameters)
        self.programs = ProgramCache(device)

    @property
    def parameter_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def put(self, array: Any) -> jax.Array:
        """Copies an array to the device."""
        return jax.device_put(array, self.device)

    def static_arguments(self, num_tokens: int) -> dict[str, Any]:
        """What programs for so many tokens are specialised to."""
        form = choose_form(num_tokens, self.config, self.device.platform)
        return self.model_arguments() | {"form": form}

    def model_arguments(self) -> dict[str, Any]:
        """What every program is specialised to."""
        return {
            "config": self.config,
            "dtype": self.dtype,
            "quant": self.quant,
            "host": self.host,
        }
