"""What calibration repeats for experts: on the host, and in programs of the offload engine."""

import contextlib
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.host_compute import HostCompute, host_rows
from jmoe.engines.layer_programs import LayerStatic, Routed
from jmoe.engines.probes import Arena, Run, Subject
from jmoe.engines.programs import ProgramCache
from jmoe.engines.prompt_stream import MIN_ROWS
from jmoe.planning.memory import device_memory
from jmoe.residency.cache import SlotCache
from jmoe.residency.eviction import make_eviction
from jmoe.residency.experts import DeviceExperts
from jmoe.residency.host_experts import HostExperts
from jmoe.residency.link import DeviceLink, LinkCounters

# Of experts that are all in the caches: more than a core has room for by itself.
_MAX_CACHED = 32


class ExpertsOnHost:
    """Experts in host memory, computed where they lie by the program of ``HostCompute``.

    Attributes:
      num_warm: experts to compute before each repetition, as they would be in the caches; else 0.
    """

    def __init__(self, subject: Subject, blobs: np.ndarray):
        """Args:
        subject: whose experts.
        blobs: uint8 [num_blobs, layout.num_bytes]; each at a multiple of 64.
        """
        self._subject = subject
        self._device = subject.host_device()
        self._programs = ProgramCache(self._device)
        blobs = blobs[: _num_blobs(subject)]
        self.num_warm = len(blobs) if subject.is_cached else 0
        # As the layers of a model; the last one may be shorter, and is left out then.
        size = min(subject.config.router.num_experts, len(blobs))
        items = blobs.view(subject.layout.dtype)
        layers = [items[i : i + size] for i in range(0, len(items) - size + 1, size)]
        self._size = size
        self._layers = [jax.device_put(layer, self._device) for layer in layers]

    def run(self, num_rows: int) -> Run:
        """So many rows through one expert, and then another: dispatched, and waited for."""
        subject = self._subject
        top_k = subject.config.router.top_k

        def put(array: np.ndarray) -> jax.Array:
            return jax.device_put(array, self._device)

        # Of tokens that chose this expert first, and whose other experts are computed elsewhere.
        x_TD = put(_activations(num_rows, subject))
        rows_R = put(np.arange(num_rows * top_k, dtype=np.int32))
        is_first_R = np.arange(num_rows * top_k) % top_k == 0
        ids = [
            put(np.where(is_first_R, expert, -1).astype(np.int32)) for expert in range(self._size)
        ]
        program = self._programs.get(
            host_rows,
            x_TD,
            rows_R,
            ids[0],
            self._layers[0],
            layout=subject.layout,
            activation=subject.config.hidden_act,
            top_k=top_k,
            host=subject.host,
        )
        turns = itertools.cycle(itertools.product(self._layers, ids))

        def run(num: int) -> None:
            for _ in range(num):
                layer, ids_R = next(turns)
                program(x_TD, rows_R, ids_R, layer).block_until_ready()

        return run


@contextlib.contextmanager
def hand_over(subject: Subject, arena: Arena) -> Iterator[Run]:
    """Handing a token to the host's thread, and getting a result back to the device.

    By itself: of no expert. The thread ends with the context.
    """
    config, device = subject.config, subject.device
    compute = HostCompute(config, subject.dtype, subject.layout, arena.store, subject.host)
    top_k = config.router.top_k
    compute.compile(1, top_k)
    host = HostExperts(compute, subject.layout.num_bytes)
    x_TD = jax.device_put(_activations(1, subject), device)
    add = ProgramCache(device).get(_add, x_TD)
    rows_R, ids_R = np.arange(top_k, dtype=np.int32), np.full(top_k, -1, np.int32)

    def run(num: int) -> None:
        for _ in range(num):
            # Of a new array, as a program leaves it: what was read of an array is kept.
            job = host.start(0, add(x_TD), rows_R, ids_R)
            jax.device_put(host.wait(job), device).block_until_ready()

    try:
        yield run
    finally:
        host.close()
        compute.close()


class _NoLink:
    """Has copied everything already."""

    hands_out_early = True

    def __init__(self, array: jax.Array):
        self.counters = LinkCounters()
        self._array = array

    def start(self, blob: np.ndarray) -> jax.Array:
        return self._array

    def remaining_s(self, array: jax.Array) -> float:
        return 0.0

    def finish(self, array: jax.Array) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def fetch(subject: Subject) -> Iterator[Run]:
    """One missing expert after another, as in a loop over layers, whose copies take no time.

    The thread ends with the context.
    """
    blob = np.zeros(64, np.uint8)
    num_experts, num_slots = 8, 2
    cache = SlotCache(
        (num_slots,),
        num_layers=1,
        num_experts=num_experts,
        num_staging=num_slots,
        eviction=make_eviction("lru"),
    )
    link = _NoLink(jax.device_put(blob, subject.device))
    experts = DeviceExperts(link, lambda key: blob, cache)
    turns = itertools.cycle(range(num_experts))

    def run(num: int) -> None:
        for _ in range(num):
            ids = [next(turns)]
            experts.need(0, ids)
            experts.predict([(0, ids)])
            experts.take(0, ids)
            experts.pass_layer(0)
            experts.release()

    try:
        yield run
    finally:
        experts.close()


class ExpertsOnDevice:
    """Experts in device memory, an array each, as the offload engine has them.

    Attributes:
      num_warm: see ExpertsOnHost.
    """

    def __init__(self, subject: Subject, arena: Arena):
        """Copies experts to the device, as many as have room in an eighth of what is free.

        Raises:
          CapacityError: the device has no memory for them.
        """
        self._subject, device = subject, subject.device
        self._programs = ProgramCache(device)
        link = DeviceLink(device, subject.layout.dtype)
        blobs = arena.blobs[: _num_blobs(subject)]
        limit, in_use, _ = device_memory(device)
        if limit is not None:
            most = (limit - (in_use or 0)) // 8 // subject.layout.num_bytes
            blobs = blobs[: max(subject.config.router.top_k, most)]
        self.num_warm = len(blobs) if subject.is_cached else 0
        arrays = [link.start(blob) for blob in blobs]
        for array in arrays:
            link.finish(array)
        self._blobs = itertools.cycle(arrays)
        self._static = LayerStatic(
            config=subject.config,
            dtype=subject.dtype,
            quant=subject.quant,
            host=subject.host if subject.is_cpu else None,
            platform=device.platform,
            window=None,
            num_predicted=0,
        )

    def run(self, num_rows: int) -> tuple[Run, int]:
        """So many rows through each expert of one program, program after program.

        Returns:
          And how many experts a program has.
        """
        if num_rows < MIN_ROWS:
            return self._decode(num_rows), self._subject.config.router.top_k
        return self._prompt(num_rows), 1

    def _decode(self, num_tokens: int) -> Run:
        """As tokens of a decode step go through the experts of a program, all chosen by each."""
        blobs, put = self._blobs, self._put
        top_k = self._subject.config.router.top_k
        routed = self._routed(num_tokens, (num_tokens, 1))
        group = tuple(put(np.int32(expert)) for expert in range(top_k))
        y_TKD = put(np.zeros((num_tokens, top_k, routed.normed_TD.shape[1]), np.float32))
        arguments = tuple(itertools.islice(blobs, top_k)), group, routed, y_TKD
        program = self._programs.get(layer_programs.some_experts, *arguments, static=self._static)

        def run(num: int) -> None:
            nonlocal y_TKD
            for _ in range(num):
                y_TKD = program(tuple(itertools.islice(blobs, top_k)), group, routed, y_TKD)
            y_TKD.block_until_ready()

        return run

    def _prompt(self, num_rows: int) -> Run:
        """As tokens of a prompt go through one expert."""
        blobs, put = self._blobs, self._put
        top_k = self._subject.config.router.top_k
        routed = self._routed(num_rows, (1, num_rows))
        rows_R = put(np.arange(num_rows, dtype=np.int32) * top_k)
        y_AD = put(np.zeros((num_rows * top_k + 1, routed.normed_TD.shape[1]), np.float32))
        arguments = next(blobs), rows_R, routed, y_AD
        program = self._programs.get(layer_programs.expert_rows, *arguments, static=self._static)

        def run(num: int) -> None:
            nonlocal y_AD
            for _ in range(num):
                y_AD = program(next(blobs), rows_R, routed, y_AD)
            y_AD.block_until_ready()

        return run

    def _routed(self, num_tokens: int, shape: tuple[int, int]) -> Routed:
        subject, put = self._subject, self._put
        top_k = subject.config.router.top_k
        normed_TD = _activations(num_tokens, subject)
        ids_TK = np.tile(np.arange(top_k, dtype=np.int32), (num_tokens, 1))
        return Routed(
            x_BLD=put(normed_TD.reshape(*shape, -1)),
            normed_TD=put(normed_TD),
            weights_TK=put(np.full((num_tokens, top_k), 1 / top_k, np.float32)),
            ids_TK=put(ids_TK),
        )

    def _put(self, array: np.ndarray | np.int32) -> jax.Array:
        return jax.device_put(array, self._subject.device)


@jax.jit
def _add(array: jax.Array) -> jax.Array:
    return array + 1


def _num_blobs(subject: Subject) -> int:
    """No more than the model has."""
    return min(subject.num_experts, _MAX_CACHED) if subject.is_cached else subject.num_experts


def _activations(num_rows: int, subject: Subject) -> np.ndarray:
    x_RD = np.random.default_rng(0).standard_normal((num_rows, subject.config.hidden_size))
    return x_RD.astype(jnp.dtype(subject.dtype))
