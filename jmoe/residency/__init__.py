"""Where each expert is: the cache of slots on the device, the link to it, the prefetch thread."""

from jmoe.residency.cache import SlotCache
from jmoe.residency.entries import CacheCounters, ExpertKey
from jmoe.residency.eviction import EVICTIONS, Eviction, make_eviction

__all__ = ["EVICTIONS", "CacheCounters", "Eviction", "ExpertKey", "SlotCache", "make_eviction"]
