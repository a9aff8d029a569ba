"""The experts that are used most, kept in memory: the system drops pages without knowing them.

It drops what was used longest ago. Tokens use layers in a fixed order: with less memory than the
experts of one token take, what was used longest ago is just what comes next.
"""

from collections.abc import Callable, Iterable

from jmoe.store.reading_queue import BlobKey

# A use of so many tokens ago counts half: 34.
DECAY = 0.98
# How much more an expert must be used than another one to take its place.
ADVANTAGE = 1.25


class LockedExperts:
    """Chooses which experts stay in memory, by how often their bytes were asked for.

    Not by how often tokens use them: what the device holds is not asked for here, and need not be
    in memory. May be used by one thread at a time.

    Attributes:
      refusal: why the system lets no more be locked; None if it did not refuse.
    """

    def __init__(
        self,
        lock: Callable[[BlobKey], str | None],
        unlock: Callable[[BlobKey], object],
        max_locked: int,
        has_room: Callable[[], bool] = lambda: True,
    ):
        """Args:
        lock: keeps an expert in memory; returns why the system refuses, or None.
        unlock: lets go of one.
        max_locked: experts at once.
        has_room: whether memory has room for one more, and for what else needs memory.
        """
        self.refusal: str | None = None
        self._lock = lock
        self._unlock = unlock
        self._max_locked = max_locked
        self._has_room = has_room
        self._locked: set[BlobKey] = set()
        self._uses: dict[BlobKey, float] = {}
        self._weight = 1.0  # of a use now
        self._last_layer = -1

    @property
    def keys(self) -> frozenset[BlobKey]:
        """The experts that are locked."""
        return frozenset(self._locked)

    @property
    def max_locked(self) -> int:
        """Experts that may be locked, as far as is known."""
        return self._max_locked

    def start_with(self, shares: Iterable[tuple[BlobKey, float]]) -> list[BlobKey]:
        """Locks the most popular experts of recorded runs; their pages may not be in memory yet.

        Args:
          shares: experts, and how often a token uses them on average: as many uses are assumed as
            if that had been so for ever.

        Returns:
          What was locked, the most popular first.
        """
        for key, share in shares:
            self._uses[key] = share / (1 - DECAY)
        ranked = sorted(self._uses, key=lambda key: (-self._uses[key], key))
        locked = []
        for key in ranked[: self._max_locked]:
            if not self._try(key):
                break
            locked.append(key)
        return locked

    def note_use(self, key: BlobKey) -> bool:
        """Says that the bytes of an expert were asked for; returns whether it is locked since."""
        if key[0] < self._last_layer:  # another token
            self._age()
        self._last_layer = key[0]
        self._uses[key] = self._uses.get(key, 0.0) + self._weight
        if key in self._locked or not self._max_locked:
            return False
        if len(self._locked) < self._max_locked and self._has_room():
            return self._try(key)
        if not self._locked:
            return False
        least = min(self._locked, key=lambda other: self._uses.get(other, 0.0))
        if self._uses[key] > ADVANTAGE * self._uses.get(least, 0.0):
            self._unlock(least)
            self._locked.discard(least)
            return self._try(key)
        return False

    def give_back(self) -> None:
        """Lets go of those that are used least, until memory has room."""
        ranked = sorted(self._locked, key=lambda key: self._uses.get(key, 0.0))
        for key in ranked:
            if self._has_room():
                break
            self._unlock(key)
            self._locked.discard(key)

    def clear(self) -> None:
        """Lets go of all."""
        for key in self.keys:
            self._unlock(key)
            self._locked.discard(key)

    def _try(self, key: BlobKey) -> bool:
        refusal = self._lock(key)
        if refusal is not None:
            self.refusal = refusal
            self._max_locked = len(self._locked)
            return False
        self._locked.add(key)
        return True

    def _age(self) -> None:
        self._weight /= DECAY
        if self._weight > 1e9:
            self._uses = {key: uses / self._weight for key, uses in self._uses.items()}
            self._weight = 1.0
