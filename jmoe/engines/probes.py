"""What calibration repeats on a machine: copies, reads and dispatches, each as engines do them.

Every function here makes something to be timed: called with a number, it does it so many times and
waits for the end.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.programs import ProgramCache
from jmoe.errors import ConfigError
from jmoe.models.random_weights import fill_blobs
from jmoe.native import library, ops
from jmoe.native.choice import HostKernels
from jmoe.planning.machine import cache_bytes
from jmoe.planning.memory import available_host_bytes
from jmoe.quant.layout import ALIGNMENT, ExpertLayout
from jmoe.quant.spec import QuantSpec
from jmoe.residency.link import Link
from jmoe.store.expert_store import ExpertStore
from jmoe.store.host_memory import allocate

Run = Callable[[int], object]

# Memory that is read in turn is so many times larger than the processors' caches.
_TIMES_CACHE = 3
_MAX_ARENA_BYTES = 1 << 30
_MAX_BLOBS = 1024
_MAX_READ_BYTES = 1 << 28
# As many arguments as the program of a layer has.
_NUM_ARGUMENTS = 24


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is calibrated: a machine, for the experts of a model.

    Attributes:
      device: of the model.
      config: of the model.
      dtype: of activations.
      quant: formats of weights; experts are blobs.
      host: kernels that the host computes with; None leaves it to XLA.
    """

    device: jax.Device
    config: ModelConfig
    dtype: str
    quant: QuantSpec
    host: HostKernels | None

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.config.hidden_size, self.config.intermediate_size, self.quant)

    @property
    def activation_bits(self) -> int:
        """Of host kernels; 0 without."""
        return self.host.activation_bits if self.host else 0

    @property
    def is_cpu(self) -> bool:
        """Whether the device is the host."""
        return self.device.platform == "cpu"

    @property
    def num_experts(self) -> int:
        """Of the model, in all layers."""
        return self.config.num_hidden_layers * self.config.router.num_experts

    @property
    def is_cached(self) -> bool:
        """Whether the model's experts stay in the processors' caches from token to token."""
        return 2 * self.num_experts * self.layout.num_bytes <= cache_bytes()

    def host_device(self) -> jax.Device:
        """The processor, as JAX sees it (ConfigError: it does not)."""
        if self.is_cpu:
            return self.device
        try:
            return jax.local_devices(backend="cpu")[0]
        except RuntimeError:
            raise ConfigError(
                "JAX has no CPU backend here, and so nothing for the host to compute with",
                do=f"set JAX_PLATFORMS={self.device.platform},cpu",
            ) from None


class Arena:
    """Experts in host memory, too many for any cache of a processor, as engines keep them there.

    Attributes:
      store: that holds them as one layer, locked for copies to the device.
      blobs: the same, uint8 [num_blobs, layout.num_bytes].
    """

    def __init__(self, subject: Subject, *, min_bytes: int = 0):
        """Args:
          subject: whose experts.
          min_bytes: least size of it all.

        Raises:
          CapacityError: there is no memory for two experts.
        """
        layout, available_bytes = subject.layout, available_host_bytes()
        wanted = min(_TIMES_CACHE * cache_bytes(), _MAX_ARENA_BYTES, available_bytes // 4)
        num_blobs = max(2, -(-max(wanted, min_bytes) // layout.num_bytes))
        memory = allocate(min(num_blobs, _MAX_BLOBS) * layout.num_bytes)
        blobs = [memory.reshape(-1, layout.num_bytes)]
        del memory
        fill_blobs(layout, blobs[0])
        self.store = ExpertStore(layout, blobs, "ram", "measured", spare_bytes=available_bytes)
        blobs.clear()  # they may move
        self.store.lock_pages(subject.device)
        self.blobs = self.store.layer(0)

    @property
    def memory(self) -> np.ndarray:
        """All of it, uint8."""
        return self.blobs.reshape(-1)

    def pieces(self, num_bytes: int) -> Iterator[np.ndarray]:
        """Pieces of such a size, one after another without end; no larger than it is."""
        memory = self.memory
        assert num_bytes <= memory.size
        for i in itertools.count():
            start = i * num_bytes % (memory.size - num_bytes + ALIGNMENT)
            start -= start % ALIGNMENT
            yield memory[start : start + num_bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.store.close()


def settle(subject: Subject) -> None:
    """Lets JAX give back memory of numpy's, as it does when it is called the next time."""
    jax.device_put(np.zeros(1, np.uint8), subject.device).block_until_ready()


def copy_to_device(link: Link, arena: Arena, num_bytes: int) -> Run:
    """One copy over a link, from start to arrival; and giving up the one before, as engines do."""
    pieces = arena.pieces(num_bytes)
    held: list[jax.Array] = []

    def run(num: int) -> None:
        for _ in range(num):
            held.clear()
            held.append(link.start(next(pieces)))
            link.finish(held[0])

    return run


def copy_to_host(device: jax.Device, num_bytes: int) -> tuple[Run, Callable[[], None]]:
    """Reading a result on the host; and what makes one to be read, once for each time."""
    zeros = jnp.zeros(num_bytes // 4, jnp.float32, device=device)
    add = ProgramCache(device).get(_add, zeros)
    results: list[jax.Array] = []  # an array keeps what was read of it

    def prepare() -> None:
        results.append(add(zeros).block_until_ready())

    def run(num: int) -> None:
        assert num == 1
        np.asarray(results.pop())

    return run, prepare


def read_host(subject: Subject, memory: np.ndarray) -> tuple[Run, int]:
    """Reading host memory, as fast as it gives, and how many bytes that are."""
    return _read_by(subject.host_device(), memory, subject.host)


def read_device(subject: Subject, memory: np.ndarray) -> tuple[Run, int]:
    """Likewise of device memory, with the same contents."""
    return _read_by(subject.device, memory, subject.host)


def _read_by(device: jax.Device, memory: np.ndarray, host: HostKernels | None) -> tuple[Run, int]:
    num_bytes = min(_MAX_READ_BYTES, memory.size) // ALIGNMENT * ALIGNMENT
    array = jax.device_put(memory[:num_bytes].view(np.uint32), device)
    programs = ProgramCache(device)
    if device.platform == "cpu" and library.library() is not None:
        program = programs.get(_read, array, num_threads=host.num_threads if host else 0)
    else:
        program = programs.get(_sum, array)

    def run(num: int) -> None:
        for _ in range(num):
            jax.block_until_ready(program(array))

    return run, num_bytes


def round_trip(device: jax.Device) -> Run:
    """Dispatching a small program, and reading its result on the host."""
    zeros = jnp.zeros(8, jnp.int32, device=device)
    program = ProgramCache(device).get(_add, zeros)

    def run(num: int) -> None:
        for _ in range(num):
            np.asarray(program(zeros))

    return run


def dispatch(device: jax.Device) -> Run:
    """Dispatching small programs, each with the result of the one before."""
    zeros = jnp.zeros(8, jnp.int32, device=device)
    arrays = (zeros,) * _NUM_ARGUMENTS
    program = ProgramCache(device).get(_add_to_first, zeros, arrays)

    def run(num: int) -> None:
        last = zeros
        for _ in range(num):
            last = program(last, arrays)
        last.block_until_ready()

    return run


@jax.jit
def _add(array: jax.Array) -> jax.Array:
    return array + 1


@jax.jit
def _add_to_first(array: jax.Array, others: tuple[jax.Array, ...]) -> jax.Array:
    return array + others[0]


@functools.partial(jax.jit, static_argnames=("num_threads",))
def _read(array: jax.Array, *, num_threads: int) -> jax.Array:
    return ops.read(array, num_threads)


@jax.jit
def _sum(array: jax.Array) -> jax.Array:
    return jnp.sum(array)
