"""The best continuations of beams, on the device: so that the host reads a few numbers a step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.generation.sampling import penalize


def best_continuations(
    logits_BV: Float[Array, "B V"],
    log_probs_B: Float[Array, " B"],
    seen_BV: Bool[Array, "B V"] | None,
    penalty: Float[Array, ""],
    *,
    num_beams: int,
    number: int,
) -> tuple[Float[Array, "N C"], Int[Array, "N C"]]:
    """Finds the most probable next tokens among all beams of each of N prompts.

    Args:
      logits_BV: scores of the next token; the num_beams beams of a prompt are neighbours.
      log_probs_B: of each beam's tokens so far; -inf where there is no beam.
      seen_BV: tokens of each beam and its prompt; None without a repetition penalty. As in
        transformers it is log-probabilities that are penalized, and they are not normalised again.
      penalty: the repetition penalty.
      num_beams: of a prompt.
      number: how many to find, C.

    Returns:
      Log-probabilities of the beams with their next tokens, in float32, best first; and which
      these are: beam of the prompt * V + token id. Ties go to the lower one.
    """
    with jax.named_scope("best_continuations"):
        next_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
        if seen_BV is not None:
            next_BV = penalize(next_BV, seen_BV, penalty)
        together_BV = log_probs_B[:, None] + next_BV
        together_NV = together_BV.reshape(-1, num_beams * logits_BV.shape[-1])
        log_probs_NC, indices_NC = jax.lax.top_k(together_NV, number)
    return log_probs_NC, indices_NC
