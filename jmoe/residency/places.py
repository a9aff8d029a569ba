"""The places of a cache and the moves between them; SlotCache decides which move to make."""

from collections.abc import Collection, Sequence

from jmoe.residency.entries import CacheCounters, Entry, ExpertKey, Load, Pool
from jmoe.residency.eviction import Eviction


class Places:
    """Slots and staging, and who holds them.

    Every key has at most one entry, and every entry a place of its own. A pool has as many entries
    and free places as slots, and staging likewise: a place changes sides only in exchange for
    another one.
    """

    def __init__(
        self,
        slots: Sequence[int] | int,
        *,
        num_layers: int,
        num_experts: int,
        num_staging: int,
        eviction: Eviction,
    ):
        self.num_experts = num_experts
        self.counters = CacheCounters()
        self._eviction = eviction
        self._keys = [[ExpertKey(i, e) for e in range(num_experts)] for i in range(num_layers)]
        self._entries: dict[ExpertKey, Entry] = {}
        self._pinned: set[ExpertKey] = set()
        self._make_places(slots, num_staging)

    def _make_places(self, slots: Sequence[int] | int, num_staging: int) -> None:
        num_layers = len(self._keys)
        self.slots = slots if isinstance(slots, int) else tuple(slots)
        self.num_staging = num_staging
        sizes = [slots] if isinstance(slots, int) else list(slots)
        assert isinstance(slots, int) or len(sizes) == num_layers
        assert num_staging >= 0 and all(size >= 0 for size in sizes)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        pools = [Pool(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        self.num_places = ends[-1] + num_staging
        self._pools = pools * num_layers if isinstance(slots, int) else pools
        self._free = list(reversed(range(ends[-1], self.num_places)))
        self._staged: dict[ExpertKey, Entry] = {}  # oldest first

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[ExpertKey]:
        """The experts that hold a place."""
        return list(self._entries)

    def place_of(self, key: ExpertKey) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.place

    def resident(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that have a slot, in ascending order."""
        return tuple(sorted(key.expert for key in self._pools[layer].entries if key.layer == layer))

    def num_free(self, layer: int) -> int:
        """Free slots of the pool of a layer."""
        return len(self._pools[layer].free)

    def is_whole(self) -> bool:
        """Whether each place is free or has one holder: not so if Ctrl-C interrupted a change."""
        pools = dict.fromkeys(self._pools)
        sizes = [self.slots] if isinstance(self.slots, int) else list(self.slots)
        sides = [(pool.entries, pool.free, pool.size, False) for pool in pools]
        sides.append((self._staged, self._free, self.num_staging, True))
        held = {key: entry for entries, *_ in sides for key, entry in entries.items()}
        places = [entry.place for entry in held.values()]
        return (
            [size for _, _, size, _ in sides] == [*sizes, self.num_staging]
            and all(len(entries) + len(free) == size for entries, free, size, _ in sides)
            and all(e.staged == staged for entries, *_, staged in sides for e in entries.values())
            and held == self._entries
            and sorted(places + [place for _, free, *_ in sides for place in free])
            == list(range(self.num_places))
        )

    def clear(self) -> None:
        """Makes all places free, whatever state they are in."""
        for key in self._entries:
            self._eviction.forget(key)
        self._entries.clear()
        self._pinned.clear()
        self._make_places(self.slots, self.num_staging)

    def _enter(self, key: ExpertKey, evicted: tuple[ExpertKey, ...]) -> Load:
        """Puts a new expert into a free slot of its pool."""
        pool = self._pools[key.layer]
        entry = Entry(key, pool.free.pop(), staged=False)
        self._entries[key] = pool.entries[key] = entry
        return Load(key, entry.place, evicted)

    def _recyclable(self, busy: Collection[ExpertKey]) -> list[Entry]:
        """Entries of staging whose place may be taken for anything, oldest first."""
        pinned = self._pinned
        return [
            entry
            for key, entry in self._staged.items()
            if not entry.live and key not in pinned and key not in busy
        ]

    def _stage(self, key: ExpertKey, old: Entry | None, *, unused: bool = False) -> Load:
        """Puts a new expert into a free place of staging, or into that of an old entry."""
        if old is not None:
            self._evict(old)
        entry = Entry(key, self._free.pop(), staged=True, unused=unused)
        self._entries[key] = self._staged[key] = entry
        return Load(key, entry.place, () if old is None else (old.key,))

    def _take_slot(self, entry: Entry) -> None:
        """Makes the place of a staged entry a slot, in exchange for a free slot if there is one."""
        pool = self._pools[entry.key.layer]
        if pool.free:
            self._free.append(pool.free.pop())
        del self._staged[entry.key]
        entry.staged = False
        pool.entries[entry.key] = entry

    def _movable(self, pool: Pool, busy: Collection[ExpertKey]) -> list[ExpertKey]:
        pinned = self._pinned
        return [key for key in pool.entries if key not in pinned and key not in busy]

    def _mark_used(self, entry: Entry) -> None:
        self.counters.useful += entry.unused
        entry.unused = entry.live = False

    def _evict(self, entry: Entry) -> None:
        """Takes an entry out because its place is needed."""
        self._count_loss(entry)
        self._remove(entry)

    def _count_loss(self, entry: Entry) -> None:
        if entry.unused:
            self.counters.useless += 1
        else:
            self.counters.evictions += 1

    def _remove(self, entry: Entry) -> None:
        """Takes an entry out; its place is free."""
        key = entry.key
        del self._entries[key]
        self._eviction.forget(key)
        if entry.staged:
            del self._staged[key]
            self._free.append(entry.place)
        else:
            pool = self._pools[key.layer]
            del pool.entries[key]
            pool.free.append(entry.place)
