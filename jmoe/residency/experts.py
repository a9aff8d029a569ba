"""The experts of a model as an engine sees them: it names some, and gets arrays on the device.

Joins the bookkeeping (cache), the thread that copies (prefetch) and the arrays. An expert's array
exists as long as the cache has an entry for it: so never more of them than there are places.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmoe.errors import JmoeError
from jmoe.residency.cache import SlotCache
from jmoe.residency.counts import Arrivals, Counts
from jmoe.residency.entries import ExpertKey, Load
from jmoe.residency.link import Link
from jmoe.residency.prefetch import Fetcher
from jmoe.residency.timeline import Timeline
from jmoe.store.disk_tier import DiskTier

# Copies that are started before the first of them has arrived.
MAX_IN_FLIGHT = 2


class Outlook(NamedTuple):
    """What of a layer's experts is here, and what the link is busy with.

    Attributes:
      here: experts that can be taken without waiting.
      coming: seconds until they arrive, of those whose copy is under way.
      backlog_s: seconds until the link is free.
    """

    here: list[int]
    coming: dict[int, float]
    backlog_s: float


class DeviceExperts:
    """Experts on a device, and those that are on their way there.

    One thread may use it. After an error of a copy, or Ctrl-C, it can be used on.

    Attributes:
      cache: which experts hold places.
      peak_places: most places that held an expert so far.
      timeline: where copies and waits are entered, if anywhere.
    """

    def __init__(
        self,
        link: Link,
        read_blob: Callable[[ExpertKey], np.ndarray],
        cache: SlotCache,
        timeline: Timeline | None = None,
        disk: DiskTier | None = None,
    ):
        """Args:
        link: closed together with this.
        read_blob: the bytes of an expert: uint8 [num_bytes]; called on another thread.
        cache: empty.
        timeline: for copies and waits.
        disk: told which experts will be read, if some of them may not be in memory.
        """
        self.cache = cache
        self.peak_places = 0
        self.timeline = timeline
        self._link = link
        self._arrivals = Arrivals(timeline)
        self._disk = disk
        self._fetcher = Fetcher(
            link,
            read_blob,
            max_in_flight=MAX_IN_FLIGHT,
            on_transfer=self._arrivals.note,
            is_ready=disk and disk.is_ready,
        )
        if disk is not None:
            disk.on_ready(self._fetcher.look_again)
        self._arrays: dict[ExpertKey, jax.Array] = {}

    # Decode: need, predict, take, release for each layer.

    def outlook(self, layer: int, experts: Sequence[int], copy_s: float) -> Outlook:
        """Which experts are here, and when those would be that are not.

        Args:
          layer: of all of them.
          experts: distinct.
          copy_s: that a copy takes.
        """
        now_s = time.perf_counter()
        arrivals = self._fetcher.arrivals_s(copy_s)
        here, coming = [], {}
        for expert in experts:
            key = ExpertKey(layer, expert)
            if key in self._arrays or (key in self.cache and self._is_landed(key, arrivals)):
                here.append(expert)
            elif key in arrivals:
                coming[expert] = max(0.0, arrivals[key] - now_s)
        free_s = max(arrivals.values(), default=0.0)
        return Outlook(here, coming, max(0.0, free_s - now_s))

    def _is_landed(self, key: ExpertKey, arrivals: Collection[ExpertKey]) -> bool:
        return key not in arrivals and self._fetcher.poll_ready(key)

    def need(self, layer: int, experts: Sequence[int], elsewhere: Sequence[int] = ()) -> None:
        """Says that these experts are needed now: missing ones start to be copied.

        Pins them until ``release``. No program that uses other experts may be under way.

        Args:
          layer: of all of them.
          experts: distinct.
          elsewhere: experts that the same tokens chose, and that are computed elsewhere. Copies of
            them that have not begun are off.
        """
        for expert in elsewhere:
            self._call_off(ExpertKey(layer, expert))
        loads = self.cache.use(layer, experts, self._fetcher.in_flight, elsewhere)
        for load in loads:
            self._drop(load)
        self._note_peak()
        absent = [
            key
            for key in (ExpertKey(layer, expert) for expert in experts)
            if key not in self._arrays
        ]
        self._arrivals.await_all(absent)
        if absent:
            if self._disk is not None:
                self._disk.demand(absent)
            self._fetcher.demand(absent)

    def predict(
        self,
        predictions: Iterable[tuple[int, Sequence[int]]],
        fence: Callable[[], None] | None = None,
        in_time: Callable[[int, int], bool] | None = None,
    ) -> None:
        """Copies experts that may be needed soon, as far as there is room, the likeliest first.

        Args:
          predictions: layers, and experts of each.
          fence: waits until no program is under way, if one may be.
          in_time: whether one more copy for a layer would come in time, behind so many.
        """
        keys = self.foresee(predictions)
        busy = None
        for key in keys:
            if (
                in_time is not None
                and key not in self.cache
                and not in_time(key.layer, self._fetcher.num_queued)
            ):
                continue
            busy = self._fetcher.in_flight if busy is None else busy
            load = self.cache.speculate(key, busy)
            if load is not None:
                if load.evicted and fence is not None:
                    fence()
                self._drop(load)
                if not self._fetcher.prefetch([key]):
                    self.cache.forget(key)
        self._note_peak()

    def foresee(self, predictions: Iterable[tuple[int, Sequence[int]]]) -> list[ExpertKey]:
        """Says which experts may be needed soon, here or on the host; returns their keys."""
        keys = [ExpertKey(layer, expert) for layer, experts in predictions for expert in experts]
        if self._disk is not None:
            self._disk.predict([key for key in keys if key not in self._arrays])
        return keys

    def keep(self, layer: int, experts: Sequence[int], only_free: bool = False) -> None:
        """Copies one of these, which were computed elsewhere, if the link has nothing to do.

        The first that is not here, in place of what its layer needs least.

        Args:
          layer: of all of them.
          experts: distinct.
          only_free: into free slots alone.
        """
        fetcher = self._fetcher
        if only_free and not self.cache.num_free(layer):
            return
        if fetcher.num_queued or fetcher.in_flight:
            return
        for expert in experts:
            load = self.cache.keep(ExpertKey(layer, expert))
            if load is not None:
                self._drop(load)
                if not fetcher.prefetch([load.key]):
                    self.cache.forget(load.key)
                self._note_peak()
                return

    def fill(self, layer: int, wanted: Sequence[int]) -> None:
        """Copies experts into slots that are free, the best first, when the link has time."""
        for expert in wanted[: self.cache.num_free(layer)]:
            load = self.cache.keep(ExpertKey(layer, expert))
            if load is not None and not self._fetcher.prefetch([load.key]):
                self.cache.forget(load.key)
        self._note_peak()

    def hold(self, ranked: Iterable[ExpertKey]) -> int:
        """Copies experts into the slots that are free, and waits for them: between batches.

        They are given up before any expert that was used, the last ones first.

        Args:
          ranked: distinct experts, best first.

        Returns:
          How many were copied.

        Raises:
          TransferError: a copy failed.
          CapacityError: the device had no memory for one.
        """
        cache = self.cache
        coming: list[ExpertKey] = []
        of_pool: Counter[int] = Counter()
        for key in ranked:
            pool = 0 if isinstance(cache.slots, int) else key.layer
            if key not in cache and of_pool[pool] < cache.num_free(key.layer):
                of_pool[pool] += 1
                coming.append(key)
        cache.fill(reversed(coming))
        self._note_peak()
        for i in range(0, len(coming), cache.num_experts):
            group = coming[i : i + cache.num_experts]
            if self._disk is not None:  # not all of them may fit into memory at once
                self._disk.demand(group)
            self._fetcher.demand(group)
            for key in group:
                self._wait(key)
        return len(coming)

    def take(self, layer: int, experts: Sequence[int]) -> list[jax.Array]:
        """The arrays of experts that were needed, in this order; waits for them.

        Raises:
          TransferError: a copy failed. The expert has to be needed again.
          CapacityError: the device had no memory for one.
        """
        arrays = []
        for expert in experts:
            key = ExpertKey(layer, expert)
            array = self._arrays.get(key)
            if array is None:
                array = self._wait(key)
            arrays.append(array)
        return arrays

    def pass_layer(self, layer: int) -> None:
        """Says that a layer's experts are known: copies predicted wrongly and not begun are off."""
        if self._disk is not None:
            self._disk.pass_layer(layer)
        for key in self.cache.pass_layer(layer):
            self._call_off(key)

    def _call_off(self, key: ExpertKey) -> None:
        """Drops a copy that has been asked for and not begun."""
        waits = key not in self._arrays and not self._fetcher.poll_ready(key)
        if waits and key not in self._fetcher.in_flight and self._fetcher.cancel(key):
            self.cache.forget(key)

    def release(self) -> None:
        """Ends the need of all experts: they may be evicted when others are needed."""
        self.cache.unpin()

    # Prefill: a layer at a time.

    def stream(
        self, layer: int, experts: Sequence[int], wanted: Sequence[int], fence: Callable[[], None]
    ) -> Iterator[tuple[int, jax.Array, bool]]:
        """Hands out the arrays of many experts of a layer, one after another.

        Those that are here come first and are not moved; the others come through staging while
        the caller computes with those before.

        Args:
          layer: of all of them.
          experts: distinct.
          wanted: those to keep afterwards, as many as there are slots for, best first.
          fence: waits until no program is under way; called before an array is dropped.

        Yields:
          An expert, its array, and whether the copies of all of them have been asked for.
        """
        keys = [ExpertKey(layer, expert) for expert in experts]
        here = [key for key in keys if self.cache.pin_key(key)]
        self.pass_layer(layer)
        missing = [key for key in keys if key not in self.cache]
        if self._disk is not None:  # not all of them may fit into memory at once
            self._disk.predict(missing)
        try:
            self._fetcher.demand([key for key in here if key not in self._arrays])
            missing = self._start(missing, lambda: None)
            for key in here:
                yield key.expert, self._get(key), not missing
            fence()
            for key in here:
                self.cache.unpin_key(key)
            kept = self._make_room(layer, experts, wanted)
            for key in here:
                if key in kept:
                    self.cache.adopt(key)
            missing = self._start(missing, fence)  # in places of those that were here
            if len(missing) == len(keys) - len(here) > 0:
                self._land()
                missing = self._start(missing, fence)
            started = [key for key in keys if key not in here and key in self.cache]
            while started:
                key = started.pop(0)
                yield key.expert, self._get(key), not missing
                self.cache.unpin_key(key)
                if key in kept:
                    self.cache.adopt(key)
                rest = self._start(missing, fence)
                started += missing[: len(missing) - len(rest)]
                missing = rest
            assert not missing
        finally:
            self.release()

    def _make_room(
        self, layer: int, experts: Collection[int], wanted: Iterable[int]
    ) -> frozenset[ExpertKey]:
        """Gives up residents for better experts; returns those that get the free slots."""
        resident = self.cache.resident(layer)
        ranked = [e for e in wanted if e in experts or e in resident]
        for gone in self.cache.warm(layer, ranked, self._fetcher.in_flight):
            self._forget_array(gone)
        coming = [e for e in ranked if e not in resident]
        best = coming[: self.cache.num_free(layer)]
        return frozenset(ExpertKey(layer, expert) for expert in best)

    def _land(self) -> None:
        """Makes room when copies of other experts, which are under way, hold all of staging."""
        self._fetcher.drain()
        self._forget_absent()

    def _start(self, missing: list[ExpertKey], fence: Callable[[], None]) -> list[ExpertKey]:
        """Starts copies while there is room; returns those that have to wait."""
        fenced = False
        for i, key in enumerate(missing):
            load = self.cache.stream(key, self._fetcher.in_flight)
            if load is None:
                return missing[i:]
            if load.evicted and not fenced:
                fence()
                fenced = True
            self._drop(load)
            if self._disk is not None:
                self._disk.demand([key])
            self._fetcher.demand([key])
        self._note_peak()
        return []

    # Both.

    def resize(self, slots: Sequence[int] | int, num_staging: int) -> None:
        """Changes the number of places, between batches."""
        self.settle()
        for key in self.cache.resize(slots, num_staging):
            self._forget_array(key)

    def settle(self) -> None:
        """Ends a batch, however it ended: nothing is pinned, queued or under way afterwards."""
        cache, arrays = self.cache, self._arrays
        cache.unpin()
        if self._disk is not None:
            self._disk.settle()
        self._fetcher.drain()
        if not cache.is_whole():
            cache.clear()
        self._forget_absent()
        for key in [key for key in arrays if key not in cache]:
            del arrays[key]

    def _forget_absent(self) -> None:
        """Frees the places of experts whose copies will not come any more."""
        for key in self.cache.keys():  # noqa: SIM118  (a copy)
            if key not in self._arrays:
                self.cache.forget(key)

    def counts(self) -> Counts:
        """Counters so far; the difference of two is a ``Traffic``."""
        arrivals = self._arrivals
        arrivals.settle()
        return Counts(
            self.cache.counters.snapshot(), self._link.counters.snapshot(), arrivals.stalled_s
        )

    def close(self) -> None:
        """Stops the thread and drops all arrays; may be called again."""
        self._fetcher.close()
        self._arrays.clear()

    def _get(self, key: ExpertKey) -> jax.Array:
        """Of a stream: what the host waits is what the device waits, or less."""
        array = self._arrays.get(key)
        if array is None:
            start = time.perf_counter()
            array = self._wait(key)
            self._arrivals.stalled_s += time.perf_counter() - start
        return array

    def _wait(self, key: ExpertKey) -> jax.Array:
        start = time.perf_counter()
        try:
            array = self._fetcher.wait(key)
        except JmoeError:
            self.cache.forget(key)
            raise
        if self.timeline is not None:
            self.timeline.span(
                "host", f"wait for {key.layer}.{key.expert}", start, time.perf_counter()
            )
        self._arrays[key] = array
        return array

    def _drop(self, load: Load) -> None:
        for key in load.evicted:
            self._forget_array(key)

    def _forget_array(self, key: ExpertKey) -> None:
        if self._arrays.pop(key, None) is None:
            self._fetcher.cancel(key)

    def _note_peak(self) -> None:
        self.peak_places = max(self.peak_places, len(self.cache))
