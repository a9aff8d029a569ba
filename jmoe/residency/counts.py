"""What experts did between two moments: counters of cache and link, and time that was waited."""

import time
from collections.abc import Sequence

from jmoe.metrics import Traffic
from jmoe.residency.entries import CacheCounters, ExpertKey
from jmoe.residency.link import LinkCounters
from jmoe.residency.timeline import Timeline
from jmoe.residency.transfers import Transfer


class Counts:
    """Counters of the cache and the link, and time stalled, at one moment."""

    def __init__(self, cache: CacheCounters, link: LinkCounters, stalled_s: float):
        self._cache, self._link, self._stalled_s = cache, link, stalled_s

    def __sub__(self, earlier: "Counts") -> Traffic:
        cache, link = self._cache - earlier._cache, self._link - earlier._link
        return Traffic(
            hits=cache.hits,
            demand_loads=cache.misses,
            prefetches=cache.speculated,
            useful_prefetches=cache.useful,
            useless_prefetches=cache.useless,
            copies=link.copies,
            copied_bytes=link.bytes,
            link_busy_s=link.busy_s,
            stalled_s=self._stalled_s - earlier._stalled_s,
        )


class Arrivals:
    """Adds up the time between asking for experts and the arrival of the last of them.

    Until then the device has nothing to do: the host asks when the layer's router has ended. The
    fetcher's thread notes arrivals; it must not refer to the fetcher.
    """

    def __init__(self, timeline: Timeline | None):
        self.stalled_s = 0.0
        self._timeline = timeline
        self._awaited: frozenset[ExpertKey] = frozenset()
        self._since = self._last = 0.0

    def await_all(self, keys: Sequence[ExpertKey]) -> None:
        self.settle()
        self._since = self._last = time.perf_counter()
        self._awaited = frozenset(keys)

    def note(self, transfer: Transfer) -> None:
        """On the fetcher's thread."""
        if transfer.key in self._awaited:
            self._last = max(self._last, transfer.finished_s)
        if self._timeline is not None:
            self._timeline.transfer(transfer)

    def settle(self) -> None:
        """Enters what was awaited last, which has arrived by now."""
        self.stalled_s += self._last - self._since
        self._awaited, self._since = frozenset(), self._last
