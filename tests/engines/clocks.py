"""Clocks for tests of what is measured: time passes when they are asked, or when somebody waits."""

import numpy as np


class FakeClock:
    """Every look at it takes a while."""

    def __init__(self, tick_s: float = 1e-4):
        self.now_s = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def wait(self, seconds: float) -> bool:
        """Passes this time, as ``ThrottledLink`` waits."""
        self.now_s += seconds
        return False


class NoisyClock(FakeClock):
    """As on a machine where others compute, too."""

    def __init__(self, tick_s: float = 1e-4):
        super().__init__(tick_s)
        self._rng = np.random.default_rng(0)

    def __call__(self) -> float:
        self.now_s += self._rng.exponential(self.tick_s)
        return self.now_s
