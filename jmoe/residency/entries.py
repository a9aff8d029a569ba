"""What the cache keeps account of: experts, the places they hold, and what happened to them."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Self


class ExpertKey(NamedTuple):
    """An expert of a model."""

    layer: int
    expert: int


class Load(NamedTuple):
    """A copy to be made: which expert, to where, and whose array is to be dropped before."""

    key: ExpertKey
    place: int
    evicted: tuple[ExpertKey, ...]


class NoRoom(Exception):
    """There is no place for a needed expert: too many are pinned, or their copies under way."""


@dataclasses.dataclass(slots=True)
class CacheCounters:
    """What happened to experts: each is counted once per group of tokens that uses it."""

    hits: int = 0  # needed, and here (or on its way)
    misses: int = 0  # needed, and not here
    evictions: int = 0  # entries that had been used, and lost their place
    speculated: int = 0  # loads of experts that were predicted
    useful: int = 0  # speculative entries that were used
    useless: int = 0  # speculative entries that lost their place unused

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses) if self.hits else 0.0

    def snapshot(self) -> Self:
        return dataclasses.replace(self)

    def __sub__(self, earlier: "CacheCounters") -> "CacheCounters":
        """What happened since a snapshot."""
        return CacheCounters(
            *(
                getattr(self, field.name) - getattr(earlier, field.name)
                for field in dataclasses.fields(self)
            )
        )

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"hit_rate": self.hit_rate}


class Entry:
    """An expert on the device, or on its way there."""

    __slots__ = ("key", "live", "place", "staged", "unused")

    def __init__(self, key: ExpertKey, place: int, *, staged: bool, unused: bool = False):
        self.key = key
        self.place = place
        self.staged = staged  # or else it has a slot
        self.unused = unused
        self.live = unused  # predicted, and its layer not used yet


class Pool:
    """Slots for the experts of one layer, or of all."""

    __slots__ = ("entries", "free", "size")

    def __init__(self, places: Iterable[int]):
        self.free = list(reversed(list(places)))
        self.size = len(self.free)
        self.entries: dict[ExpertKey, Entry] = {}
