"""What a cache with LRU should do, in lists: the reference for SlotCache, which has places."""

from jmoe.residency.cache import CacheCounters, ExpertKey, NoRoom


class ReferenceCache:
    """Experts in pools (a list per pool), in staging (oldest first), and when they were used."""

    def __init__(self, sizes: list[int], pool_of: list[int], num_staging: int, min_free: int):
        self.sizes, self.pool_of = sizes, pool_of
        self.num_staging, self.min_free = num_staging, min_free
        self.pools: list[list[ExpertKey]] = [[] for _ in sizes]
        self.staged: list[ExpertKey] = []
        self.recency: list[ExpertKey] = []  # most recent last
        self.live: set[ExpertKey] = set()
        self.unused: set[ExpertKey] = set()
        self.pinned: set[ExpertKey] = set()
        self.counters = CacheCounters()

    @property
    def keys(self) -> set[ExpertKey]:
        return {key for held in (*self.pools, self.staged) for key in held}

    def use(self, keys, busy):
        self.pinned |= set(keys)
        self.recency = [key for key in self.recency if key not in keys] + keys
        missing = [key for key in keys if key not in self.keys]
        self.counters.hits += len(keys) - len(missing)
        self.counters.misses += len(missing)
        for key in keys:
            if key in self.staged:
                self.mark_used(key)
                victim = self.make_room(key, busy)
                if len(self.pools[self.pool_of[key.layer]]) < self.sizes[self.pool_of[key.layer]]:
                    self.staged.remove(key)
                    self.staged += [victim] if victim else []
                    self.pools[self.pool_of[key.layer]].append(key)
                else:
                    self.staged.append(self.staged.pop(self.staged.index(key)))
        return [self.load(key, busy) for key in missing]

    def mark_used(self, key):
        self.counters.useful += key in self.unused
        self.live.discard(key)
        self.unused.discard(key)

    def pin(self, key):
        self.mark_used(key)
        self.pinned.add(key)
        self.counters.hits += 1

    def make_room(self, key, busy):
        pool = self.pools[self.pool_of[key.layer]]
        movable = [k for k in self.recency if k in pool and k not in self.pinned | set(busy)]
        if len(pool) < self.sizes[self.pool_of[key.layer]] or not movable:
            return None
        pool.remove(movable[0])
        return movable[0]

    def load(self, key, busy):
        victim = self.make_room(key, busy)
        pool = self.pools[self.pool_of[key.layer]]
        if len(pool) < self.sizes[self.pool_of[key.layer]]:
            pool.append(key)
            self.counters.evictions += victim is not None
            return key, (victim,) if victim else ()
        load = self.stage(key, busy, self.recyclable(busy) or self.breakable(busy))
        if load is None:
            raise NoRoom
        return load

    def recyclable(self, busy):
        return [k for k in self.staged if k not in self.live | self.pinned | set(busy)]

    def breakable(self, busy):
        return [k for k in reversed(self.staged) if k not in self.pinned | set(busy)]

    def stage(self, key, busy, candidates):
        gone = ()
        if len(self.staged) == self.num_staging:
            if not candidates:
                return None
            gone = (candidates[0],)
            self.counters.evictions += candidates[0] not in self.unused
            self.forget(candidates[0])
        self.staged.append(key)
        return key, gone

    def speculate(self, key, busy):
        recyclable = self.recyclable(busy)
        room = self.num_staging - len(self.staged) + len(recyclable) > self.min_free
        if not room or key in self.keys - set(self.staged):
            return None
        if key in self.keys:
            self.live.add(key)
            return None
        load = self.stage(key, busy, recyclable)
        if load is not None:
            self.live.add(key)
            self.unused.add(key)
            self.counters.speculated += 1
        return load

    def stream(self, key, busy):
        load = self.stage(key, busy, self.recyclable(busy) or self.breakable(busy))
        if load is not None:
            self.pinned.add(key)
            self.counters.misses += 1
        return load

    def pass_layer(self, layer):
        passed = [k for k in self.staged if k in self.live and k.layer == layer]
        self.live -= set(passed)
        return [k for k in passed if k in self.unused]

    def forget(self, key):
        self.counters.useless += key in self.unused
        for held in (*self.pools, self.staged):
            if key in held:
                held.remove(key)
        for group in (self.live, self.unused, self.pinned):
            group.discard(key)
