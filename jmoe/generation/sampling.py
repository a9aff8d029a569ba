"""Choosing the next token on the device, inside the compiled step.

Options apply in the order of Hugging Face transformers: repetition penalty, temperature,
top-k, top-p, min-p. Values are arguments of the program; only which of them are in use
(SamplingKind) makes a different program, so that greedy decoding never pays for a sort.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jmoe.generation.options import GenerationOptions


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingKind:
    """What a program for choosing tokens has to do."""

    greedy: bool
    truncated: bool  # any of top-k, top-p, min-p
    penalized: bool  # repetition penalty: needs the tokens seen so far

    @classmethod
    def of(cls, options: GenerationOptions) -> "SamplingKind":
        truncated = options.top_k > 0 or options.top_p < 1 or options.min_p > 0
        return cls(
            greedy=options.is_greedy,
            truncated=truncated and not options.is_greedy,
            penalized=options.repetition_penalty != 1,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingValues:
    """The numbers that go with a SamplingKind; one set for all sequences of a batch."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # never 0: the vocabulary's size keeps all
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def penalize(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Makes tokens seen already less likely, whatever the sign of their score.

    Source: CTRL, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized, logits_BV)


def truncate(sorted_BV: Float[Array, "B V"], values: SamplingValues) -> Float[Array, "B V"]:
    """Puts tokens outside top-k, top-p and min-p at -inf; the best token always stays.

    Args:
      sorted_BV: scores after temperature, best first. Among equal scores the order decides.
      values: the limits.
    """
    ranks_V = jnp.arange(sorted_BV.shape[-1])
    kept = jnp.where(ranks_V < values.top_k, sorted_BV, -jnp.inf)
    probs = jax.nn.softmax(kept, axis=-1)
    # A token stays if those before it have not reached p yet.
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where((before < values.top_p) | (ranks_V == 0), kept, -jnp.inf)
    return jnp.where(probs >= values.min_p * probs[:, :1], kept, -jnp.inf)


def sample(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"] | None,
    keys_B: Key[Array, " B"],
    values: SamplingValues,
    kind: SamplingKind,
) -> Int[Array, " B"]:
    """Chooses one token per sequence.

    Args:
      logits_BV: float32 scores.
      seen_BV: tokens of each sequence so far; None without a repetition penalty.
      keys_B: one random key per sequence for this step; equal keys and scores give equal
        tokens, whatever the rest of the batch is.
      values: temperature and limits.
      kind: static; what to do.
    """
    with jax.named_scope("sample"):
        if seen_BV is not None:
            logits_BV = penalize(logits_BV, seen_BV, values.repetition_penalty)
        if kind.greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        # The largest score becomes 0, so that no temperature can overflow.
        scores_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        scores_BV = scores_BV / values.temperature
        if not kind.truncated:
            return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
        sorted_BV, ids_BV = jax.lax.top_k(scores_BV, scores_BV.shape[-1])
        ranks_B = jax.vmap(jax.random.categorical)(keys_B, truncate(sorted_BV, values))
        return jnp.take_along_axis(ids_BV, ranks_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
