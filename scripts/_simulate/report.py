"""Tables of replays, as text."""

from collections.abc import Mapping, Sequence

from _simulate.replays import RULES, Replay


def hit_rates(replays: Sequence[Replay]) -> str:
    """Hit rates by slots and rule, beside what LRU, or the first rule, loads."""
    rules = list(dict.fromkeys(replay.rule for replay in replays))
    main = "lru" if "lru" in rules else rules[0]
    cells = {(replay.slots, replay.rule): replay.result for replay in replays}
    rows = [["slots", *rules, f"{main}: all", "loads/token"]]
    for slots in dict.fromkeys(replay.slots for replay in replays):
        result = cells[slots, main]
        rates = [f"{cells[slots, rule].hit_rate:.3f}" for rule in rules]
        all_hit, loads = f"{result.full_hit_rate:.3f}", f"{result.loads_per_token:.1f}"
        rows.append([str(slots), *rates, all_hit, loads])
    lines = ["Share of needed experts that are there, by slots in each layer:", _table(rows), ""]
    lines += [f"  {rule}: {RULES[rule]}" for rule in rules]
    return "\n".join([*lines, f"  {main}: all: all experts of a token in a layer are there"])


def each(replays: Sequence[Replay]) -> str:
    """A line for each policy."""
    rows = [
        [
            *("slots", "rule", "predictor", "hit rate", "useful", "loads/token", "tok/s"),
            *("stalled", "of bound"),
        ]
    ]
    for replay in replays:
        result = replay.result
        rows.append(
            [
                str(replay.slots),
                replay.rule,
                replay.predictor,
                f"{result.hit_rate:.3f}",
                f"{result.useful / result.speculated:.0%}" if result.speculated else "-",
                f"{result.loads_per_token:.1f}",
                f"{result.tokens_per_s:.3f}" if result.seconds else "-",
                f"{result.stall_s / result.seconds:.0%}" if result.seconds else "-",
                f"{result.bound_share:.1%}" if result.seconds else "-",
            ]
        )
    return (
        f"{_table(rows)}\n\n"
        "  useful: of the predicted copies; stalled: share of time that waits for copies\n"
        "  of bound: max(time of the copies made, compute) / time"
    )


def each_way(replays: Sequence[Replay]) -> str:
    """A line for each policy and way of serving misses."""
    titles = ["slots", "rule", "predictor", "misses", "hit rate", "loads/token", "host/token"]
    rows = [[*titles, "tok/s", "link s", "host s", "device s", "of bound", "longest"]]
    for replay in replays:
        result = replay.result
        busy_s = {"link": result.link_s, "host": result.host_s, "device": result.compute_s}
        rows.append(
            [
                str(replay.slots),
                replay.rule,
                replay.predictor,
                replay.way,
                f"{result.hit_rate:.3f}",
                f"{result.loads_per_token:.1f}",
                f"{result.host_experts / result.num_tokens:.1f}",
                f"{result.tokens_per_s:.3f}",
                *(f"{seconds:.3g}" for seconds in busy_s.values()),
                f"{result.bound_share:.1%}",
                max(busy_s, key=lambda name: busy_s[name]),
            ]
        )
    return (
        f"{_table(rows)}\n\n"
        "  host/token: experts that the host computed\n"
        "  link s, host s, device s: how long each of them worked\n"
        "  of bound: what the longest of the three explains of the time"
    )


def recall(rates: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Recall of predictions by distance and number fetched."""
    width = max(len(row) for by_distance in rates.values() for row in by_distance)
    rows = [["predictor", "layers ahead", *(str(number + 1) for number in range(width))]]
    for name, by_distance in rates.items():
        for distance, row in enumerate(by_distance, 1):
            cells = [f"{rate:.3f}" for rate in row] + [""] * (width - len(row))
            rows.append([name, str(distance), *cells])
    return f"Share of needed experts that are predicted, by number fetched:\n{_table(rows)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
