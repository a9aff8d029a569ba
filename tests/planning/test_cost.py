"""Which missing experts are copied and which are computed on the host."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from jmoe.planning.cost import TOLERANCE, Absent, ExpertCosts, split

SECONDS = st.floats(0, 10, allow_nan=False)


def _costs(copy_s=1.0, host_s=1.0, device_s=0.0, hand_over_s=0.0, shares_cores=False):
    return ExpertCosts(
        copy_s=copy_s,
        host=lambda tokens: host_s * tokens,
        device=lambda tokens: device_s,
        hand_over_s=hand_over_s,
        shares_cores=shares_cores,
    )


def test_one_expert_follows_the_published_rule_of_fiddler():
    """Its constants: 7 for each token on the CPU, 70 for a copy and the GPU; the CPU below 10."""
    costs = _costs(copy_s=68, host_s=7, device_s=2)
    for tokens in range(1, 64):
        on_host = bool(split([Absent(0, tokens)], costs).host)
        assert on_host == (tokens < 10)


def test_equal_ways_share_the_experts():
    four = [Absent(expert, 1) for expert in range(4)]
    result = split(four, _costs())
    assert (result.device, result.host, result.seconds) == ((0, 1), (2, 3), 2.0)


def test_experts_of_many_tokens_are_copied_and_those_of_few_computed():
    absent = [Absent(0, 1), Absent(1, 90), Absent(2, 2), Absent(3, 70)]
    result = split(absent, _costs(copy_s=30, host_s=1))
    assert set(result.device) == {1, 3} and set(result.host) == {0, 2}


def test_a_busy_link_leaves_more_to_the_host():
    two = [Absent(0, 1), Absent(1, 1)]
    assert len(split(two, _costs()).device) == 1
    assert not split(two, _costs(), backlog_s=5).device


def test_a_copy_under_way_is_waited_for_only_if_that_is_sooner():
    assert split([Absent(0, 1, 0.4)], _costs()).device == (0,)
    assert split([Absent(0, 1, 1.6)], _costs()).host == (0,)


def test_what_the_device_computes_delays_the_host_if_they_share_cores():
    absent = [Absent(0, 1)]
    apart = split(absent, _costs(copy_s=2.5, host_s=2), present_s=2)
    shared = split(absent, _costs(copy_s=2.5, host_s=2, shares_cores=True), present_s=2)
    assert (apart.host, shared.host) == ((0,), ())


def test_ways_that_are_as_soon_copy():
    assert split([Absent(0, 1)], _costs()).device == (0,)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.none() | SECONDS), max_size=5),
    SECONDS,
    SECONDS,
    SECONDS,
    SECONDS,
    st.booleans(),
)
def test_no_other_split_is_sooner(experts, copy_s, host_s, hand_over_s, backlog_s, share):
    """Where the device takes no time; else which copy comes first would count, too."""
    device_s = 0.0
    absent = [Absent(i, tokens, arrives_s) for i, (tokens, arrives_s) in enumerate(experts)]
    costs = _costs(copy_s, host_s, device_s, hand_over_s, share)
    chosen = split(absent, costs, backlog_s=backlog_s)
    assert sorted((*chosen.host, *chosen.device)) == list(range(len(absent)))
    best_s = min(
        _seconds([a for a in absent if a.expert in on_host], absent, costs, backlog_s)
        for size in range(len(absent) + 1)
        for on_host in itertools.combinations(range(len(absent)), size)
    )
    on_host = [a for a in absent if a.expert in chosen.host]
    assert _seconds(on_host, absent, costs, backlog_s) <= best_s * (1 + TOLERANCE) + 1e-9


def _seconds(on_host, absent, costs, backlog_s):
    """Of one choice, said again."""
    host_s = sum(costs.host(a.tokens) for a in on_host) + (costs.hand_over_s if on_host else 0)
    others = [a for a in absent if a not in on_host]
    device_s = sum(costs.device(a.tokens) for a in others)
    arrivals = [a.arrives_s for a in others if a.arrives_s is not None]
    if copied := [a for a in others if a.arrives_s is None]:
        arrivals.append(backlog_s + len(copied) * costs.copy_s)
    link_s = max(arrivals) + costs.device(1) if others else 0.0
    return max(link_s, host_s + device_s if costs.shares_cores else max(host_s, device_s))
