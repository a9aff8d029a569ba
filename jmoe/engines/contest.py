"""Which way of taking decode steps is the fastest, from the times of a batch's first tokens."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from jmoe.planning.policy import Misses

# How decode steps are taken. By the host, layer by layer: "thread" loads all missing experts,
# "split" has the host compute some of them, "host" all. Or by one program, "compiled".
Way = Literal["thread", "split", "host", "compiled"]
EngineName = Literal["thread", "compiled"]

# Of each way: tokens after which caches and clocks have settled, and tokens that count.
NUM_SETTLING = 4
NUM_COUNTING = 12
# At most so many ways are tried, and none that is predicted to be slower than the best by more.
MAX_WAYS = 3
HOPELESS = 3.0
# Ways that differ by less are compared more closely.
_CLOSE = 1.3
# And the two best ones, if they still differ by less, make as many tokens once more.
_UNSURE = 1.15


# What becomes of missing experts in the ways of the host's loop.
MISSES: dict[Way, Misses] = {"thread": "load", "split": "split", "host": "host"}
WAYS: dict[Misses, Way] = {misses: way for way, misses in MISSES.items()}


def engine_of(way: Way) -> EngineName:
    return "thread" if way in MISSES else "compiled"


class Contest:
    """Has each way make some tokens, one after the other, and names the fastest one.

    Attributes:
      ways: that take part, in their order.
      running: the one whose turn it is, and at the end the winner.
      is_over: whether the winner is known.
      predicted_s: seconds a token was to take, of those ways that somebody predicted.
      turns: the way of every token that was noted.
    """

    def __init__(self, tokens_per_call: int, ways: Sequence[Way] = ("thread", "compiled")):
        """Takes how many tokens the compiled engine makes at once, and distinct ways."""
        assert len(ways) == len(set(ways)) >= 1
        self.ways: tuple[Way, ...] = tuple(ways)
        self.running: Way = ways[0]
        self.is_over = len(ways) == 1
        self.predicted_s: Mapping[Way, float] = {}
        self._tokens_per_call = {way: tokens_per_call if way == "compiled" else 1 for way in ways}
        self._seconds: dict[Way, list[float]] = {way: [] for way in ways}
        self.turns: list[Way] = []
        self._evened_s: dict[Way, float] = {}
        self._num_rounds = 1
        self._tried: tuple[Way, ...] = self.ways  # those, too, that did not come so far

    @property
    def is_close(self) -> bool:
        """Whether the winner is not faster than all others by far."""
        best, *rest = sorted(map(self.token_s, self.ways))
        return bool(rest) and rest[0] < _CLOSE * best

    def predict(self, token_s: Mapping[Way, float]) -> None:
        """Says how long a token will take: the best ways begin, and hopeless ones do not.

        Nothing but the predictions changes when the contest has begun.
        """
        self.predicted_s = token_s
        if self.turns or not all(way in token_s for way in self.ways):
            return
        ways = sorted(self.ways, key=token_s.__getitem__)
        limit_s = HOPELESS * token_s[ways[0]]
        self.ways = tuple(way for way in ways[:MAX_WAYS] if token_s[way] <= limit_s)
        self.running, self.is_over = ways[0], len(self.ways) == 1
        self._tried = self.ways

    def drop(self, way: Way) -> None:
        """Takes a way out that is not possible here."""
        was_running, index = self.running == way, self.ways.index(way)
        self.ways = tuple(other for other in self.ways if other != way)
        self._tried = self.ways
        assert self.ways
        if len(self.ways) == 1:
            self.running, self.is_over = self.ways[0], True
        elif index == len(self.ways):
            self._finish()
        elif was_running:
            self.running = self.ways[index]

    def note(self, seconds: float) -> None:
        """Enters how long a token took, of the way that is running."""
        assert not self.is_over
        times = self._seconds[self.running]
        times.append(seconds)
        self.turns.append(self.running)
        per_call = self._tokens_per_call[self.running]
        turn = _whole_calls(NUM_SETTLING, per_call) + _whole_calls(NUM_COUNTING, per_call)
        if len(times) < self._num_rounds * turn:
            return
        if self.running != self.ways[-1]:
            self.running = self.ways[self.ways.index(self.running) + 1]
            return
        self._finish()

    def even_out(self, predicted_s: Sequence[float], by_way: Mapping[Way, Sequence[float]]) -> None:
        """Compares ways as if each had made the tokens of all, when the contest is over.

        A few tokens of one way may need more experts that are missing than those of another, and
        finds those that the way before left. So what counts is how much slower a way is than
        predicted for its tokens, times what is predicted for all.

        Args:
          predicted_s: of every token that was noted, as it was made; above 0.
          by_way: the same if that way had made all of them.
        """
        assert self.is_over
        # Nobody knows what would have been copied ahead of the compiled engine's tokens.
        is_shared = [turn in MISSES for turn in self.turns]
        for way in self.ways:
            per_call = self._tokens_per_call[way]
            own = [s for turn, s in zip(self.turns, predicted_s, strict=True) if turn == way]
            measured = _by_call(self._seconds[way], per_call)
            shared = itertools.compress(by_way[way], is_shared)
            factor = _ratio(measured, _by_call(own, per_call))
            self._evened_s[way] = factor * statistics.fmean(shared)
        self._finish()

    def reconsider(self) -> None:
        """Lets the two best ways go on, once, if they are too close to tell them apart."""
        best, *others = sorted(self.ways, key=self.token_s)
        if self._num_rounds > 1 or not others:
            return
        if self.token_s(others[0]) < _UNSURE * self.token_s(best):
            self._num_rounds, self.is_over = 2, False
            self.ways, self.running = (best, others[0]), best

    def _finish(self) -> None:
        self.is_over = True
        self.running = min(self.ways, key=self.token_s)  # of equal ones the first

    def token_s(self, way: Way) -> float:
        """Seconds a token takes: the median over calls, without those at first; or evened out."""
        if way in self._evened_s:
            return self._evened_s[way]
        return statistics.median(_by_call(self._seconds[way], self._tokens_per_call[way]))

    def __str__(self) -> str:
        first, *rest = map(self._describe, sorted(self._tried, key=self.token_s))
        return ", ".join([f"engine {first.replace(' ms', ' ms a token', 1)}", *rest])

    def _describe(self, way: Way) -> str:
        colon = ":" if way == self.running else ""
        predicted = self.predicted_s.get(way)
        beside = "" if predicted is None else f" (predicted {predicted * 1e3:.2f})"
        return f"{way}{colon} {self.token_s(way) * 1e3:.2f} ms{beside}"


def _by_call(seconds: Sequence[float], per_call: int) -> list[float]:
    """Seconds of a token in each call, without the calls at first."""
    settled = seconds[_whole_calls(NUM_SETTLING, per_call) :]
    calls = [settled[i : i + per_call] for i in range(0, len(settled), per_call)]
    return list(map(statistics.fmean, calls))


def _ratio(measured_s: Sequence[float], predicted_s: Sequence[float]) -> float:
    """Of sums: a long token says more than a short one; without strays at either end."""
    pairs = sorted(zip(measured_s, predicted_s, strict=True), key=lambda pair: pair[0] / pair[1])
    num_strays = len(pairs) // 6
    pairs = pairs[num_strays : len(pairs) - num_strays]
    return sum(measured for measured, _ in pairs) / sum(predicted for _, predicted in pairs)


def _whole_calls(num_tokens: int, per_call: int) -> int:
    """At least so many tokens, in whole calls."""
    return -(-num_tokens // per_call) * per_call
