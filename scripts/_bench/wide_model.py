"""The embedded model with experts as large as one likes, and the routing of a trained model.

Rows of gate and up are repeated, and columns of down with them, which are divided by as much: so an
expert computes what it did, up to rounding. Random weights would be as large, but nobody can say
which of their experts are popular, or predict them as those of a trained model are.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jmoe.loading import EMBEDDED_MODEL
from jmoe.models import families
from jmoe.store.source import CheckpointSource


class WideSource:
    """See ``store.source.WeightSource``."""

    def __init__(self, times: int):
        """Args:
        times: that experts are as large: a power of two, so that dividing is exact.
        """
        assert times >= 1 and times & (times - 1) == 0
        self._inner = CheckpointSource(EMBEDDED_MODEL)
        self._times = times
        self.name = self.title(times)
        self.directory: Path | None = None
        width = times * self._inner.config.intermediate_size
        self.config_json: dict[str, Any] = {
            **self._inner.config_json,
            "intermediate_size": width,
        }
        self.config = families.config_from_json(self.config_json, self.name)

    @staticmethod
    def title(times: int) -> str:
        return f"the embedded model, experts of {times} times the size"

    @property
    def total_bytes(self) -> int:
        return self._inner.total_bytes * self._times

    def read(self, path: str, expert: int | None = None) -> np.ndarray:
        array = self._inner.read(path, expert)
        name = path.rpartition(".")[2]
        if expert is None:
            return array
        if name == "w2":
            return np.tile(array / array.dtype.type(self._times), (1, self._times))
        return np.tile(array, (self._times, 1))

    def fingerprint(self) -> dict[str, Any]:
        return {**self._inner.fingerprint(), "kind": "wide", "times": self._times}

    def side_files(self) -> dict[str, Path]:
        return self._inner.side_files()
