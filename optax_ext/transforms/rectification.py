"""Rectification: a smaller rate in the first steps, where the second moment is not reliable.

RAdam (Liu et al., 1908.03265) treats the second moment as an average over ρ independent squares,
and corrects the rate for its variance. This file has all of its formulas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import first_count, next_count, scalar_dtype, scale, tree_map


class RectifyState(NamedTuple):
    """State of `rectify`.

    Attributes:
      count: number of updates done.
      rectification: r of the last update; 1 before the first, and while ρ < 5.
    """

    count: jax.Array
    rectification: jax.Array


def sma_length(b2: ArrayLike, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the length of the simple average that approximates the second moment at step `count`.

    In the first steps, the ρ of `rectify` is a difference of two large numbers: at t = 6, float32
    gets 6.00049 for 5.99416. With λ = -log b2 both are hyperbolic cotangents::

        ρ = coth(λ/2) - t (coth(t λ/2) - 1)
          = t + L(λ/2) - t L(t λ/2)

    Here L is `langevin`. In the second form the poles have cancelled, so it has no large terms.
    """
    t = count.astype(dtype)
    rate = -jnp.log1p(jnp.asarray(b2 - 1, dtype))
    early = t + langevin(rate / 2) - t * langevin(t * rate / 2)
    # t / expm1(t λ) would be the same number, but it overflows, and its derivative is then NaN.
    late = longest_sma(b2) - 2 * t * jnp.exp(-t * rate) / -jnp.expm1(-t * rate)
    return jnp.where(t * rate < 1, early, late)


def longest_sma(b2: ArrayLike) -> ArrayLike:
    """Return `ρ_max` of `rectify`, the limit of ρ."""
    return 2 / (1 - b2) - 1


def langevin(y: jax.Array) -> jax.Array:
    """Return `L(y) = coth y - 1/y` for y in [0, 1], by its continued fraction.

    ::

        L(y) = y / (3 + y² / (5 + y² / (7 + …)))
    """
    tail = 15.0
    for odd in (13, 11, 9, 7, 5, 3):
        tail = odd + y * y / tail
    return y / tail


def is_tractable(rho: jax.Array) -> jax.Array:
    """Return whether the variance of the second moment is small enough: ρ ≥ 5."""
    return rho >= 5


def rectification_term(rho: jax.Array, b2: ArrayLike) -> jax.Array:
    """Return the factor r of the update, which is 1 while ρ < 5; `rectify` has the equation."""
    longest = longest_sma(b2)
    safe = jnp.where(is_tractable(rho), rho, 5)
    square = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
    return jnp.where(is_tractable(rho), jnp.sqrt(square), 1)


def rectify(*, b2: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scale the update by r, which is small in the first steps.

    ::

        ρ_max = 2 / (1 - b2) - 1
        ρ = ρ_max - 2 t b2^t / (1 - b2^t)
        r = √((ρ - 4) (ρ - 2) ρ_max / ((ρ_max - 4) (ρ_max - 2) ρ)),   and 1 while ρ < 5

    Place it after a piece that divides by the root of a second moment with decay b2. RAdam itself
    omits this denominator in the first steps: use the join `ratio_once_tractable` for that.

    Args:
      b2: decay of the second moment, in (2/3, 1). Rectification would never start for a smaller
        one.

    Raises:
      ValueError: `b2` is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(optax.scale_by_adam(b2=0.999), rectify(b2=0.999))
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(6):
    ...     update, state = tx.update(jnp.array([3.0]), state)
    >>> print(f"{state[1].rectification:.6f}")
    0.025821
    """
    _checks.tractable_decay_rate(b2=b2)

    def init(params: optax.Params) -> RectifyState:
        _checks.float_leaves(params=params)
        return RectifyState(first_count(), jnp.ones((), scalar_dtype(params)))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = next_count(state.count)
        dtype = state.rectification.dtype
        r = rectification_term(sma_length(b2, count, dtype), b2).astype(dtype)
        return tree_map(lambda u: scale(r, u), updates), RectifyState(count, r)

    return optax.GradientTransformationExtraArgs(init, update)
