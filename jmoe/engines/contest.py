"""Which of two engines is faster, from the times of a batch's first tokens."""

import statistics
from typing import Literal

EngineName = Literal["thread", "compiled"]

# Of each engine: tokens after which caches and clocks have settled, and tokens that count.
NUM_SETTLING = 4
NUM_COUNTING = 12


class Contest:
    """Has each engine make some tokens, one after the other, and names the faster one.

    Attributes:
      running: the engine whose turn it is, and at the end the winner.
      is_over: whether the winner is known.
    """

    def __init__(self, tokens_per_call: int):
        """Takes how many tokens the compiled engine makes at once."""
        self.running: EngineName = "thread"
        self.is_over = False
        self._tokens_per_call = {"thread": 1, "compiled": tokens_per_call}
        self._seconds: dict[str, list[float]] = {"thread": [], "compiled": []}

    def note(self, seconds: float) -> None:
        """Enters how long a token took, of the engine that is running."""
        assert not self.is_over
        times = self._seconds[self.running]
        times.append(seconds)
        per_call = self._tokens_per_call[self.running]
        settling = _whole_calls(NUM_SETTLING, per_call)
        if len(times) < settling + _whole_calls(NUM_COUNTING, per_call):
            return
        if self.running == "thread":
            self.running = "compiled"
            return
        self.is_over = True
        if self.token_s("thread") <= self.token_s("compiled"):
            self.running = "thread"

    def token_s(self, engine: EngineName) -> float:
        """Seconds a token takes: the median over calls, without those at first."""
        per_call = self._tokens_per_call[engine]
        times = self._seconds[engine][_whole_calls(NUM_SETTLING, per_call) :]
        calls = [times[i : i + per_call] for i in range(0, len(times), per_call)]
        return statistics.median(map(statistics.fmean, calls))

    def __str__(self) -> str:
        winner: EngineName = self.running
        loser: EngineName = "compiled" if winner == "thread" else "thread"
        return (
            f"engine {winner}: {self.token_s(winner) * 1e3:.2f} ms a token, "
            f"{loser} {self.token_s(loser) * 1e3:.2f} ms"
        )


def _whole_calls(num_tokens: int, per_call: int) -> int:
    """At least so many tokens, in whole calls."""
    return -(-num_tokens // per_call) * per_call
