"""An array that the host writes and programs on a device read, past the queue of copies.

Copies from ordinary memory to a GPU go one after another, experts of a hundred megabytes among
them; a program that reads page-locked memory copies it by itself, on a stream of its own. So what
the host has computed arrives at once. The memory is written while JAX holds it to be constant:
sound, since the program that reads it has ended before the next value is written.
"""

import ctypes
import math

import jax
import numpy as np


class Mailbox:
    """Holds one value; the next one replaces it.

    Attributes:
      array: what programs take; float32. Its memory kind is pinned_host.
    """

    def __init__(self, device: jax.Device, shape: tuple[int, ...]):
        """Raises JaxRuntimeError, ValueError or RuntimeError if there is no such memory."""
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        zeros = np.zeros(shape, np.float32)
        self.array = jax.block_until_ready(jax.device_put(zeros, sharding))
        pointer = self.array.unsafe_buffer_pointer()
        if np.asarray(self.array).ctypes.data != pointer:
            raise RuntimeError("numpy gets a copy of a pinned_host array")
        memory = (ctypes.c_float * math.prod(shape)).from_address(pointer)
        self._view = np.ctypeslib.as_array(memory).reshape(shape)

    def post(self, value: np.ndarray) -> jax.Array:
        """Puts a value in; nobody may read the one before any more."""
        self._view[...] = value
        return self.array
