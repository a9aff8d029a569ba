"""A link as simulations see it: when would which expert have arrived?"""

from collections import deque
from collections.abc import Collection

from jmoe.residency.cache import ExpertKey


class ModelledLink:
    """Makes one copy at a time; needed ones overtake predicted ones, but not what has begun."""

    def __init__(self, copy_s: float):
        self.copy_s = copy_s
        self.copies = 0
        self._free_at = 0.0
        self._demands: deque[ExpertKey] = deque()
        self._prefetches: deque[ExpertKey] = deque()
        self._asked_at: dict[ExpertKey, float] = {}  # of those that wait
        self._arrival: dict[ExpertKey, float] = {}  # of those that were not dropped since

    def demand(self, key: ExpertKey, now: float) -> None:
        if key in self._asked_at:
            self._prefetches.remove(key)
        self._asked_at.setdefault(key, now)
        self._demands.append(key)

    def prefetch(self, key: ExpertKey, now: float) -> None:
        self._asked_at[key] = now
        self._prefetches.append(key)

    @property
    def num_waiting(self) -> int:
        return len(self._asked_at)

    @property
    def free_at(self) -> float:
        """When what has begun will have arrived."""
        return self._free_at

    def waits(self, key: ExpertKey) -> bool:
        return key in self._asked_at

    def drop(self, key: ExpertKey) -> None:
        """The expert is not wanted any more: a copy that was not begun is not made."""
        self._arrival.pop(key, None)
        if self._asked_at.pop(key, None) is not None:
            (self._prefetches if key in self._prefetches else self._demands).remove(key)

    def advance(self, now: float) -> Collection[ExpertKey]:
        """Begins the copies that begin until now; returns the one that is under way."""
        while self._asked_at and self._free_at <= now:
            self._begin()
        return () if self._free_at <= now else (self._current,)

    def comes_at(self, key: ExpertKey) -> float:
        """When an expert whose copy has begun is here; 0 for what was here at first."""
        return self._arrival.get(key, 0.0)

    def arrival(self, key: ExpertKey) -> float:
        """When an expert that is here or demanded is here; 0 for what was here at first."""
        while key in self._asked_at:
            self._begin()
        return self._arrival.get(key, 0.0)

    def _begin(self) -> None:
        key = (self._demands or self._prefetches).popleft()
        self._free_at = max(self._free_at, self._asked_at.pop(key)) + self.copy_s
        self._arrival[key] = self._free_at
        self._current = key
        self.copies += 1
