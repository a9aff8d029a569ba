"""The embedded model against itself: other dtypes, other batches. Needs no torch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jmoe.engines.evaluation import Window
from jmoe.engines.resident import ResidentEngine
from jmoe.store.tokenizer import Tokenizer
from tests.equivalence import measures, running

# 1,000 predictions: four windows of 250.
TOP1_WINDOW = 250
TOP1_WINDOWS = 4

# Unequal prompts of one batch; the longest fills less than its chunk.
BATCH_LENGTHS = (61, 127, 250)


def top1_windows(tokenizer: Tokenizer) -> list[Window]:
    return measures.eval_windows(tokenizer, TOP1_WINDOW, TOP1_WINDOWS)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchDifference:
    """Logits of sequences in batches against the same sequences alone.

    Attributes:
      positions: of all sequences.
      compared: those where every router is decided by more than MIN_ROUTER_MARGIN.
      max_nmse_compared: largest error at the compared positions.
      max_nmse: largest error at all positions.
    """

    positions: int
    compared: int
    max_nmse_compared: float
    max_nmse: float

    @property
    def share_compared(self) -> float:
        return self.compared / self.positions


def batch_difference(
    engine: ResidentEngine, tokenizer: Tokenizer, num_batches: int
) -> BatchDifference:
    """Runs pieces of the held-out text in batches of three unequal ones, and alone."""
    windows = measures.eval_windows(tokenizer, max(BATCH_LENGTHS), num_batches * 3)
    errors, margins = [], []
    for first in range(0, len(windows), 3):
        batch = [
            window.token_ids[:length]
            for window, length in zip(windows[first : first + 3], BATCH_LENGTHS, strict=True)
        ]
        for prompt, (logits_LV, margin_L) in zip(
            batch, running.batch_logits(engine, batch), strict=True
        ):
            errors.append(measures.nmse(logits_LV, engine.logits(prompt)))
            margins.append(margin_L)
    errors, margins = np.concatenate(errors), np.concatenate(margins)
    decided = margins > measures.MIN_ROUTER_MARGIN
    return BatchDifference(
        positions=errors.size,
        compared=int(decided.sum()),
        max_nmse_compared=float(errors[decided].max()),
        max_nmse=float(errors.max()),
    )


def mean_nmse(got: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Error averaged over the positions of all windows."""
    errors = [measures.nmse(g, r) for g, r in zip(got, reference, strict=True)]
    return float(np.concatenate(errors).mean())
