"""Which expert holds which place on the device: bookkeeping alone, without arrays or threads.

A place is room for one expert. Places are the slots of pools, one pool per layer or one for all,
and staging, which all layers share. An expert that was used holds a slot of its pool. In staging
are

* speculative entries: predicted, not used yet. *Live* until their layer has been used, and so
  long nothing but a needed expert takes their place; *stale* afterwards.
* transient entries: used, but without a slot, since the pool has no room or the eviction rule
  prefers what is there; and those that lost their slot to a speculative entry.

A speculative entry evicts nothing. When it is used, its place becomes a slot, and the slot of the
pool's victim becomes a place of staging: nothing is copied, and the victim can still be hit until
its new place is needed.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from jmoe.residency.entries import CacheCounters, Entry, ExpertKey, Load, NoRoom
from jmoe.residency.eviction import Eviction
from jmoe.residency.places import Places

__all__ = ["CacheCounters", "ExpertKey", "Load", "NoRoom", "SlotCache"]


class SlotCache(Places):
    """Which experts are on the device, and which have to go when others are needed.

    Every key has at most one entry, every entry a place of its own. Pinned experts, and those
    whose copy is under way (``busy``), keep their place. One thread may use it.

    Attributes:
      slots: per layer, or of the one pool for all layers.
      num_staging: places that all layers share.
      counters: what happened.
    """

    def __init__(
        self,
        slots: Sequence[int] | int,
        *,
        num_layers: int,
        num_experts: int,
        num_staging: int,
        eviction: Eviction,
        min_free: int = 0,
    ):
        """Makes an empty cache.

        Args:
          slots: of each layer's pool, from 0 to num_experts, or an int: of one global pool.
          num_layers: of the model.
          num_experts: per layer.
          num_staging: places of staging.
          eviction: the rule; no other cache may use it.
          min_free: so many places of staging speculation leaves for needed experts.
        """
        super().__init__(
            slots,
            num_layers=num_layers,
            num_experts=num_experts,
            num_staging=num_staging,
            eviction=eviction,
        )
        self.min_free = min_free

    def use(
        self,
        layer: int,
        experts: Sequence[int],
        busy: Collection[ExpertKey] = frozenset(),
        elsewhere: Sequence[int] = (),
    ) -> list[Load]:
        """Takes note that a group of experts is about to be computed, and pins them.

        Hits are counted before anything is loaded. A missing expert gets a free slot, the slot of
        a victim, a free place of staging, or one that can be recycled, oldest first.

        Args:
          layer: of all of them.
          experts: distinct; they become the most recent ones in this order.
          busy: keys whose copy is under way. They can be hit, but keep their place.
          elsewhere: experts of the same tokens that need not be here: they count for the rule of
            eviction only.

        Returns:
          Loads of the missing ones, in the order given.

        Raises:
          NoRoom: there is no place for one of them. What came before it is done.
        """
        keys_of_layer = self._keys[layer]
        keys = [keys_of_layer[expert] for expert in experts]
        entries = self._entries
        self._pinned.update(keys)
        self._eviction.touch([*keys, *(keys_of_layer[expert] for expert in elsewhere)])
        missing = []
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                missing.append(key)
            elif entry.staged:
                self._use_staged(entry, busy)
        self.counters.hits += len(keys) - len(missing)
        self.counters.misses += len(missing)
        if not missing:
            return []
        movable = self._movable(self._pools[layer], busy)
        return [self._load(key, busy, movable) for key in missing]

    def keep(self, key: ExpertKey, busy: Collection[ExpertKey] = frozenset()) -> Load | None:
        """Finds a slot for an expert that was used elsewhere, and may be used again.

        Returns None if it is here, or if the rule would rather keep what its pool has.
        """
        if key in self._entries:
            return None
        pool = self._pools[key.layer]
        if pool.free:
            return self._enter(key, ())
        victim = self._eviction.victim([*self._movable(pool, busy), key])
        if victim == key or not self._eviction.admits(key, victim):
            return None
        self._evict(self._entries[victim])
        return self._enter(key, (victim,))

    def unpin(self) -> None:
        """Drops all pins."""
        self._pinned.clear()

    def pin_key(self, key: ExpertKey) -> bool:
        """Pins an expert and counts a hit, if it is here. For prefill, like ``stream``."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if entry.staged:
            self._mark_used(entry)
        self._pinned.add(key)
        self.counters.hits += 1
        return True

    def unpin_key(self, key: ExpertKey) -> None:
        self._pinned.discard(key)

    def speculate(self, key: ExpertKey, busy: Collection[ExpertKey] = frozenset()) -> Load | None:
        """Finds a place for a predicted expert, without evicting one that has a slot.

        Returns None if it is here already, or if not more than min_free places of staging are free
        or can be recycled. Live entries are not recycled for this.
        """
        entry = self._entries.get(key)
        if entry is not None and (not entry.staged or entry.live):
            return None
        recyclable = self._recyclable(busy)
        if len(self._free) + len(recyclable) <= self.min_free:
            return None
        if entry is not None:  # protected until its layer is used
            entry.live = True
            return None
        self.counters.speculated += 1
        return self._stage(key, None if self._free else recyclable[0], unused=True)

    def pass_layer(self, layer: int) -> list[ExpertKey]:
        """Takes note that a layer has been used: predictions for it that were wrong become stale.

        Returns:
          The speculative ones among them, whose copies are not needed any more.
        """
        passed = [e for e in self._staged.values() if e.live and e.key.layer == layer]
        for entry in passed:
            entry.live = False
        return [entry.key for entry in passed if entry.unused]

    def stream(self, key: ExpertKey, busy: Collection[ExpertKey] = frozenset()) -> Load | None:
        """Finds a place of staging for a needed expert that is not here, pins it, counts a miss.

        For prefill, which leaves the pools as they are: see ``warm``. Returns None if no place is
        free or can be recycled now.
        """
        assert key not in self._entries
        load = self._stage_needed(key, busy, may_break=True)
        if load is not None:
            self._pinned.add(key)
            self.counters.misses += 1
        return load

    def warm(
        self, layer: int, ranked: Sequence[int], busy: Collection[ExpertKey] = frozenset()
    ) -> list[ExpertKey]:
        """Makes room for the experts that a layer's pool should hold after a prompt.

        Of a global pool a layer's share counts, or what the layer has if that is more. Residents
        of the layer that are not among the first ones go, as many as those have to be adopted;
        pinned and busy ones stay. In a global pool layers that have more than their share give,
        too.

        Args:
          layer: of the prompt.
          ranked: experts, best first; they become the most recently used, the best one last.
          busy: keys whose copy is under way.

        Returns:
          The evicted keys, whose arrays are to be dropped.
        """
        pool = self._pools[layer]
        share = pool.size // self._pools.count(pool)
        held = Counter(key.layer for key in pool.entries)
        wanted = [self._keys[layer][expert] for expert in ranked[: max(share, held[layer])]]
        self._eviction.touch(wanted[::-1])
        num_needed = sum(key not in pool.entries for key in wanted) - len(pool.free)
        kept = set(wanted)
        evicted: list[ExpertKey] = []
        while len(evicted) < num_needed:
            movable = [key for key in self._movable(pool, busy) if key not in kept]
            candidates = [key for key in movable if key.layer == layer] or [
                key for key in movable if held[key.layer] > share
            ]
            if not candidates:
                break
            victim = self._eviction.victim(candidates)
            held[victim.layer] -= 1
            evicted.append(victim)
            self._evict(self._entries[victim])
        return evicted

    def adopt(self, key: ExpertKey) -> bool:
        """Gives a staged expert a free slot of its pool; False if there is none."""
        entry = self._entries[key]
        if entry.staged:
            if not self._pools[key.layer].free:
                return False
            self._mark_used(entry)
            self._take_slot(entry)
        return True

    def forget(self, key: ExpertKey) -> None:
        """Takes note that a copy failed or was cancelled: the entry goes, if it is there."""
        entry = self._entries.get(key)
        if entry is not None:
            self.counters.useless += entry.unused
            self._pinned.discard(key)
            self._remove(entry)

    def fill(self, keys: Iterable[ExpertKey]) -> None:
        """Puts experts into free slots of their pools, oldest first, without counting anything."""
        for key in keys:
            pool = self._pools[key.layer]
            assert key not in self._entries and pool.free
            self._enter(key, ())

    def resize(self, slots: Sequence[int] | int, num_staging: int) -> list[ExpertKey]:
        """Changes the places. Nothing may be pinned, and no copy under way. Places are renumbered.

        Returns:
          The evicted keys, whose arrays are to be dropped.
        """
        assert not self._pinned
        residents = [entry for entry in self._entries.values() if not entry.staged]
        staged = sorted(self._staged.values(), key=lambda entry: entry.live)
        self._make_places(slots, num_staging)
        for entry in residents:  # at first all of them
            self._pools[entry.key.layer].entries[entry.key] = entry
        gone = staged[: max(0, len(staged) - num_staging)]
        for pool in dict.fromkeys(self._pools):
            while len(pool.entries) > pool.size:
                gone.append(pool.entries.pop(self._eviction.victim(pool.entries)))
            for entry in pool.entries.values():
                entry.place = pool.free.pop()
        for entry in staged[max(0, len(staged) - num_staging) :]:
            self._staged[entry.key] = entry
            entry.place = self._free.pop()
        for entry in gone:
            self._count_loss(entry)
            del self._entries[entry.key]
            self._eviction.forget(entry.key)
        return [entry.key for entry in gone]

    def _load(self, key: ExpertKey, busy: Collection[ExpertKey], movable: list[ExpertKey]) -> Load:
        """Finds a place for a needed expert; a victim is taken off the list of movable ones."""
        if self._pools[key.layer].free:
            return self._enter(key, ())
        victim = self._eviction.victim(movable) if movable else None
        if victim is None or not self._eviction.admits(key, victim):
            load = self._stage_needed(key, busy, may_break=victim is None)
            if load is not None:
                return load
        if victim is None:
            raise NoRoom(f"layer {key.layer}, expert {key.expert}")
        movable.remove(victim)
        self._evict(self._entries[victim])
        return self._enter(key, (victim,))

    def _stage_needed(
        self, key: ExpertKey, busy: Collection[ExpertKey], *, may_break: bool
    ) -> Load | None:
        """Finds a place of staging; of live predictions the last one gives way, if it may."""
        if self._free:
            return self._stage(key, None)
        recyclable = self._recyclable(busy)
        if not recyclable and may_break:
            staged = reversed(self._staged.values())
            recyclable = [
                e for e in staged if e.live and e.key not in self._pinned and e.key not in busy
            ]
        return self._stage(key, recyclable[0]) if recyclable else None

    def _use_staged(self, entry: Entry, busy: Collection[ExpertKey]) -> None:
        """Gives a staged expert that is used a slot, if it can have one."""
        key = entry.key
        self._mark_used(entry)
        pool = self._pools[key.layer]
        if not pool.free:
            movable = self._movable(pool, busy)
            victim = self._eviction.victim(movable) if movable else None
            if victim is None or not self._eviction.admits(key, victim):
                self._staged[key] = self._staged.pop(key)  # the youngest of staging now
                return
            demoted = self._staged[victim] = pool.entries.pop(victim)
            demoted.staged = True
        self._take_slot(entry)
