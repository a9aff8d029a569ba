"""Which engine is named the faster one."""

import pytest

from jmoe.engines.contest import NUM_COUNTING, NUM_SETTLING, Contest, Way


def run(contest: Contest, thread_s: float, compiled_s: float, per_call: int = 1) -> list[str]:
    """Who ran, token by token; a call's time is that of its first token."""
    ran, i = [], 0
    while not contest.is_over:
        ran.append(contest.running)
        is_first = i % per_call == 0
        call_s = compiled_s * per_call if is_first else 0.0
        contest.note(thread_s if contest.running == "thread" else call_s)
        i = i + 1 if contest.running == ran[-1] else 0
    return ran


@pytest.mark.parametrize(
    ("thread_s", "compiled_s", "winner"),
    [(2e-3, 1e-3, "compiled"), (1e-3, 2e-3, "thread"), (1e-3, 1e-3, "thread")],
)
@pytest.mark.parametrize("per_call", [1, 3, 8, 64])
def test_the_faster_engine_wins(thread_s, compiled_s, winner, per_call):
    contest = Contest(per_call)
    ran = run(contest, thread_s, compiled_s, per_call)
    assert contest.running == winner
    assert ran.count("thread") == NUM_SETTLING + NUM_COUNTING
    assert ran.count("compiled") % per_call == 0
    assert contest.token_s("thread") == pytest.approx(thread_s)
    assert contest.token_s("compiled") == pytest.approx(compiled_s)
    assert str(contest).startswith(f"engine {winner}: ")


def test_slow_first_tokens_and_a_stray_slow_one_decide_nothing():
    contest = Contest(1)
    for i in range(NUM_SETTLING + NUM_COUNTING):
        contest.note(1.0 if i < NUM_SETTLING or i == 7 else 2e-3)
    for i in range(NUM_SETTLING + NUM_COUNTING):
        contest.note(5.0 if i < NUM_SETTLING or i == 9 else 1e-3)
    assert contest.is_over and contest.running == "compiled"
    assert str(contest) == "engine compiled: 1.00 ms a token, thread 2.00 ms"


def test_of_several_ways_the_fastest_wins_and_the_best_predicted_begins():
    seconds: dict[Way, float] = {"thread": 4e-3, "split": 2e-3, "host": 3e-3, "compiled": 9e-3}
    contest = Contest(1, tuple(seconds))
    contest.predict({"thread": 3e-3, "split": 3.5e-3, "host": 2e-3, "compiled": 7e-3})
    assert contest.ways == ("host", "thread", "split")  # the other one is hopeless
    ran = []
    while not contest.is_over:
        ran.append(contest.running)
        contest.note(seconds[contest.running])
    assert list(dict.fromkeys(ran)) == ["host", "thread", "split"]
    assert contest.running == "split"
    text = str(contest)
    assert text.startswith("engine split: 2.00 ms a token (predicted 3.50), host 3.00 ms")


def test_predictions_after_the_beginning_change_no_turns():
    contest = Contest(1, ("thread", "split"))
    contest.note(1e-3)
    contest.predict({"thread": 9.0, "split": 1.0})
    assert contest.ways == ("thread", "split") and contest.running == "thread"


def test_one_way_that_is_left_needs_no_contest():
    contest = Contest(1, ("thread", "split", "compiled"))
    contest.predict({"thread": 1.0, "split": 4.0, "compiled": 5.0})
    assert contest.is_over and contest.running == "thread"
    contest = Contest(1)
    contest.drop("compiled")
    assert contest.is_over and contest.running == "thread"


def test_ways_are_compared_as_if_all_had_made_the_same_tokens():
    """The host is quicker only because its tokens miss half as many experts."""
    contest = Contest(1, ("split", "host"))
    turn = NUM_SETTLING + NUM_COUNTING
    for _ in range(turn):
        contest.note(2.2e-3)  # two misses, of 1 ms
    for _ in range(turn):
        contest.note(1.8e-3)  # one miss, of 2 ms
    assert contest.running == "host" and contest.is_close
    as_made = [2e-3] * turn + [2e-3] * turn
    by_way: dict[Way, list[float]] = {
        "split": [2e-3] * turn + [1e-3] * turn,
        "host": [4e-3] * turn + [2e-3] * turn,
    }
    contest.even_out(as_made, by_way)
    assert contest.running == "split"
    assert contest.token_s("split") == pytest.approx(1.65e-3)
    assert contest.token_s("host") == pytest.approx(2.7e-3)


@pytest.mark.parametrize("per_call", [1, 3, 8])
def test_tokens_of_the_compiled_engine_are_judged_by_calls_and_not_shared(per_call):
    contest = Contest(per_call, ("thread", "compiled"))
    run(contest, 1.1e-3, 1e-3, per_call)
    made = len(contest.turns)
    by_way: dict[Way, list[float]] = {way: [1e-3] * made for way in contest.ways}
    contest.even_out([1e-3] * made, by_way)
    assert contest.running == "compiled"
    assert contest.token_s("compiled") == pytest.approx(1e-3)
    # Of the thread's tokens alone, which are half as much work.
    is_thread = [turn == "thread" for turn in contest.turns]
    halved = [0.5e-3 if flag else 9.0 for flag in is_thread]
    contest.even_out([1e-3] * made, {"thread": halved, "compiled": halved})
    assert contest.token_s("compiled") == pytest.approx(0.5e-3)


def test_the_two_best_go_on_once_if_they_are_close():
    contest = Contest(1, ("thread", "split", "host"))
    turn = NUM_SETTLING + NUM_COUNTING
    first: dict[Way, float] = {"thread": 1.0e-3, "split": 1.1e-3, "host": 2e-3}
    while not contest.is_over:
        contest.note(first[contest.running])

    def even_out() -> None:
        made = [1e-3] * len(contest.turns)
        contest.even_out(made, dict.fromkeys(contest.ways, made))

    even_out()
    contest.reconsider()
    assert not contest.is_over and contest.running == "thread"
    second: dict[Way, float] = {"thread": 1.4e-3, "split": 1.1e-3}
    while not contest.is_over:
        contest.note(second[contest.running])
    assert [contest.turns.count(way) for way in ("thread", "split", "host")] == [
        2 * turn,
        2 * turn,
        turn,
    ]
    even_out()
    contest.reconsider()  # not again
    assert contest.is_over and contest.running == "split"
    assert "host 2.00 ms" in str(contest)  # and it is still told what the third one took


def test_two_that_are_far_apart_do_not_go_on():
    contest = Contest(1, ("thread", "split"))
    run_s: dict[Way, float] = {"thread": 1e-3, "split": 1.25e-3}
    while not contest.is_over:
        contest.note(run_s[contest.running])
    assert contest.is_close
    made = [1e-3] * len(contest.turns)
    contest.even_out(made, dict.fromkeys(contest.ways, made))
    contest.reconsider()
    assert contest.is_over and contest.running == "thread"
