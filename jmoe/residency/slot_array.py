"""Experts in one array of slots, in which programs find, fetch and read them by themselves.

The counterpart of ``experts.DeviceExperts``, for decode steps that are one program. Between batches
the host puts in what a prompt used most.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from jmoe.errors import TransferError
from jmoe.quant.layout import ExpertLayout
from jmoe.residency import array_cache
from jmoe.residency.array_cache import CacheState, CacheStatic
from jmoe.residency.experts import DeviceExperts, Outlook
from jmoe.residency.timeline import Timeline
from jmoe.store.expert_store import ExpertStore


def host_arrays(store: ExpertStore, device: jax.Device) -> tuple[jax.Array, ...]:
    """The blobs of each layer as an array that programs on a device slice: [E, items].

    On the CPU backend it is the store's own memory. Elsewhere the store moves into the backend's
    page-locked memory, layer by layer: an array each, so that its pool need not find one large
    piece.

    Raises:
      TransferError: there is no such memory, or not enough.
    """
    if device.platform == "cpu":
        dtype = jax.numpy.dtype(store.layout.dtype)
        layers = (store.layer(i) for i in range(store.num_layers))
        return tuple(jax.device_put(layer.view(dtype), device) for layer in layers)
    lock = store.lock_pages(device, as_arrays=True)
    if lock.kind != "pinned_host":
        raise TransferError(
            "programs cannot read experts in host memory",
            got=lock.reason,
            do="use the engine thread",
        )
    return lock.pinned


class SlotArray:
    """The state that programs take and give back, and what the host does with it between them.

    One thread may use it.

    Attributes:
      static: the shape of the cache.
      host: blobs by layer, in host memory (``host_arrays``).
      state: donated to programs; who calls one puts the new state here.
    """

    def __init__(
        self,
        static: CacheStatic,
        layout: ExpertLayout,
        device: jax.Device,
        host: tuple[jax.Array, ...],
    ):
        self.static = static
        self.host = host
        self._layout = layout
        self._device = device
        self.state = self._empty()

    def begin(self) -> None:
        """Starts to count anew."""
        self.state = array_cache.begin_batch(self.state, rule=self.static.rule)

    def resize(self, static: CacheStatic) -> None:
        """Changes the pools; what was in them is gone, if they change.

        Makes a new state, too, if Ctrl-C left none behind.
        """
        is_lost = any(array.is_deleted() for array in jax.tree.leaves(self.state))
        if is_lost or static != self.static:
            self.delete()
            self.static = static
            self.state = self._empty()

    def delete(self) -> None:
        """Frees the device's memory. Afterwards only ``resize`` makes sense."""
        for array in jax.tree.leaves(self.state):
            if not array.is_deleted():
                array.delete()

    def layer(self, layer: int) -> dict[int, int]:
        """Slots by expert, of those of a layer that are there."""
        first, num_slots = self.static.pool(layer)
        num_experts = self.static.num_experts
        keys_P = np.asarray(self.state.key_S)[first : first + num_slots].tolist()
        return {
            key % num_experts: first + p
            for p, key in enumerate(keys_P)
            if key >= 0 and key // num_experts == layer
        }

    def by_value(self, layer: int) -> list[int]:
        """Experts of a layer that are there, in the order in which they would be given up."""
        value_E = np.asarray(self.state.value_LE)[layer]
        return sorted(self.layer(layer), key=lambda expert: value_E[expert])

    def read(self, slot: int) -> jax.Array:
        """A copy of the expert in a slot."""
        return array_cache.read_expert(self.state.slots_SI, self._put(np.int32(slot)))

    def make_room(self, layer: int, wanted: Sequence[int]) -> dict[int, int]:
        """Decides what a layer's slots will hold after a prompt: the first of these.

        They become the most recently used ones, the first one last. A layer that shares its slots
        keeps nothing.

        Returns:
          Slots of those that are not there yet, for ``put``.
        """
        static, there = self.static, self.layer(layer)
        first, num_slots = static.pool(layer)
        if not static.slots[layer]:
            return {}
        kept = list(wanted[:num_slots])
        taken = set(there.values())
        free = [slot for slot in range(first, first + num_slots) if slot not in taken]
        victims = [there[expert] for expert in self.by_value(layer) if expert not in kept]
        coming = [expert for expert in kept if expert not in there]
        used_E = np.full(static.num_experts, -1, np.int32)
        used_E[: len(kept)] = kept[::-1]
        self.state = array_cache.touch(
            self.state, self._put(np.int32(layer)), self._put(used_E), rule=static.rule
        )
        return dict(zip(coming, free + victims, strict=False))

    def put(self, layer: int, expert: int, slot: int, blob: jax.Array) -> None:
        """Puts an expert into a slot of its layer."""
        key = self._put(np.int32(layer * self.static.num_experts + expert))
        self.state = array_cache.put_expert(self.state, self._put(np.int32(slot)), key, blob)

    def counts(self) -> np.ndarray:
        """Events since ``begin`` by layer, int64 [L, C]; columns as ``array_cache.COUNTS``."""
        return np.asarray(self.state.counts_LC).astype(np.int64)

    def _empty(self) -> CacheState:
        """A cache without experts, for which the programs here have been compiled."""
        layout, static = self._layout, self.static
        state = array_cache.init_cache(static, layout.num_items, layout.dtype, self._device)
        none, nobody_E = self._put(np.int32(-1)), np.full(static.num_experts, -1, np.int32)
        zero = self._put(np.int32(0))
        state = array_cache.touch(state, zero, self._put(nobody_E), rule=static.rule)
        blob = array_cache.read_expert(state.slots_SI, zero)
        state = array_cache.put_expert(state, zero, none, blob)
        return jax.block_until_ready(array_cache.begin_batch(state, rule=static.rule))

    def _put(self, value: np.ndarray | np.generic) -> jax.Array:
        return jax.device_put(value, self._device)


class PromptExperts:
    """Gives out experts for prompts: from slots what is there, the rest by way of staging.

    What the prompt used most goes into slots.

    Attributes:
      hits: experts that were in slots, so far.
      timeline: where copies and waits are entered, if anywhere.
    """

    def __init__(self, slots: SlotArray, experts: DeviceExperts):
        """Args:
        slots: where experts are kept.
        experts: without slots of its own, for copies through staging.
        """
        self.hits = 0
        self._slots = slots
        self._experts = experts

    @property
    def timeline(self) -> Timeline | None:
        return self._experts.timeline

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook:
        """See ``DeviceExperts.outlook``."""
        there = self._slots.layer(layer)
        outlook = self._experts.outlook(layer, [e for e in experts if e not in there], copy_s)
        return outlook._replace(here=[e for e in experts if e in there or e in outlook.here])

    def fill(self, layer: int, wanted: Sequence[int]) -> None:
        """Does nothing: the program fetches what it needs."""

    def predict(
        self,
        predictions: Iterable[tuple[int, Sequence[int]]],
        fence: Callable[[], None] | None = None,
        in_time: Callable[[int, int], bool] | None = None,
    ) -> None:
        """See ``DeviceExperts.predict``; what is in slots is not copied."""
        self._experts.predict(self._absent(predictions), fence, in_time)

    def foresee(self, predictions: Iterable[tuple[int, Sequence[int]]]) -> None:
        """See ``DeviceExperts.foresee``."""
        self._experts.foresee(self._absent(predictions))

    def _absent(
        self, predictions: Iterable[tuple[int, Sequence[int]]]
    ) -> list[tuple[int, list[int]]]:
        """Those that are not in slots."""
        absent = []
        for layer, experts in predictions:
            there = self._slots.layer(layer)
            absent.append((layer, [expert for expert in experts if expert not in there]))
        return absent

    def stream(
        self, layer: int, experts: Sequence[int], wanted: Sequence[int], fence: Callable[[], None]
    ) -> Iterator[tuple[int, jax.Array, bool]]:
        """See ``DeviceExperts.stream``."""
        slots = self._slots
        there = slots.layer(layer)
        here = [expert for expert in experts if expert in there]
        missing = [expert for expert in experts if expert not in there]
        self.hits += len(here)
        for expert in here:
            # One copy at a time: staging has a place less for it.
            yield expert, slots.read(there[expert]), not missing
            fence()
        coming = slots.make_room(layer, [e for e in wanted if e in there or e in missing])
        for expert, blob, all_started in self._experts.stream(layer, missing, (), fence):
            yield expert, blob, all_started
            if expert in coming:
                slots.put(layer, expert, coming[expert], blob)
            del blob  # or it would outlive its place
