"""Top-k routing: which experts each token uses, and with what weight.

Pure functions of arrays. Nothing here knows where an expert's weights live.
Source: Mixtral of Experts, https://arxiv.org/abs/2401.04088, section 2.1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.config import RouterConfig
from jmoe.models.linear import linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens.

    Attributes:
      weights_TK: float32 weights of the chosen experts, best first.
      expert_ids_TK: int32 ids in [0, E), best first; ties go to the lowest id.
      probs_TE: float32 probabilities of all experts, for statistics and margins.
    """

    weights_TK: Float[Array, "T K"]
    expert_ids_TK: Int[Array, "T K"]
    probs_TE: Float[Array, "T E"]


def softmax_top_k(logits_TE: Float[Array, "T E"], config: RouterConfig) -> Routing:
    """Probabilities over all experts; the best K keep theirs, renormalised if configured."""
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_TK, expert_ids_TK = jax.lax.top_k(probs_TE, config.top_k)
    if config.norm_topk_prob:
        weights_TK /= jnp.sum(weights_TK, axis=-1, keepdims=True)
    return Routing(weights_TK, expert_ids_TK, probs_TE)


ROUTERS = {"softmax": softmax_top_k}


def route(
    hidden_TD: Float[Array, "T D"], w_router_ED: Float[Array, "E D"], config: RouterConfig
) -> Routing:
    """Scores every expert for every token and keeps the best K.

    Args:
      hidden_TD: normalised residual stream, in the model's compute dtype.
      w_router_ED: router weights, in the same dtype. The product is accumulated and kept in
        float32, because the choice of experts is discontinuous in it.
      config: kind, K, and whether the K weights are renormalised to sum to one.
    """
    with jax.named_scope("router"):
        return ROUTERS[config.kind](linear(hidden_TD, w_router_ED), config)
