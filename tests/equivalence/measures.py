"""What is compared, and how differences are expressed; used by the tests and the report."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jmoe.api import EMBEDDED_MODEL
from jmoe.store.tokenizer import Tokenizer

PROMPT_LENGTHS = (1, 7, 64, 300)
LONG_PROMPT = 700  # more than one chunk of prefill
NEW_TOKENS = 64

# Everything said: the model's generation_config.json fills in what is not.
GREEDY = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": NEW_TOKENS,
    "stop_token_ids": (),
}
SAMPLED = {
    "temperature": 0.8,
    "top_p": 0.9,
    "repetition_penalty": 1.0,
    "max_new_tokens": 40,
    "stop_token_ids": (),
}

MAX_NMSE = 1e-7  # against transformers in float32, at every position
# Below this, float32 arithmetic in another order could choose other experts.
MIN_ROUTER_MARGIN = 1e-4


def random_prompt(length: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(length).integers(vocab_size, size=length).tolist()


def nmse(got_LV: np.ndarray, reference_LV: np.ndarray) -> np.ndarray:
    """Squared error by position over the reference's sum of squares: float64 [L]."""
    reference_LV = reference_LV.astype(np.float64)
    error_LV = got_LV.astype(np.float64) - reference_LV
    return np.sum(error_LV**2, axis=-1) / np.sum(reference_LV**2, axis=-1)


def log_probabilities(logits_LV: np.ndarray, targets_L: Sequence[int]) -> np.ndarray:
    """Log-probability of each position's target, float64 [L]."""
    logits_LV = logits_LV.astype(np.float64)
    logits_LV -= logits_LV.max(axis=-1, keepdims=True)
    chosen_L = logits_LV[np.arange(len(targets_L)), np.asarray(targets_L)]
    return chosen_L - np.log(np.sum(np.exp(logits_LV), axis=-1))


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A piece of text that is scored on its own, after a begin-of-text token."""

    token_ids: list[int]  # begin-of-text, then all targets but the last
    targets: list[int]


def eval_text() -> str:
    return (EMBEDDED_MODEL / "eval.txt").read_text(encoding="utf-8")


def eval_windows(tokenizer: Tokenizer, size: int, count: int | None = None) -> list[Window]:
    """Cuts the held-out text of the embedded model into windows of so many predictions."""
    begin, *token_ids = tokenizer.encode(eval_text())
    pieces = [token_ids[i : i + size] for i in range(0, len(token_ids) - size + 1, size)]
    return [Window([begin, *piece[:-1]], piece) for piece in pieces[:count]]


def perplexity(logits: Callable[[Sequence[int]], np.ndarray], windows: Sequence[Window]) -> float:
    """exp of the mean negative log-probability over all predictions."""
    log_probs = [log_probabilities(logits(w.token_ids), w.targets) for w in windows]
    return float(np.exp(-np.mean(np.concatenate(log_probs))))


def top1_agreement(got: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> tuple[int, int]:
    """At how many positions both find the same token the most probable, and of how many."""
    same = np.concatenate(
        [g.argmax(axis=-1) == r.argmax(axis=-1) for g, r in zip(got, reference, strict=True)]
    )
    return int(same.sum()), same.size
