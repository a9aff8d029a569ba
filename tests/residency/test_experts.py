"""Experts by name: arrays that are right, where they are kept, and how many there are at most."""

import threading
import time

import jax
import numpy as np
import pytest

from jmoe.errors import TransferError
from jmoe.residency.cache import ExpertKey, SlotCache
from jmoe.residency.eviction import LRU
from jmoe.residency.experts import DeviceExperts
from jmoe.residency.link import DeviceLink, Link
from tests.residency.counting_link import CountingLink
from tests.residency.faulty_link import FaultyLink, HeldLink, make_blob

LAYERS, EXPERTS = 3, 6


def make_experts(
    slots: int | list[int] = 2, num_staging: int = 4, link: Link | None = None, min_free: int = 0
) -> DeviceExperts:
    """Three layers of six experts; slots of each layer, or by layer."""
    cache = SlotCache(
        [slots] * LAYERS if isinstance(slots, int) else slots,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        num_staging=num_staging,
        eviction=LRU(),
        min_free=min_free,
    )
    return DeviceExperts(link or DeviceLink(jax.devices()[0]), make_blob, cache)


@pytest.fixture
def held():
    """A link whose copies arrive when the test says so, and experts behind it."""
    link = HeldLink()
    experts = make_experts(link=link)
    yield link, experts
    experts.close()


def no_fence() -> None:
    """No program runs in these tests."""


def check(arrays, layer: int, experts) -> None:
    for array, expert in zip(arrays, experts, strict=True):
        np.testing.assert_array_equal(array, make_blob(ExpertKey(layer, expert)))


def take(experts: DeviceExperts, layer: int, ids: list[int], predictions=()) -> None:
    """What a decode step does in a layer."""
    experts.need(layer, ids)
    experts.pass_layer(layer)
    experts.predict(predictions)
    check(experts.take(layer, ids), layer, ids)
    experts.release()


def stream(experts: DeviceExperts, layer: int, ids: list[int], wanted: list[int]) -> list[int]:
    """What a prompt does in a layer; returns the order."""
    order = []
    for expert, array, _ in experts.stream(layer, ids, wanted, no_fence):
        check([array], layer, [expert])
        order.append(expert)
    assert sorted(order) == sorted(ids)
    return order


def test_what_is_needed_is_there_once_and_stays():
    experts = make_experts()
    for _ in range(3):
        take(experts, 1, [4, 0])
    traffic = experts.counts() - make_experts().counts()
    assert (traffic.hits, traffic.demand_loads, traffic.copies) == (4, 2, 2)
    assert traffic.copied_bytes == 2 * make_blob(ExpertKey(0, 0)).nbytes
    assert experts.peak_places == 2
    experts.close()


def test_what_was_predicted_is_a_hit_without_another_copy():
    experts = make_experts()
    take(experts, 0, [0, 1], [(1, [2, 3])])
    take(experts, 1, [2, 3])
    traffic = experts.counts() - make_experts().counts()
    assert (traffic.hits, traffic.demand_loads, traffic.copies) == (2, 2, 4)
    assert (traffic.prefetches, traffic.useful_prefetches) == (2, 2)
    experts.close()


def test_what_was_predicted_wrongly_and_not_begun_is_not_copied(held):
    link, experts = held
    experts.need(0, [0, 1])
    experts.predict([(1, [2, 3])])
    link.await_started(2)  # no more at a time
    experts.need(1, [4, 5])
    experts.pass_layer(1)
    link.let_arrive(4)
    check(experts.take(1, [4, 5]), 1, [4, 5])
    assert len(link.started) == 4
    assert ExpertKey(1, 2) not in experts.cache and ExpertKey(1, 3) not in experts.cache


def test_a_prediction_under_way_is_waited_for_and_not_copied_twice(held):
    link, experts = held
    experts.predict([(1, [2])])
    link.await_started(1)
    experts.need(1, [2])
    link.let_arrive(1)
    check(experts.take(1, [2]), 1, [2])
    assert len(link.started) == 1


def test_more_predictions_than_room_are_no_harm():
    experts = make_experts(slots=0, num_staging=4, min_free=2)
    everything = [(layer, list(range(EXPERTS))) for layer in range(1, LAYERS)]
    for _ in range(2):
        take(experts, 0, [0, 5], everything)
        take(experts, 1, [5, 3], everything[1:])
        take(experts, 2, [1, 2])
    assert experts.peak_places <= 4
    experts.close()


@pytest.mark.parametrize(
    ("slots", "num_staging"),
    [
        (slots, num_staging)
        for slots, smallest in ((0, 0), (1, 1), (3, 3), (6, 6), ([0, 6, 2], 0))
        for num_staging in (2, 4, 7)
        if smallest + num_staging >= 4  # two experts and two copies
    ],
    ids=str,
)
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "irregular"])
def test_any_order_of_work_gives_the_right_bytes_in_no_more_memory_than_places(
    slots, num_staging, slow
):
    counting = CountingLink()
    link = FaultyLink(counting, slow_rate=0.3, slow_s=0.002) if slow else counting
    experts = make_experts(slots, num_staging, link)
    counting.limit = experts.cache.num_places
    rng = np.random.default_rng(num_staging)

    def some(count: int) -> list[int]:
        return rng.permutation(EXPERTS)[:count].tolist()

    for _ in range(12):
        for layer in range(LAYERS):
            ahead = [(later, some(2)) for later in range(layer + 1, LAYERS)]
            take(experts, layer, some(2), ahead)
        for layer in range(LAYERS):
            wanted = some(EXPERTS)
            for expert, array, all_started in experts.stream(layer, some(5), wanted, no_fence):
                check([array], layer, [expert])
                if all_started and layer + 1 < LAYERS:
                    experts.predict([(layer + 1, some(3))], no_fence)
                del array
    assert experts.peak_places <= experts.cache.num_places
    assert 0 < counting.peak <= experts.cache.num_places
    experts.close()


def test_a_prompt_leaves_what_it_used_most():
    experts = make_experts()
    take(experts, 1, [5, 4])
    stream(experts, 1, [5, 3, 0, 1, 2], wanted=[2, 1, 0, 3, 5])
    assert experts.cache.resident(1) == (1, 2)
    # From now on these are the most recent, the best one last.
    take(experts, 1, [0])
    assert experts.cache.resident(1) == (0, 2)
    experts.close()


def test_what_a_prompt_finds_here_is_not_copied_again():
    experts = make_experts()
    take(experts, 1, [5, 4])
    before = experts.counts()
    assert stream(experts, 1, [3, 4, 5], wanted=[5, 4, 3])[:2] == [4, 5]
    traffic = experts.counts() - before
    assert (traffic.hits, traffic.demand_loads, traffic.copies) == (2, 1, 1)
    assert experts.cache.resident(1) == (4, 5)
    experts.close()


def test_what_was_predicted_for_a_prompt_is_used_and_kept():
    experts = make_experts()
    stream(experts, 0, [0], wanted=[0])
    experts.predict([(1, [2, 3])], no_fence)
    before = experts.counts()
    stream(experts, 1, [1, 2, 3], wanted=[3, 2, 1])
    traffic = experts.counts() - before
    assert (traffic.hits, traffic.demand_loads) == (2, 1)
    assert (traffic.useful_prefetches, traffic.useless_prefetches) == (2, 0)
    assert experts.cache.resident(1) == (2, 3)
    experts.close()


def test_a_right_prediction_that_waits_is_not_dropped_when_a_prompt_comes_to_it(held):
    link, experts = held
    experts.predict([(1, [2, 3, 4])])  # the last one has to wait
    link.await_started(2)
    link.let_arrive(10)
    stream(experts, 1, [2, 3, 4], wanted=[2, 3, 4])
    traffic = experts.counts() - make_experts().counts()
    assert (traffic.hits, traffic.useful_prefetches, traffic.copies) == (3, 3, 3)


def test_a_wrong_prediction_that_waits_is_dropped_when_a_prompt_comes_to_it(held):
    link, experts = held
    experts.predict([(1, [2, 3, 4])])
    link.await_started(2)
    link.let_arrive(10)
    stream(experts, 1, [2, 3], wanted=[2, 3])
    assert ExpertKey(1, 4) not in experts.cache and len(link.started) == 2


@pytest.mark.parametrize("use", [take, lambda *args: stream(*args, wanted=[])])
def test_a_copy_that_began_just_when_it_was_called_off_is_asked_for_again(held, use):
    link, experts = held
    experts.predict([(1, [2])])
    link.await_started(1)
    assert not experts._fetcher.cancel(ExpertKey(1, 2))  # the race, without a race
    link.let_arrive(2)
    use(experts, 1, [2])


def test_a_prompt_waits_for_copies_that_hold_all_of_staging():
    link = HeldLink()
    experts = make_experts(slots=3, num_staging=2, link=link)
    experts.predict([(2, [0, 1])])
    link.await_started(2)
    timer = threading.Timer(0.05, link.let_arrive, [20])
    timer.start()
    stream(experts, 1, [0, 1, 2, 3, 4], wanted=[0, 1, 2, 3, 4])
    assert experts.cache.resident(1) == (0, 1, 2)
    timer.join()
    experts.close()


def test_a_prompt_may_be_left_in_the_middle():
    experts = make_experts()
    for _ in experts.stream(1, [0, 1, 2, 3], [3, 2, 1, 0], no_fence):
        break
    experts.settle()
    take(experts, 1, [4, 5])
    stream(experts, 1, [0, 1, 2, 3, 4, 5], wanted=[3])
    experts.close()


def test_a_fence_comes_before_an_array_is_dropped():
    experts = make_experts(slots=1, num_staging=3)
    arrays: set[int] = set()
    under_way: set[int] = set()

    def fence() -> None:
        under_way.clear()

    forget = experts._forget_array

    def checked(key: ExpertKey) -> None:
        assert key.expert not in under_way
        arrays.discard(key.expert)
        forget(key)

    experts._forget_array = checked
    for _ in range(3):
        for expert, _, all_started in experts.stream(
            1, list(range(EXPERTS)), list(range(EXPERTS)), fence
        ):
            if all_started:
                experts.predict([(2, [0, 1, 2])], fence)
            under_way.add(expert)
        fence()
    experts.close()


def test_fewer_and_more_places_between_batches():
    link = CountingLink()
    experts = make_experts(slots=3, num_staging=5, link=link)
    for layer in range(LAYERS):
        take(experts, layer, [0, 1, 2], [(layer, [3, 4])])
    for slots, num_staging in (([1, 0, 2], 4), ([0, 0, 0], 4), ([6, 6, 6], 2), ([2, 2, 2], 3)):
        experts.resize(slots, num_staging)
        assert link.num_alive <= sum(slots) + num_staging
        for layer in range(LAYERS):
            take(experts, layer, [layer, 5])
    experts.close()
    assert link.num_alive == 0


def test_a_failed_copy_is_needed_again_and_comes():
    experts = make_experts(link=FaultyLink(DeviceLink(jax.devices()[0]), script=["finish"]))
    experts.need(0, [0, 1])
    with pytest.raises(TransferError, match="layer 0, expert 0"):
        experts.take(0, [0, 1])
    experts.settle()
    take(experts, 0, [0, 1])
    experts.close()


def test_waiting_is_counted_as_stalled_and_nothing_else_is(held):
    link, experts = held
    experts.need(0, [0])
    link.await_started(1)
    time.sleep(0.02)
    link.let_arrive(1)
    experts.take(0, [0])
    time.sleep(0.1)
    experts.need(0, [0])
    stalled_s = (experts.counts() - make_experts().counts()).stalled_s
    assert 0.02 <= stalled_s < 0.1


def test_closing_twice_is_closing_once():
    experts = make_experts()
    take(experts, 0, [0])
    experts.close()
    experts.close()
