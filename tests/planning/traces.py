"""Traces for tests: made up, and the recorded one that lies beside a checkout of the project."""

from pathlib import Path

import numpy as np
import pytest

from jmoe.planning.traces import RoutingTrace

MIXTRAL_TRACE = (
    Path(__file__).parents[3] / "shared" / "traces" / "mixtral-8x7b-instruct-mtbench.npz"
)

needs_mixtral_trace = pytest.mark.skipif(
    not MIXTRAL_TRACE.exists(), reason="needs shared/traces beside the checkout"
)


def random_trace(
    num_tokens: int = 40, num_layers: int = 3, num_experts: int = 6, top_k: int = 2, seed: int = 0
) -> RoutingTrace:
    """Random experts, in two sequences without prompts."""
    order = np.broadcast_to(np.arange(num_experts), (num_tokens, num_layers, num_experts))
    ids = np.random.default_rng(seed).permuted(order, axis=-1)[..., :top_k].astype(np.uint8)
    return RoutingTrace(
        decode_expert_ids=ids,
        decode_offsets=np.array([0, num_tokens // 2, num_tokens]),
        prompt_expert_ids=ids[:0],
        prompt_offsets=np.zeros(3, np.int64),
        num_experts=num_experts,
    )
