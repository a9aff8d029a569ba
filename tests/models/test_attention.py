"""Attention, rotary embedding and the KV cache against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RopeConfig
from jmoe.models import kv_cache, rope
from jmoe.models.attention import attend, visible_keys
from tests.models.configs import small_config


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_equals_a_loop_over_queries(num_heads, num_kv_heads, window):
    generator = np.random.default_rng(0)
    q = generator.normal(size=(2, 3, num_heads, 8))
    k, v = generator.normal(size=(2, 2, num_kv_heads, 10, 8))
    starts = [0, 5]
    positions = jnp.array(starts)[:, None] + jnp.arange(3)
    out = attend(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(k, jnp.float32),
        jnp.asarray(v, jnp.float32),
        visible_keys(positions, 10, window),
    )
    for b, start in enumerate(starts):
        for i in range(3):
            position = start + i
            first = 0 if window is None else max(0, position - window + 1)
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                scores = k[b, g, first : position + 1] @ q[b, i, h] / np.sqrt(8)
                probs = np.exp(scores - scores.max())
                expected = probs / probs.sum() @ v[b, g, first : position + 1]
                np.testing.assert_allclose(out[b, i, h], expected, rtol=2e-5, atol=2e-6)


def test_rotation_depends_on_distance_only():
    config = RopeConfig(theta=1e4)
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(q_position: int, k_position: int) -> float:
        rotated = [
            rope.rotate(x, *rope.rotation(jnp.array([[position]]), config, 16))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), rel=1e-6)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-3)


def test_each_sequence_writes_at_its_own_position():
    cache = kv_cache.init_cache(small_config(), 2, 8, "float32").layers[0]
    new = jnp.arange(2 * 3 * 2 * 8, dtype=jnp.float32).reshape(2, 3, 2, 8) + 1
    cache = jax.jit(kv_cache.append)(cache, new, -new, jnp.array([0, 4]))
    k = np.asarray(cache.k)
    np.testing.assert_array_equal(k[0, :, :3], np.swapaxes(new[0], 0, 1))
    np.testing.assert_array_equal(k[1, :, 4:7], np.swapaxes(new[1], 0, 1))
    assert not k[0, :, 3:].any() and not k[1, :, :4].any() and not k[1, :, 7:].any()
    np.testing.assert_array_equal(np.asarray(cache.v), -k)


@pytest.mark.parametrize(
    ("num_positions", "capacity"), [(1, 128), (128, 128), (129, 256), (1000, 1024), (1024, 1024)]
)
def test_capacity_is_bucketed(num_positions, capacity):
    assert kv_cache.bucket_capacity(num_positions) == capacity


def test_cache_bytes_is_what_a_cache_takes():
    config = small_config()
    cache = kv_cache.init_cache(config, 3, 128, "bfloat16")
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert kv_cache.cache_bytes(config, 3, 128, "bfloat16") == total
