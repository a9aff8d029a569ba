"""Which experts stay in memory: the most used, as many as may, and no more."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.store.locked_experts import ADVANTAGE, DECAY, LockedExperts
from jmoe.store.reading_queue import BlobKey


class Pages:
    """Locks that the system allows up to a number.

    Attributes:
      locked: experts.
    """

    def __init__(self, max_allowed: int = 100):
        self.locked: set[BlobKey] = set()
        self.num_calls = 0
        self._max_allowed = max_allowed

    def lock(self, key: BlobKey) -> str | None:
        assert key not in self.locked
        self.num_calls += 1
        if len(self.locked) == self._max_allowed:
            return "ENOMEM, Cannot allocate memory"
        self.locked.add(key)
        return None

    def unlock(self, key: BlobKey) -> None:
        self.locked.remove(key)

    def experts(self, max_locked: int) -> LockedExperts:
        return LockedExperts(self.lock, self.unlock, max_locked)


def _use(experts: LockedExperts, *keys: BlobKey) -> None:
    for key in keys:
        experts.note_use(key)


def test_the_first_ones_are_locked_and_then_those_used_more():
    pages = Pages()
    experts = pages.experts(2)
    assert experts.note_use((0, 1))
    assert not experts.note_use((0, 1))  # it is
    _use(experts, (0, 2), (0, 3))
    assert pages.locked == experts.keys == {(0, 1), (0, 2)}
    _use(experts, (0, 3))
    assert pages.locked == {(0, 1), (0, 3)}


def test_a_small_advantage_changes_nothing():
    pages = Pages()
    experts = pages.experts(1)
    _use(experts, *[(0, 1)] * 8, *[(0, 2)] * 10)
    assert ADVANTAGE == 10 / 8 and pages.locked == {(0, 1)}
    _use(experts, (0, 2))
    assert pages.locked == {(0, 2)}


def test_old_uses_count_less():
    pages = Pages()
    experts = pages.experts(1)
    _use(experts, *[(0, 1)] * 8)
    token = 0
    for token in range(200):
        _use(experts, (0, 2 + token % 2), (1, 0))
        if pages.locked != {(0, 1)}:
            break
    assert 0 < token < 40  # eight uses decay, one every other token adds up


def test_weights_do_not_grow_for_ever():
    experts = Pages().experts(1)
    for _ in range(5000):
        _use(experts, (1, 0), (0, 0))
    assert all(0 < uses < 1e11 for uses in experts._uses.values())


def test_recorded_popularity_comes_first():
    pages = Pages()
    experts = pages.experts(2)
    shares = {(0, 0): 0.1, (0, 1): 0.5, (1, 0): 0.3, (1, 1): 0.5}
    assert experts.start_with(shares.items()) == [(0, 1), (1, 1)]
    assert experts._uses[(0, 0)] == 0.1 / (1 - DECAY)
    _use(experts, *[(1, 0)] * 8)
    assert pages.locked == {(0, 1), (1, 1)}  # 23 beside 25
    _use(experts, *[(1, 0)] * 9)
    assert (1, 0) in pages.locked and len(pages.locked) == 2


def test_a_refusal_ends_it_with_a_reason():
    pages = Pages(max_allowed=1)
    experts = pages.experts(5)
    assert experts.start_with({(0, e): 1.0 for e in range(4)}.items()) == [(0, 0)]
    assert experts.refusal == "ENOMEM, Cannot allocate memory"
    assert (experts.max_locked, pages.num_calls) == (1, 2)
    _use(experts, (1, 1), (1, 2))
    assert pages.num_calls == 2 and pages.locked == {(0, 0)}


def test_the_least_used_are_given_back_when_room_is_scarce():
    pages, room = Pages(), [True]
    experts = LockedExperts(pages.lock, pages.unlock, 3, lambda: room[0] or len(pages.locked) < 2)
    _use(experts, *[(0, 1)] * 3, (0, 2), *[(0, 3)] * 2)
    room[0] = False
    assert experts.give_back() is None
    assert pages.locked == {(0, 1)}
    _use(experts, (0, 2))
    assert pages.locked == {(0, 1), (0, 2)}
    _use(experts, (0, 3))
    assert pages.locked == {(0, 1), (0, 3)}  # one goes, one comes: that takes no room


def test_no_room_locks_nothing():
    pages = Pages()
    experts = pages.experts(0)
    assert experts.start_with([((0, 0), 1.0)]) == []
    _use(experts, (0, 0))
    assert pages.num_calls == 0 and experts.keys == frozenset()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=80),
    st.integers(0, 5),
    st.integers(0, 6),
)
def test_whatever_is_used(uses: list[BlobKey], max_locked: int, max_allowed: int):
    pages = Pages(max_allowed)
    experts = pages.experts(max_locked)
    for key in uses:
        experts.note_use(key)
        assert pages.locked == experts.keys
        assert len(pages.locked) <= min(max_locked, max_allowed)
    num_used = len(Counter(uses))
    if max_allowed >= max_locked:
        assert len(pages.locked) == min(max_locked, num_used)
    experts.clear()
    assert not pages.locked
