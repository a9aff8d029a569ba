"""How well a model predicts a text: alone, and beside a reference such as itself unquantized.

A text is scored in windows of equal length, each on its own. The logits of one window are held at a
time, of both models; what is kept of a prediction is a few numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jmoe.errors import CheckpointError, RequestError

# Scores the next token at every position: token ids [L] to float32 [L, V]. ResidentEngine.logits.
Logits = Callable[[Sequence[int]], np.ndarray]

# Logits that are looked at in float64 at a time.
_MAX_ELEMENTS = 2**22


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A piece of text that is scored on its own.

    Attributes:
      token_ids: what the model sees: begin-of-text, or else the token before the first target;
        then all targets but the last.
      targets: what it should predict, one per position.
    """

    token_ids: list[int]
    targets: list[int]


def cut_windows(
    token_ids: list[int],
    size: int,
    *,
    bos_token_id: int | None = None,
    max_windows: int | None = None,
) -> list[Window]:
    """Cuts a text into windows of so many predictions; a shorter rest is left out.

    Args:
      token_ids: of the text, as the tokenizer encodes it.
      size: predictions of a window, which are its positions too.
      bos_token_id: the begin-of-text token. If the text starts with it, every window does.
      max_windows: of the beginning of the text; None takes it all.

    Raises:
      RequestError: the text is shorter than a window, or size or max_windows is below one.
    """
    if size < 1 or (max_windows is not None and max_windows < 1):
        raise RequestError(
            "windows must be one or more, of at least one prediction",
            got=f"window={size}, max_windows={max_windows}",
        )
    targets = token_ids[1:]
    begin = token_ids[:1] if token_ids[:1] == [bos_token_id] else []
    windows = []
    for first in range(0, len(targets) - size + 1, size):
        seen = begin + token_ids[first + len(begin) : first + size]
        windows.append(Window(seen, targets[first : first + size]))
    if not windows:
        raise RequestError(
            "the text is shorter than one window",
            got=f"{len(targets)} tokens to predict",
            expected=f"at least {size}",
            do="give a longer text, or make the windows smaller",
        )
    return windows[:max_windows]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model beside a reference, over the same predictions.

    Attributes:
      reference_perplexity: of the reference.
      perplexity_ratio: of the model to the reference; above one, the model is worse.
      perplexity_ratio_error: its standard error, of paired windows; None for one window.
      kl_mean: Kullback-Leibler divergence of the model's distribution from the reference's,
        in nats per prediction: sum over the vocabulary of p_reference * log(p_reference / p_model).
      kl_median: half of the predictions have less.
      kl_p99: 99 % of the predictions have less.
      top1_agreement: share of predictions where both find the same token the most probable.
    """

    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float | None
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
      num_windows: pieces of text.
      num_predictions: in all.
      perplexity: exp of the mean negative log-probability of what comes next.
      perplexity_error: its standard error, of the differences between windows; None for one.
      comparison: with a reference; None without one.
    """

    num_windows: int
    num_predictions: int
    perplexity: float
    perplexity_error: float | None
    comparison: Comparison | None


def evaluate(
    logits: Logits,
    windows: Sequence[Window],
    reference: Logits | None = None,
    on_window: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Scores windows of a text.

    Args:
      logits: the model.
      windows: one or more.
      reference: what to compare with; run on each window after the model.
      on_window: called after each window.

    Raises:
      CheckpointError: logits that are not finite.
      RequestError: the reference has another vocabulary; or as ``logits`` does.
    """
    losses, reference_losses, divergences, agreements = [], [], [], []
    for window in windows:
        logits_LV = _finite(logits(window.token_ids))
        losses.append(-log_probabilities(logits_LV, window.targets))
        if reference is not None:
            reference_LV = _finite(reference(window.token_ids))
            divergences.append(kl_divergence(reference_LV, logits_LV))
            agreements.append(logits_LV.argmax(axis=-1) == reference_LV.argmax(axis=-1))
            reference_losses.append(-log_probabilities(reference_LV, window.targets))
        on_window()
    comparison = None
    if reference is not None:
        divergence = np.concatenate(divergences)
        differences = [a - b for a, b in zip(losses, reference_losses, strict=True)]
        ratio, ratio_error = _perplexity(differences)
        comparison = Comparison(
            reference_perplexity=_perplexity(reference_losses)[0],
            perplexity_ratio=ratio,
            perplexity_ratio_error=ratio_error,
            kl_mean=float(divergence.mean()),
            kl_median=float(np.median(divergence)),
            kl_p99=float(np.quantile(divergence, 0.99)),
            top1_agreement=float(np.concatenate(agreements).mean()),
        )
    perplexity, error = _perplexity(losses)
    return Evaluation(
        num_windows=len(losses),
        num_predictions=sum(map(len, losses)),
        perplexity=perplexity,
        perplexity_error=error,
        comparison=comparison,
    )


def log_probabilities(logits_LV: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Log-probability of each position's target, in float64 [L]."""
    chosen = np.asarray(targets)
    pieces = [
        _log_softmax(logits_LV[rows])[np.arange(len(chosen[rows])), chosen[rows]]
        for rows in _pieces(logits_LV)
    ]
    return np.concatenate(pieces)


def kl_divergence(reference_LV: np.ndarray, logits_LV: np.ndarray) -> np.ndarray:
    """Divergence of softmax(logits) from softmax(reference) by position, in nats, float64 [L].

    Raises:
      RequestError: the vocabularies differ.
    """
    if reference_LV.shape != logits_LV.shape:
        raise RequestError(
            "the reference has another vocabulary",
            got=f"{reference_LV.shape[-1]} tokens",
            expected=f"{logits_LV.shape[-1]}, as the model",
            do="compare with a model of the same family",
        )
    pieces = []
    for rows in _pieces(logits_LV):
        expected = _log_softmax(reference_LV[rows])
        difference = expected - _log_softmax(logits_LV[rows])
        pieces.append(np.sum(np.exp(expected) * difference, axis=-1))
    # Rounding can leave less than zero of nothing.
    return np.maximum(np.concatenate(pieces), 0.0)


def _log_softmax(logits_LV: np.ndarray) -> np.ndarray:
    shifted = logits_LV.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _pieces(logits_LV: np.ndarray) -> Iterator[slice]:
    """Rows that make up _MAX_ELEMENTS at most."""
    num_rows, vocab_size = logits_LV.shape
    step = max(1, _MAX_ELEMENTS // vocab_size)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def _finite(logits_LV: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits_LV).all():
        raise CheckpointError(
            "a model computes NaN or infinity",
            got=f"logits at position {int(np.argmin(np.isfinite(logits_LV).all(axis=-1)))}",
            do="look for damaged weights with scripts/check.py --deep, or use --dtype=float32",
        )
    return logits_LV


def _perplexity(losses: Sequence[np.ndarray]) -> tuple[float, float | None]:
    """exp of the mean loss, and its standard error.

    Predictions of one window depend on each other; windows, much less. So the error is that of
    the mean of their means, carried through exp.
    """
    perplexity = float(np.exp(np.concatenate(losses).mean()))
    if len(losses) < 2:
        return perplexity, None
    means = [window.mean() for window in losses]
    return perplexity, perplexity * float(np.std(means, ddof=1) / np.sqrt(len(means)))
