"""What this machine can do at best: read memory, and multiply matrices.

Both are measured in the run that they are compared with, and again beside every repetition. The
best of a few readings counts: a disturbance can only lower it.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from _bench.statistics import take_turns
from jmoe import native
from jmoe.models.linear import linear
from jmoe.native import ops
from jmoe.planning.machine import num_threads
from jmoe.quant.layout import aligned_empty

_THOROUGH = 9  # repetitions
_CPU_READ_BYTES = 2**29  # far beyond any cache that a few cores share
_DEVICE_READ_BYTES = 2**30
_CPU_MATMUL_SIZE = 2048
_DEVICE_MATMUL_SIZE = 8192


class Ceiling:
    """Arrays to measure with, again and again.

    Attributes:
      read_how: what was found to read fastest.
      matmul_how: what is multiplied.
    """

    def __init__(self, device: jax.Device, dtype: str):
        is_cpu = device.platform == "cpu"
        self._num_bytes = _CPU_READ_BYTES if is_cpu else _DEVICE_READ_BYTES
        # Aligned, XLA takes it as it is. A copy would lie in small pages, and be read more slowly.
        array = aligned_empty((self._num_bytes // 4,), np.float32)
        array[:] = 1
        on_device = jax.device_put(array, device)
        gib = f"{self._num_bytes / 2**30:g} GiB"
        reads: dict[str, Callable[[], Any]] = {f"jitted sum of {gib}": lambda: _sum(on_device)}
        if is_cpu:
            # Of numpy's reductions the one with the least arithmetic per byte.
            slices = np.array_split(array.view(np.int64), num_threads())
            pool = ThreadPoolExecutor(num_threads())
            reads[f"numpy bitwise or of {gib} in {num_threads()} threads"] = lambda: list(
                pool.map(np.bitwise_or.reduce, slices)
            )
            if native.status().available:
                reads[f"host kernel's sum of {gib} in {num_threads()} threads"] = lambda: _read(
                    on_device
                )
        turns = take_turns(
            {how: lambda read=read: _best(read, 1) for how, read in reads.items()},
            repeats=_THOROUGH,
            warmup=1,
        )
        seconds = {how: min(times) for how, times in turns.items()}
        self._rates = {how: self._num_bytes / best for how, best in seconds.items()}
        self.read_how = min(seconds, key=lambda how: seconds[how])
        self._read = reads[self.read_how]

        size = _CPU_MATMUL_SIZE if is_cpu else _DEVICE_MATMUL_SIZE
        x = jax.device_put(jnp.ones((size, size), dtype), device)
        self._flop = 2 * size**3
        self._multiply = lambda: _multiply(x, x)
        self.matmul_how = f"{dtype} {size} x {size} x {size} through XLA, summed in float32"
        self.matmul_flop_per_s()

    def read_bytes_per_s(self, repeats: int = 3) -> float:
        return self._num_bytes / _best(self._read, repeats)

    def matmul_flop_per_s(self, repeats: int = 3) -> float:
        return self._flop / _best(self._multiply, repeats)

    def to_json(self) -> dict[str, Any]:
        """Measures both, thoroughly."""
        return {
            "read_bytes_per_s": self.read_bytes_per_s(_THOROUGH),
            "read_how": self.read_how,
            "reads": self._rates,
            "matmul_flop_per_s": self.matmul_flop_per_s(_THOROUGH),
            "matmul_how": self.matmul_how,
            "num_threads": num_threads(),
        }


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)


@jax.jit
def _read(x: jax.Array) -> jax.Array:
    return ops.read(x)


@jax.jit
def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    return linear(x, w)


def _best(run: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest repetition."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds)
