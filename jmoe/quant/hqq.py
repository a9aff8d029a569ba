"""HQQ: moving the zero points of groups until a sparse (p < 1) norm of the error is small.

Half-quadratic splitting; it needs no data. For an error e of a weight and a penalty beta that
grows, the part of e that is worth keeping is shrink(e); the zero point moves to the mean of
code - weight / scale + shrink(e) / scale.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models,
https://mobiusml.github.io/hqq_blog, as used by https://arxiv.org/abs/2312.17238.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.quant.formats import QuantFormat

# Constants of the paper's code.
NORM = 0.7
BETA = 10.0
BETA_GROWTH = 1.01
NUM_ITERATIONS = 20

# Weights of a group that are added up one by one, then the sums: long enough for registers,
# short enough to compile.
_RUN = 16
# Groups that still move are gathered once they are less than this share of the groups ...
_SHARE = 4
# ... unless they are few anyway.
_FEW_GROUPS = 1024


@functools.partial(jax.jit, static_argnames=("fmt",))
def best_zeros(
    w_NK: Float[Array, "*stack N K"],
    scales_NG: Float[Array, "*stack N G"],
    zeros_NG: Float[Array, "*stack N G"],
    fmt: QuantFormat,
) -> Float[Array, "*stack N G"]:
    """The best of the zero points that the iteration visits, group by group.

    Best is the least squared error weighted by the square of the weight. The paper's code
    keeps the last zero point; least absolute error, its measure of convergence, gave the
    embedded model a higher perplexity than round-to-nearest at 4 and 3 bits: errors of large
    weights matter more.

    Args:
      w_NK: weights of any float type.
      scales_NG: of the groups, as they are stored; 0 for a group of zeros.
      zeros_NG: where to begin.
      fmt: an affine format.
    """
    scales, zeros = scales_NG.reshape(-1), zeros_NG.reshape(-1)
    inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)
    # Group by group along the last dimension, where processors have their vectors.
    x_QM = (w_NK.astype(jnp.float32).reshape(-1, fmt.group_size) * inverse[:, None]).T
    x_QM = x_QM.reshape(-1, _RUN, zeros.size)
    # An error beyond this, in steps, has a part to keep: at the last penalty, and so at any.
    reach = jnp.where(scales > 0, _threshold(_beta(NUM_ITERATIONS)) * inverse, jnp.inf)
    lowest, highest = jnp.min(x_QM, axis=(0, 1)), jnp.max(x_QM, axis=(0, 1))
    groups = _Groups(
        x=x_QM,
        mean=_means(x_QM, lambda x: (x,))[0],
        min_zero=jnp.where(reach < 0.5, jnp.inf, -lowest - reach),
        max_zero=fmt.max_code - highest + reach,
    )
    search = _Search(
        iteration=jnp.int32(0),
        zeros=zeros,
        moving=jnp.ones(zeros.shape, bool),
        best=zeros,
        best_error=jnp.full_like(zeros, jnp.inf),
        shrinks=jnp.zeros((), bool),
    )
    best, shrinks = _search(groups, search, fmt.max_code)
    best = lax.cond(
        shrinks,
        lambda: _search_shrinking(groups, search, scales, inverse, fmt.max_code),
        lambda: best,
    )
    return best.reshape(zeros_NG.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Groups:
    """What does not change. M groups, of weights divided by their scales.

    Attributes:
      x: [Q / run, run, M].
      mean: of x, [M].
      min_zero: with a zero point below this an error is beyond reach, [M].
      max_zero: the same above.
    """

    x: jax.Array
    mean: jax.Array
    min_zero: jax.Array
    max_zero: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """Zero points on their way.

    Attributes:
      iteration: how many went before.
      zeros: where they are now, [M].
      moving: whether the last iteration changed them, [M].
      best: of those before, [M].
      best_error: of best, [M].
      shrinks: whether an error was beyond reach.
    """

    iteration: jax.Array
    zeros: jax.Array
    moving: jax.Array
    best: jax.Array
    best_error: jax.Array
    shrinks: jax.Array


def _search(groups: _Groups, search: _Search, max_code: int) -> tuple[jax.Array, jax.Array]:
    """The best zero points while no error is beyond reach, and whether one was.

    Then a zero point depends on the codes only: where it stays, all further iterations are
    equal. Most groups are there after three, so that the others are gathered and go on alone.
    """
    num_groups = search.zeros.size
    num_left = num_groups // _SHARE if num_groups > _FEW_GROUPS else 0

    def goes_on(search: _Search) -> jax.Array:
        num_moving = jnp.sum(search.moving)
        return (search.iteration <= NUM_ITERATIONS) & (num_moving > num_left) & ~search.shrinks

    def step(search: _Search) -> _Search:
        zeros = search.zeros
        beyond = (zeros < groups.min_zero) | (zeros > groups.max_zero)
        mean_code, search = _visit(groups, search, max_code)
        return dataclasses.replace(
            search,
            zeros=mean_code - groups.mean,
            moving=mean_code - groups.mean != zeros,
            shrinks=search.shrinks | jnp.any(beyond),
        )

    search = lax.while_loop(goes_on, step, search)
    if not num_left:
        return search.best, search.shrinks
    # Should fewer be moving, some of the others come along and stay where they are.
    _, chosen = lax.top_k(search.moving.astype(jnp.float32), num_left)

    def gather(array: jax.Array) -> jax.Array:
        return array if array.ndim == 0 else jnp.take(array, chosen, axis=-1, mode="clip")

    groups, others = jax.tree.map(gather, (groups, search))
    best, shrinks = _search(groups, others, max_code)
    return search.best.at[chosen].set(best, unique_indices=True), shrinks


def _search_shrinking(
    groups: _Groups, search: _Search, scales: jax.Array, inverse: jax.Array, max_code: int
) -> jax.Array:
    """The same with the parts of errors that are worth keeping, for weights of order one."""

    def step(i: jax.Array, search: _Search) -> _Search:
        shifted = groups.x + search.zeros
        error = (shifted - _round(shifted, max_code)) * scales
        kept = jnp.mean(_shrink(error, _beta(i)), axis=(0, 1)) * inverse
        mean_code, search = _visit(groups, search, max_code)
        return dataclasses.replace(search, zeros=mean_code - groups.mean + kept)

    return lax.fori_loop(0, NUM_ITERATIONS + 1, step, search).best


def _visit(groups: _Groups, search: _Search, max_code: int) -> tuple[jax.Array, _Search]:
    """The mean code of each group, and the search with its zero points taken into account."""

    def terms(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shifted = x + search.zeros
        codes = _round(shifted, max_code)
        return codes, jnp.square(x * (shifted - codes))

    mean_code, error = _means(groups.x, terms)
    better = error < search.best_error
    return mean_code, dataclasses.replace(
        search,
        iteration=search.iteration + 1,
        best=jnp.where(better, search.zeros, search.best),
        best_error=jnp.where(better, error, search.best_error),
    )


def _means(
    x: jax.Array, terms: Callable[[jax.Array], tuple[jax.Array, ...]]
) -> tuple[jax.Array, ...]:
    """Means over each group [Q / run, run, M] of functions of its weights, in a fixed order.

    Written out as sums of vectors: XLA:CPU's reductions add up one by one, or in an order that
    depends on the shape; and it would compute what they share again for every use of a sum.
    """

    def add_run(r: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for x_M in x[r]:
            sums = tuple(a + b for a, b in zip(sums, terms(x_M), strict=True))
        return sums

    num_runs, run, num_groups = x.shape
    nothing = tuple(jnp.zeros(num_groups) for _ in jax.eval_shape(terms, x[0, 0]))
    sums = lax.fori_loop(0, num_runs, add_run, nothing)
    return tuple(total / (num_runs * run) for total in sums)


def _round(shifted: jax.Array, max_code: int) -> jax.Array:
    return jnp.clip(jnp.round(shifted), 0, max_code)


def _beta(iteration: jax.Array | int) -> jax.Array:
    return BETA * jnp.power(BETA_GROWTH, jnp.asarray(iteration, jnp.float32))


def _threshold(beta: jax.Array) -> jax.Array:
    """Errors up to this have no part to keep."""
    return beta ** (-1 / (2 - NORM))


def _shrink(error: jax.Array, beta: jax.Array) -> jax.Array:
    """The proximal operator of the p-norm."""
    magnitude = jnp.abs(error)
    power = jnp.exp((NORM - 1) * jnp.log(jnp.maximum(magnitude, 1e-30)))
    return jnp.sign(error) * jnp.maximum(magnitude - power / beta, 0)
