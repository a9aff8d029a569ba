"""Attention to a KV cache, against float64 and against XLA's."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models import attention
from jmoe.native import ops

# Of each query and head. Of bfloat16 results: what rounding to eight bits can do at most.
MAX_NMSE = {"float32": 1e-11, "bfloat16": 2.0**-16}
# Keys are taken in runs of so many.
RUN = 256
LARGEST, SMALLEST = 2**31 - 1, -(2**31)


class Case(NamedTuple):
    """Sizes are named as in jmoe/shapes.py; one start per sequence."""

    L: int
    H: int
    G: int
    P: int
    M: int
    starts: tuple[int, ...]
    window: int | None = None
    dtype: str = "float32"
    cache_dtype: str = "float32"

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        generator = np.random.default_rng(self.M)
        B = len(self.starts)
        # Large enough that some keys count for much more than others.
        q = 2 * generator.standard_normal((B, self.L, self.H, self.P))
        k, v = generator.standard_normal((2, B, self.G, self.M, self.P))
        k, v = (jnp.asarray(x, self.cache_dtype) for x in (k, v))
        return jnp.asarray(q, self.dtype), k, v, jnp.array(self.starts, jnp.int32)


def half(case: Case) -> Case:
    return case._replace(dtype="bfloat16", cache_dtype="bfloat16")


# Numbers of heads, and of keys that one step reads: one, two and four queries at a time, and all
# of them together.
HEADS = [(1, 1), (2, 2), (2, 1), (3, 1), (8, 2), (6, 3), (7, 1), (71, 1)]
HEAD_CASES = [Case(3, H, G, 32, 67, (10, 64)) for H, G in HEADS]

HEAD_DIMS = (1, 7, 16, 32, 33, 48, 64, 80, 96, 112, 128, 136, 256, 1024)
HEAD_DIM_CASES = [Case(2, 4, 2, P, 19, (0, 17)) for P in HEAD_DIMS]

# Ragged lengths; a run and its neighbours; the first and the last position; several blocks of
# queries; several runs.
LENGTH_CASES = [
    Case(1, 4, 1, 64, 1, (0, 0)),
    Case(1, 4, 1, 64, RUN, (0, 5, RUN - 2, RUN - 1)),
    Case(1, 4, 2, 64, RUN + 1, (RUN - 1, RUN)),
    Case(1, 8, 2, 128, 1030, (3, 1029, 512)),
    Case(1, 1, 1, 32, 3000, (2999,)),
    Case(3, 4, 2, 64, RUN + 9, (RUN - 2, 0, RUN + 6)),
    Case(64, 2, 2, 64, 64, (0,)),
    Case(64, 4, 1, 32, 2 * RUN, (2 * RUN - 64, 100)),
    Case(65, 6, 2, 48, 700, (600, 250)),
    Case(130, 1, 1, 16, 300, (0, 170)),
]
WINDOW_CASES = [
    case._replace(window=window) for case in LENGTH_CASES[3:] for window in (1, 2, 100, RUN, 10**6)
]
CASES = HEAD_CASES + HEAD_DIM_CASES + LENGTH_CASES + WINDOW_CASES
CASES += [half(case) for case in CASES]
CASES += [
    LENGTH_CASES[3]._replace(dtype="bfloat16"),
    LENGTH_CASES[8]._replace(cache_dtype="bfloat16", window=100),
]


@functools.partial(jax.jit, static_argnums=(4, 5))
def on_host(q, k, v, start_B, window=None, num_threads=0):
    return ops.attend(q, k, v, start_B, window, num_threads)


def run(case: Case, num_threads: int = 0) -> np.ndarray:
    return np.asarray(on_host(*case.arrays(), case.window, num_threads))


def first_and_end(position: int, num_keys: int, window: int | None) -> tuple[int, int]:
    first = 0 if window is None else max(0, position - window + 1)
    return first, min(position + 1, num_keys)


@functools.cache
def expected(case: Case) -> np.ndarray:
    q, k, v, _ = (np.asarray(x, np.float64) for x in case.arrays())
    out = np.zeros(q.shape)
    for b, start in enumerate(case.starts):
        for i in range(case.L):
            first, end = first_and_end(start + i, case.M, case.window)
            if first >= end:
                continue
            q_GRP = q[b, i].reshape(case.G, -1, case.P)
            scores = q_GRP @ k[b, :, first:end].swapaxes(1, 2) / np.sqrt(case.P)
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs /= probs.sum(axis=-1, keepdims=True)
            out[b, i] = (probs @ v[b, :, first:end]).reshape(case.H, case.P)
    return out


def check(out: np.ndarray, wanted: np.ndarray, dtype: str):
    """Relative to the mean square of values: of many keys the sums are small."""
    assert out.shape == wanted.shape and out.dtype == jnp.dtype(dtype)
    error = np.sum((out.astype(np.float64) - wanted) ** 2, axis=-1)
    size = np.maximum(np.sum(wanted**2, axis=-1), np.median(np.sum(wanted**2, axis=-1)))
    assert np.all(error <= MAX_NMSE[dtype] * size)


def bits_of(out) -> np.ndarray:
    out = np.asarray(out)
    return out.view(np.dtype(f"uint{8 * out.itemsize}"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(isa, case):
    check(run(case), expected(case), case.dtype)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("starts", [(-3, -1), (-100, 40), (38, 39), (40, 41), (43, 1000)], ids=str)
def test_positions_outside_of_the_cache(isa, starts, window):
    """Before the first key a query sees none and gets zeros; behind the last it sees up to that."""
    case = Case(5, 4, 2, 32, 40, starts, window)
    check(run(case), expected(case), "float32")


@pytest.mark.parametrize("window", [None, 1, 2**31, 2**62, 2**63 - 1])
def test_extreme_positions_and_windows(isa, window):
    case = Case(3, 2, 1, 32, 40, (LARGEST, LARGEST - 1, SMALLEST, SMALLEST + 2, 0), window)
    check(run(case), expected(case), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)])
def test_the_same_as_through_xla(isa, dtype, window, H, G):
    case = Case(9, H, G, 64, 300, (0, 255, 291), window, dtype, dtype)
    q, k, v, start_B = case.arrays()
    positions_BL = start_B[:, None] + jnp.arange(case.L)
    visible = attention.visible_keys(positions_BL, case.M, window)
    wanted = np.asarray(attention.attend(q, k, v, visible), np.float64)
    error = np.sum((run(case).astype(np.float64) - wanted) ** 2)
    # XLA rounds weights to bfloat16 before it adds up values.
    assert error < {"float32": 1e-11, "bfloat16": 2e-5}[dtype] * np.sum(wanted**2)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)], ids=str)
def test_nothing_to_compute(isa, sizes):
    k = jnp.ones((sizes[0], 2, 5, sizes[3]))
    assert on_host(jnp.ones(sizes), k, k, jnp.zeros(sizes[0], jnp.int32)).shape == sizes


def test_a_cache_without_positions(isa):
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 2, 0, 8))
    np.testing.assert_array_equal(on_host(q, k, k, jnp.zeros(2, jnp.int32)), 0)


# What a query gets depends on what it sees, and on nothing else.


def damaged(case: Case, b: int, keys: slice) -> np.ndarray:
    q, k, v, start_B = case.arrays()
    k, v = (x.at[b, :, keys].set(jnp.nan) for x in (k, v))
    return np.asarray(on_host(q, k, v, start_B, case.window))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 1), (3, 1)])
def test_keys_that_are_not_seen_are_not_used(isa, H, G, window, dtype):
    """Not even with a weight of zero: they may be anything, and not a number for one."""
    case = Case(7, H, G, 48, 300, (100, 254), window, dtype, dtype)
    whole = run(case)
    for b, start in enumerate(case.starts):
        for i in (0, 3, 6):
            first, end = first_and_end(start + i, case.M, window)
            for keys in (slice(end, None), slice(first), slice(end, end + 1)):
                after = damaged(case, b, keys)
                np.testing.assert_array_equal(bits_of(after[b, i]), bits_of(whole[b, i]))
                np.testing.assert_array_equal(bits_of(after[1 - b]), bits_of(whole[1 - b]))
            assert np.all(np.isnan(damaged(case, b, slice(end - 1, end))[b, i].astype(np.float32)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (5, 1)])
def test_a_query_alone_gets_the_same_bits(isa, H, G, window, dtype):
    """Neither other positions of the call nor other sequences change anything."""
    case = Case(70, H, G, 48, 600, (0, 500, 250), window, dtype, dtype)
    together = run(case)
    q, k, v, start_B = case.arrays()
    for b, i in ((0, 0), (0, 69), (1, 13), (1, 14), (2, 5), (2, 6), (2, 7)):
        one = slice(b, b + 1)
        alone = on_host(q[one, i : i + 1], k[one], v[one], start_B[one] + i, window)
        np.testing.assert_array_equal(bits_of(alone[0, 0]), bits_of(together[b, i]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_stays_in_its_query(isa, value):
    case = Case(6, 4, 2, 32, 300, (280, 90))
    q, k, v, start_B = case.arrays()
    after = np.array(on_host(q.at[1, 2, 3, 4].set(value), k, v, start_B))
    wanted = run(case)
    assert not np.any(np.isfinite(after[1, 2, 3]))
    after[1, 2, 3] = wanted[1, 2, 3]
    np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize("size", [1e6, 1e30])
def test_scores_of_all_magnitudes(isa, size):
    """The largest score takes all: its value comes out, however large the scores are."""
    case = Case(2, 4, 2, 32, 600, (598, 300))
    q, k, v, start_B = case.arrays()
    out = on_host(q * size, k, v, start_B)
    for b, start in enumerate(case.starts):
        for i, h in np.ndindex(case.L, case.H):
            scores = np.asarray(k, np.float64)[b, h // 2, : start + i + 1] @ q[b, i, h]
            second, first = np.sort(scores)[-2:]
            assert second < 0.99999 * first
            np.testing.assert_allclose(out[b, i, h], v[b, h // 2, np.argmax(scores)], rtol=1e-5)


def test_equal_scores_give_the_mean(isa):
    case = Case(4, 2, 1, 32, 700, (690,))
    q, k, v, start_B = case.arrays()
    out = on_host(0 * q, k, v, start_B)
    for i in range(case.L):
        wanted = np.mean(np.asarray(v, np.float64)[0, 0, : 691 + i], axis=0)
        np.testing.assert_allclose(out[0, i, 0], wanted, rtol=1e-4, atol=1e-7)


# Threads.

THREAD_CASES = [
    Case(1, 4, 1, 64, 3000, (2999,)),  # keys are split
    Case(1, 8, 2, 128, 2100, (2099, 5, 1000)),
    Case(3, 4, 2, 64, 2100, (2000, 300), 700),
    Case(64, 8, 2, 32, 600, (100, 536)),
    Case(1, 4, 2, 32, 40, (39,)),  # too little for a second thread
]
THREAD_CASES += [half(case) for case in THREAD_CASES]


@pytest.mark.parametrize("case", THREAD_CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(isa, case):
    check(run(case, 1), expected(case), case.dtype)
    for num_threads in (2, 5, 0):
        np.testing.assert_array_equal(bits_of(run(case, num_threads)), bits_of(run(case, 1)))


def test_calls_at_the_same_time_give_the_same_bits(isa):
    arrays = [case.arrays() for case in THREAD_CASES]
    wanted = [bits_of(run(case, 1)) for case in THREAD_CASES]

    def call(i: int) -> bool:
        j = i % len(THREAD_CASES)
        out = on_host(*arrays[j], THREAD_CASES[j].window, 5)
        return np.array_equal(bits_of(out), wanted[j])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(64)))
