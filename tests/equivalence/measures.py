"""What is compared, and how differences are expressed; used by the tests and the report."""

from collections.abc import Sequence

import numpy as np

from jmoe.api import EMBEDDED_MODEL
from jmoe.engines.evaluation import Logits, Window, cut_windows, evaluate
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


def eval_text() -> str:
    return (EMBEDDED_MODEL / "eval.txt").read_text(encoding="utf-8")


def eval_windows(tokenizer: Tokenizer, size: int, count: int | None = None) -> list[Window]:
    """Cuts the held-out text of the embedded model into windows of so many predictions."""
    token_ids = tokenizer.encode(eval_text())
    return cut_windows(token_ids, size, bos_token_id=tokenizer.bos_token_id, max_windows=count)


def perplexity(logits: Logits, windows: Sequence[Window]) -> float:
    """exp of the mean negative log-probability over all predictions."""
    return evaluate(logits, windows).perplexity


def top1_agreement(got: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> tuple[int, int]:
    """At how many positions both find the same token the most probable, and of how many."""
    same = np.concatenate(
        [g.argmax(axis=-1) == r.argmax(axis=-1) for g, r in zip(got, reference, strict=True)]
    )
    return int(same.sum()), same.size
