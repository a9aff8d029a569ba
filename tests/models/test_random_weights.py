"""Experts to measure with: quick to make, and possible ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models.experts import expert_form, expert_output
from jmoe.models.random_weights import fill_blobs, random_blobs
from jmoe.quant.layout import ExpertLayout, aligned_empty
from jmoe.quant.spec import parse_spec


def outputs(layout: ExpertLayout, blob: np.ndarray) -> np.ndarray:
    x_RD = jax.random.normal(jax.random.key(0), (4, layout.hidden_size), jnp.float32)
    items, form = jnp.asarray(blob.view(layout.dtype)), expert_form(4, "cpu")
    return np.asarray(expert_output(x_RD, jnp.ones(4, bool), items, layout, "silu", form, None))


@pytest.mark.parametrize("quant", ["f32", "bf16", "int8", "int4", "attn4-experts3"])
def test_experts_to_measure_with_compute_numbers_of_usual_size(quant: str):
    layout = ExpertLayout.of(64, 128, parse_spec(quant))
    blobs = aligned_empty((3, layout.num_bytes), np.uint8)
    blobs[:] = 0xFF  # NaN as floats
    fill_blobs(layout, blobs)
    assert (blobs == blobs[0]).all()
    usual = outputs(layout, random_blobs(layout, 1, seed=0)[0].view(np.uint8))
    assert np.std(outputs(layout, blobs[0])) == pytest.approx(np.std(usual), rel=0.5)
