"""Repetitions in turn: as many as the budget has room for, and what is said of them."""

from collections.abc import Callable

import pytest

from jmoe.engines.measuring import MAX_ROW, MAX_SAMPLES, MIN_SAMPLES, ROW_S, Rounds
from tests.engines.clocks import FakeClock


class Work:
    """Something that takes its time, one after another of the times given."""

    def __init__(self, clock: FakeClock, *seconds: float):
        self.calls: list[int] = []
        self._clock = clock
        self._seconds = seconds

    def __call__(self, num: int) -> None:
        self.calls.append(num)
        self._clock.wait(num * self._seconds[len(self.calls) % len(self._seconds)])


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(tick_s=1e-9)


def test_first_runs_are_not_counted_and_medians_are_told(clock):
    rounds = Rounds(10.0, clock)
    rounds.add("a", Work(clock, 1.0, 900.0, 2.0, 1.5, 1.0))  # begins at its second time
    rounds.extend(10.0)
    rounds.repeat()
    assert rounds.seconds("a") == pytest.approx(1.5)
    assert rounds.best_s("a") == pytest.approx(1.0)


def test_whatever_the_budget_everything_is_repeated_and_in_turn(clock):
    order: list[str] = []

    def work(name: str) -> Callable[[int], None]:
        def run(num: int) -> None:
            order.append(name)
            clock.wait(0.01)

        return run

    rounds = Rounds(0.0, clock)
    for name in "abc":
        rounds.add(name, work(name))
    rounds.repeat()
    assert "".join(order) == "aabbcc" + "abc" * (MIN_SAMPLES - 1)


def test_what_takes_long_is_not_repeated_more_than_needed(clock):
    slow, quick = Work(clock, 1.0), Work(clock, 0.01)
    rounds = Rounds(4.0, clock)
    rounds.add("slow", slow)
    rounds.add("quick", quick)
    rounds.repeat()
    assert len(slow.calls) <= 3 and MIN_SAMPLES < len(quick.calls) <= MAX_SAMPLES + 1
    assert clock.now_s == pytest.approx(4.0, abs=1.1)


def test_what_is_quick_is_not_repeated_for_ever(clock):
    work = Work(clock, 1e-3)
    rounds = Rounds(1e9, clock)
    rounds.add("a", work)
    rounds.repeat()
    assert len(work.calls) == 1 + MAX_SAMPLES
    rounds.extend(1e9)
    rounds.repeat()
    assert len(work.calls) == 1 + 2 * MAX_SAMPLES


def test_a_budget_has_room_for_what_fits_beside_the_repetitions(clock):
    rounds = Rounds(10.0, clock)
    assert rounds.affords(9.9) and not rounds.affords(10.1)
    rounds.add("a", Work(clock, 0.1))  # warmed up and done once; two more to come
    assert rounds.affords(9.5) and not rounds.affords(9.7)


def test_quick_work_is_done_in_rows_behind_an_uncounted_one(clock):
    work = Work(clock, ROW_S / 4.5)
    rounds = Rounds(1.0, clock)
    assert rounds.add("a", work, in_rows=True) == pytest.approx(ROW_S / 4.5)
    assert work.calls == [1, 1, 4]
    quicker = Work(clock, ROW_S / 1000)
    rounds.add("b", quicker, in_rows=True)
    assert quicker.calls == [1, 1, MAX_ROW]
    slow = Work(clock, ROW_S)
    rounds.add("c", slow, in_rows=True)
    assert slow.calls == [1, 1]


def test_parts_share_the_time_of_the_whole_and_preparations_do_not_count(clock):
    settled, prepared = [], []
    rounds = Rounds(1.0, clock, lambda: settled.append(clock.wait(7.0)))
    work = Work(clock, 0.6)
    rounds.add("a", work, prepare=lambda: prepared.append(clock.wait(5.0)), num=2, per=3)
    assert rounds.seconds("a") == pytest.approx(0.2)
    assert len(settled) == len(prepared) == len(work.calls) == 2
    # But they take time of the budget.
    assert not rounds.affords(0.0)


def test_the_spread_is_the_median_of_all_spreads(clock):
    rounds = Rounds(100.0, clock)
    rounds.add("steady", Work(clock, 0.1))
    rounds.add("half", Work(clock, 0.1, 0.2, 0.1, 0.15, 0.2))
    rounds.add("wild", Work(clock, 0.001, 1.0))
    rounds.repeat()
    assert rounds.spread == pytest.approx(0.1 / 0.15, rel=0.1)


def test_a_clock_that_stands_still_gives_no_zero():
    rounds = Rounds(1.0, lambda: 0.0)
    rounds.add("a", lambda num: None, in_rows=True)
    rounds.repeat()
    assert rounds.seconds("a") > 0 and rounds.best_s("a") > 0 and rounds.spread == 0.0
