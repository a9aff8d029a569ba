"""What is read next, and that every prediction is counted once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.store.reading_queue import PIECE_BYTES, AheadCounters, BlobKey, ReadingQueue, Work

_BLOB_BYTES = 2 * PIECE_BYTES + 10


def _queue(max_queued: int = 100, max_ahead: int = 100) -> ReadingQueue:
    return ReadingQueue(lambda key: _BLOB_BYTES, max_queued, max_ahead * _BLOB_BYTES)


def _do(queue: ReadingQueue, is_missing: bool = True) -> Work | None:
    """What one thread does next."""
    work = queue.take()
    if work is None:
        return None
    if work.num_bytes:
        queue.finished(work)
    else:
        queue.checked(work.job, is_missing)
    return work


def _order(queue: ReadingQueue) -> list[BlobKey]:
    """The keys whose pieces are read, one after another, without repetition."""
    keys = []
    while (work := _do(queue)) is not None:
        if work.num_bytes:
            keys.append(work.job.key)
    return list(dict.fromkeys(keys))


def test_needed_before_predicted_before_wished_and_new_before_old():
    queue = _queue()
    queue.wish([(9, 1), (9, 0)])
    queue.predict([(1, 3), (1, 1)])
    queue.predict([(2, 5), (2, 4)])
    queue.demand((0, 7))
    queue.demand((0, 6))
    assert _order(queue) == [(0, 7), (0, 6), (2, 5), (2, 4), (1, 3), (1, 1), (9, 1), (9, 0)]


def test_what_is_needed_waits_for_one_piece():
    queue = _queue()
    queue.predict([(1, 0)])
    assert _do(queue) and _do(queue)  # looked at, and a piece
    queue.demand((0, 0))
    pieces = [_do(queue) for _ in range(5)]
    assert [work and (work.job.key, work.start) for work in pieces] == [
        ((0, 0), 0),
        ((0, 0), PIECE_BYTES),
        ((0, 0), 2 * PIECE_BYTES),
        ((1, 0), PIECE_BYTES),
        ((1, 0), 2 * PIECE_BYTES),
    ]
    assert sum(work.num_bytes for work in pieces if work) == 2 * _BLOB_BYTES - PIECE_BYTES


def test_a_prediction_said_again_comes_first():
    queue = _queue()
    queue.predict([(1, 0)])
    queue.predict([(1, 1)])
    queue.predict([(1, 0)])
    assert _order(queue) == [(1, 0), (1, 1)]


def test_what_is_in_memory_is_not_read_and_not_counted():
    queue = _queue()
    queue.predict([(1, 0)])
    assert _do(queue, is_missing=False)
    assert queue.take() is None
    job = queue.job((1, 0))
    assert job is not None and job.stage == "there"
    queue.demand((1, 0))
    assert queue.counters == AheadCounters()
    assert queue.take() is None


def test_what_becomes_of_predictions():
    queue = _queue()
    queue.predict([(1, 0), (1, 1), (1, 2), (1, 3)])
    for _ in range(4):
        _do(queue)  # all of the first one
    for _ in range(4):
        _do(queue)  # and of the second
    _do(queue)
    _do(queue)  # and a piece of the third
    queue.demand((1, 0))
    queue.demand((1, 2))
    queue.pass_layer(1)
    assert queue.counters == AheadCounters(begun=3, useful=1, late=1, useless=1)
    assert queue.num_predicted == 0
    assert [work and work.start for work in (_do(queue), _do(queue), _do(queue))] == [
        PIECE_BYTES,
        2 * PIECE_BYTES,
        None,
    ]


def test_an_expert_needed_while_it_is_looked_at_is_read():
    queue = _queue()
    queue.predict([(1, 0)])
    work = queue.take()
    assert work is not None and not work.num_bytes
    queue.demand((1, 0))
    queue.checked(work.job, is_missing=True)  # by now nobody's business
    assert queue.counters == AheadCounters()
    assert _order(queue) == [(1, 0)]


def test_a_demand_is_over_when_it_is_read():
    queue = _queue()
    queue.demand((0, 0))
    works = [queue.take() for _ in range(3)]
    assert queue.take() is None
    told = [queue.finished(work) for work in reversed(works) if work]
    assert told == [False, False, True]
    queue.use((0, 0))
    assert queue.job((0, 0)) is None
    queue.demand((0, 0))  # its bytes may have gone
    assert _order(queue) == [(0, 0)]


@pytest.mark.parametrize("max_queued", [0, 1, 3])
def test_the_oldest_predictions_are_forgotten(max_queued: int):
    queue = _queue(max_queued)
    for expert in range(5):
        queue.predict([(1, expert)])
    assert _order(queue) == [(1, expert) for expert in range(4, 4 - max_queued, -1)]


def test_no_more_is_read_ahead_than_memory_has_room_for():
    queue = _queue(max_ahead=2)
    queue.predict([(1, expert) for expert in range(4)])
    assert _order(queue) == [(1, 0), (1, 1)]
    queue.demand((1, 0))
    assert _order(queue) == []
    queue.use((1, 0))  # from here on somebody else uses its memory
    assert _order(queue) == [(1, 2)]
    queue.pass_layer(1)
    queue.predict([(2, 0)])
    assert _order(queue) == [(2, 0)]


def test_demands_are_read_ahead_of_their_use_as_far_as_there_is_room():
    queue = _queue(max_ahead=2)
    for expert in range(4):
        queue.demand((0, expert))
    queue.predict([(1, 0)])
    assert _order(queue) == [(0, 0), (0, 1)]
    queue.use((0, 0))
    assert _order(queue) == [(0, 2)]
    queue.use((0, 3))  # which nobody has read: it is urgent now
    assert _order(queue) == [(0, 3)]
    queue.use((0, 1))
    queue.use((0, 2))
    assert _order(queue) == [(1, 0)]


def test_the_most_urgent_demand_needs_no_room():
    queue = _queue(max_ahead=1)
    queue.predict([(1, 0)])
    assert _order(queue) == [(1, 0)]
    queue.demand((0, 0))
    queue.demand((0, 1))
    assert _order(queue) == [(0, 0)]


def test_demands_that_are_never_used_are_forgotten_with_their_layer():
    queue = _queue(max_ahead=1)
    queue.demand((0, 0))
    assert _order(queue) == [(0, 0)]
    queue.pass_layer(0)
    assert queue.job((0, 0)) is not None  # it will be used
    queue.pass_layer(1)
    assert queue.job((0, 0)) is None
    queue.predict([(2, 0)])
    assert _order(queue) == [(2, 0)]


def test_one_expert_is_read_ahead_even_if_it_is_too_large():
    queue = _queue(max_ahead=0)
    queue.predict([(1, 0), (1, 1)])
    assert _order(queue) == [(1, 0)]


_KEYS = st.tuples(st.integers(0, 2), st.integers(0, 3))
_ACTIONS = st.one_of(
    st.tuples(st.just("demand"), _KEYS),
    st.tuples(st.just("predict"), st.lists(_KEYS, max_size=5)),
    st.tuples(st.just("wish"), st.lists(_KEYS, max_size=3)),
    st.tuples(st.just("pass"), st.integers(0, 2)),
    st.tuples(st.just("use"), _KEYS),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("take"), st.none()),
    st.tuples(st.just("end"), st.tuples(st.integers(0, 3), st.booleans())),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_ACTIONS, max_size=60), st.integers(0, 4), st.integers(0, 3))
def test_whatever_happens(actions: list, max_queued: int, max_ahead: int):
    queue = _queue(max_queued, max_ahead)
    under_way: list[Work] = []
    allowed: set[BlobKey] = set()  # demands that were the most urgent when they were begun
    for name, argument in actions:
        if name == "demand":
            queue.demand(argument)
        elif name == "predict":
            queue.predict(argument)
        elif name == "wish":
            queue.wish(argument)
        elif name == "pass":
            queue.pass_layer(argument)
            assert not any(key[0] == argument for key in queue._predictions)
        elif name == "use":
            queue.use(argument)
        elif name == "clear":
            queue.clear()
        elif name == "take" and len(under_way) < 4:
            urgent = [job for job in queue._demands.values() if not job.used][:1]
            work = queue.take()
            if urgent and urgent[0].has_pieces:
                assert work is not None
                assert work.job is urgent[0] or work.job.used
                allowed.add(urgent[0].key)
            if work is not None:
                under_way.append(work)
        elif name == "end" and under_way:
            which, is_missing = argument
            work = under_way.pop(which % len(under_way))
            if work.num_bytes:
                queue.finished(work)
            else:
                queue.checked(work.job, is_missing)
        predictions = list(queue._predictions.values())
        assert not queue._demands.keys() & queue._predictions.keys()
        assert sum(job.stage == "new" for job in predictions) <= max_queued
        demands = list(queue._demands.values())
        assert not any(job.used and job.stage == "there" for job in demands)
        ahead = [job for job in (*predictions, *demands) if job.holds_room]
        assert len(ahead) <= max(1, max_ahead) + len(allowed)
        counters = queue.counters
        settled = counters.useful + counters.late + counters.useless
        assert counters.begun == settled + sum(job.begun for job in predictions)
    # All that is wanted is read in the end, and nobody waits for what does not come.
    for work in under_way:
        queue.finished(work) if work.num_bytes else queue.checked(work.job, True)
    for key in list(queue._demands):
        queue.use(key)
    while _do(queue) is not None:
        pass
    assert not queue._demands
