"""The experts of a model on a device, in either of two forms, between which they can move.

For decode steps that the host takes layer by layer every expert is an array of its own, and the
host decides which ones are there (``DeviceExperts``). For steps that are one program they lie in
one array of slots, and the program decides (``SlotArray``). Prompts go the same way with both.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jmoe.metrics import LayerTraffic, Traffic
from jmoe.residency.array_cache import COUNTS, RULES, CacheStatic, make_pools
from jmoe.residency.counts import Counts
from jmoe.residency.entries import ExpertKey
from jmoe.residency.experts import MAX_IN_FLIGHT, DeviceExperts
from jmoe.residency.slot_array import PromptExperts, SlotArray

# What prompts need besides slots: for copies, and for an expert that is read out of a slot.
NUM_COPY_PLACES = MAX_IN_FLIGHT
NUM_READ_PLACES = 1


class SwitchingExperts:
    """One of both forms at a time; the other one takes no memory.

    Attributes:
      experts: arrays of their own. While slots is there, only for staging.
      slots: one array of slots, or None.
    """

    def __init__(
        self,
        experts: DeviceExperts,
        blob_bytes: int,
        num_needed: int,
        make_slots: Callable[[CacheStatic], SlotArray] | None,
        rule: str,
    ):
        """Args:
        experts: with the places that there are.
        blob_bytes: of an expert.
        num_needed: experts that a program needs at once.
        make_slots: makes the other form; None if there is none.
        rule: of eviction.
        """
        self.experts = experts
        self.slots: SlotArray | None = None
        self._favourites: Sequence[ExpertKey] = ()
        self._blob_bytes = blob_bytes
        self._num_needed = num_needed
        self._make_slots = make_slots
        self._rule = rule
        self._sizes = experts.cache.slots, experts.cache.num_staging
        self._prompt_experts: PromptExperts | None = None
        self._peak_places = 0

    @property
    def num_places(self) -> int:
        """For experts on the device, whether they are there or not."""
        num_slots = self.slots.static.num_slots if self.slots is not None else 0
        return self.experts.cache.num_places + num_slots

    def replace_experts(self, experts: DeviceExperts) -> None:
        """Takes others of the same places, over another link say. Nothing may be under way."""
        self.experts = experts
        if self.slots is not None:
            self._prompt_experts = PromptExperts(self.slots, experts)

    @property
    def in_slots(self) -> bool:
        return self.slots is not None

    @property
    def static(self) -> CacheStatic | None:
        """The shape of the slots that these places make; None if they are too few or not wanted."""
        slots, num_staging = self._sizes
        if self._make_slots is None or isinstance(slots, int) or self._rule not in RULES:
            return None
        num_shared = num_staging - NUM_COPY_PLACES - NUM_READ_PLACES
        pools = make_pools(slots, num_shared, self._num_needed) if num_shared >= 0 else None
        if pools is None:
            return None
        return CacheStatic(
            num_experts=self.experts.cache.num_experts,
            slots=pools[0],
            num_shared=pools[1],
            rule=self._rule,
        )

    @property
    def supply(self) -> DeviceExperts | PromptExperts:
        """Where prompts get experts from."""
        return self._prompt_experts or self.experts

    @property
    def peak_places(self) -> int:
        """Most places that held an expert at one time since ``begin``."""
        places = self.experts.peak_places
        if self.slots is not None:
            places += self.slots.static.num_slots + NUM_READ_PLACES
        return max(self._peak_places, places)

    def resize(self, slots: Sequence[int] | int, num_staging: int) -> None:
        """Changes the number of places, between batches; moves into arrays if it has to."""
        self._sizes = slots, num_staging
        if self.slots is not None and self.static is None:
            self.move_into_arrays()
        self._apply_sizes()
        self._hold_favourites()

    def favour(self, ranked: Sequence[ExpertKey]) -> int:
        """Names the experts that get slots which are free: now, and whenever slots change.

        What is used comes before them. Nothing may be under way.

        Args:
          ranked: distinct experts, best first.

        Returns:
          How many of them were copied now.

        Raises:
          TransferError: a copy failed.
          CapacityError: the device had no memory for one.
        """
        self._favourites = tuple(ranked)
        return self._hold_favourites()

    def _hold_favourites(self) -> int:
        if not self._favourites:
            return 0
        if self.slots is None:
            num_copied = self.experts.hold(self._favourites)
        else:
            num_copied = 0
            for layer, there in self.held().items():
                favourites = [key.expert for key in self._favourites if key.layer == layer]
                absent = [expert for expert in favourites if expert not in there]
                num_copied += self._put_into_slots(layer, [*there, *absent])
            self.experts.settle()
        return num_copied

    def settle(self) -> None:
        """Ends a batch, however it ended."""
        self.experts.settle()
        self._apply_sizes()

    def begin(self) -> None:
        """Starts to count what happens in a batch."""
        self.experts.peak_places = len(self.experts.cache)
        self._peak_places = 0
        if self.slots is not None:
            self.slots.begin()

    def move_into_slots(self) -> None:
        """Gives experts the other form, those that are there. Nothing may be under way."""
        if self.slots is not None:
            return
        static = self.static
        assert self._make_slots is not None and static is not None
        self._peak_places = self.peak_places
        held = self.held()
        self._shrink()
        slots = self._make_slots(static)
        self._prompt_experts = PromptExperts(slots, self.experts)
        self.slots = slots
        for layer, experts in held.items():
            self._put_into_slots(layer, experts)
        self.experts.settle()

    def _put_into_slots(self, layer: int, wanted: Sequence[int]) -> int:
        """Lets a layer's slots hold the first of these; returns how many were copied."""
        assert self.slots is not None
        coming = self.slots.make_room(layer, wanted)
        for expert, blob, _ in self.experts.stream(layer, list(coming), (), _no_fence):
            self.slots.put(layer, expert, coming[expert], blob)
            del blob
        return len(coming)

    def move_into_arrays(self) -> None:
        """And the other way round."""
        if self.slots is None:
            return
        self._peak_places = self.peak_places
        slots = self.slots
        held = {i: slots.by_value(i)[::-1] for i in range(slots.static.num_layers)}
        slots.delete()
        self.slots = self._prompt_experts = None
        self._apply_sizes()
        for layer, experts in held.items():
            for item in self.experts.stream(layer, experts, experts, _no_fence):
                del item
        self.experts.settle()

    def counts(self) -> "SwitchingCounts":
        """Counters so far; the difference of two is a ``Traffic``. Both of the same form."""
        slots = self.slots
        events = np.zeros(len(COUNTS), np.int64) if slots is None else slots.counts().sum(axis=0)
        hits = self._prompt_experts.hits if self._prompt_experts is not None else 0
        return SwitchingCounts(self.experts.counts(), hits, events, self._blob_bytes)

    def counts_by_layer(self) -> tuple[LayerTraffic, ...]:
        """Of decode steps with slots, since ``begin``; without slots nothing."""
        if self.slots is None:
            return ()
        return tuple(
            LayerTraffic(
                hits=hits, demand_loads=misses, copied_bytes=(misses + ahead) * self._blob_bytes
            )
            for hits, misses, ahead, *_ in self.slots.counts().tolist()
        )

    def close(self) -> None:
        """May be called again."""
        self.experts.close()
        if self.slots is not None:
            self.slots.delete()

    def held(self) -> dict[int, list[int]]:
        """By layer the experts that have a slot."""
        if self.slots is not None:
            slots = self.slots
            return {i: list(slots.by_value(i))[::-1] for i in range(slots.static.num_layers)}
        cache = self.experts.cache
        return {layer: sorted(cache.resident(layer)) for layer in range(cache.num_layers)}

    def _apply_sizes(self) -> None:
        if self.slots is None:
            self._resize_experts(*self._sizes)
            return
        static = self.static
        assert static is not None
        self._shrink()
        self.slots.resize(static)

    def _shrink(self) -> None:
        """Leaves the experts staging only."""
        none = (0,) * self.experts.cache.num_layers
        self._resize_experts(none, NUM_COPY_PLACES)
        self.experts.peak_places = len(self.experts.cache)

    def _resize_experts(self, slots: Sequence[int] | int, num_staging: int) -> None:
        cache = self.experts.cache
        wanted = slots if isinstance(slots, int) else tuple(slots)
        if (wanted, num_staging) != (cache.slots, cache.num_staging):
            self.experts.resize(slots, num_staging)


class SwitchingCounts:
    """Counters of both forms at one moment."""

    def __init__(self, experts: Counts, prompt_hits: int, events_C: np.ndarray, blob_bytes: int):
        self._experts = experts
        self._prompt_hits = prompt_hits
        self._events_C = events_C
        self._blob_bytes = blob_bytes

    def __sub__(self, earlier: "SwitchingCounts") -> Traffic:
        traffic = self._experts - earlier._experts
        hits, misses, ahead, useful, useless = (self._events_C - earlier._events_C).tolist()
        inside = Traffic(
            hits=hits + self._prompt_hits - earlier._prompt_hits,
            demand_loads=misses,
            prefetches=ahead,
            useful_prefetches=useful,
            useless_prefetches=useless,
            copies=misses + ahead,
            copied_bytes=(misses + ahead) * self._blob_bytes,
            link_busy_s=None if misses + hits else 0.0,
            stalled_s=None if misses + hits else 0.0,
        )
        return traffic + inside


def _no_fence() -> None:
    pass
