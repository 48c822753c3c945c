r"""Rectification: a smaller rate in the first steps, where the second moment is not reliable.

RAdam (Liu et al., 1908.03265) treats the second moment as an average over :math:`\rho_t`
independent squares and corrects the rate for its variance. This file has all of its formulas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import first_count, next_count, scalar_dtype, scale, tree_map


class RectifyState(NamedTuple):
    r"""State of `rectify`.

    Attributes:
      count: number of updates done.
      rectification: :math:`r_t` of the last update; 1 before the first, and while
        :math:`\rho_t < 5`.
    """

    count: jax.Array
    rectification: jax.Array


def sma_length(b2: ArrayLike, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    r"""Return the length of the simple average that approximates the second moment at step `count`.

    .. math:: \rho_t = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t},
      \qquad \rho_\infty = \frac{2}{1 - b_2} - 1

    In the first steps this is a difference of two large numbers: float32 gets 6.00049 for
    :math:`\rho_6 = 5.99416`. With :math:`\lambda = -\log b_2` both are hyperbolic cotangents,
    :math:`\rho_t = \coth(\lambda/2) - t\,(\coth(t\lambda/2) - 1)`. Their poles cancel, and
    :math:`t + L(\lambda/2) - t\, L(t\lambda/2)` remains, where L is `langevin`. This form has no
    large terms.
    """
    t = count.astype(dtype)
    rate = -jnp.log1p(jnp.asarray(b2 - 1, dtype))
    early = t + langevin(rate / 2) - t * langevin(t * rate / 2)
    # t / expm1(t λ) would be the same number, but it overflows, and its derivative is then NaN.
    late = longest_sma(b2) - 2 * t * jnp.exp(-t * rate) / -jnp.expm1(-t * rate)
    return jnp.where(t * rate < 1, early, late)


def longest_sma(b2: ArrayLike) -> ArrayLike:
    r"""Return :math:`\rho_\infty = 2/(1 - b_2) - 1`."""
    return 2 / (1 - b2) - 1


def langevin(y: jax.Array) -> jax.Array:
    r"""Return :math:`L(y) = \coth y - 1/y` for :math:`0 \le y \le 1`, by its continued fraction.

    .. math:: L(y) = \cfrac{y}{3 + \cfrac{y^2}{5 + \cfrac{y^2}{7 + \cdots}}}
    """
    tail = 15.0
    for odd in (13, 11, 9, 7, 5, 3):
        tail = odd + y * y / tail
    return y / tail


def is_tractable(rho: jax.Array) -> jax.Array:
    r"""Return whether the variance of the second moment is small enough: :math:`\rho_t \ge 5`."""
    return rho >= 5


def rectification_term(rho: jax.Array, b2: ArrayLike) -> jax.Array:
    r"""Return the factor :math:`r_t` on the rate; it is 1 where :math:`\rho_t < 5`.

    .. math:: r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}
      {(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}
    """
    longest = longest_sma(b2)
    safe = jnp.where(is_tractable(rho), rho, 5)
    square = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
    return jnp.where(is_tractable(rho), jnp.sqrt(square), 1)


def rectify(*, b2: ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Scale the update by :math:`r_t`, and by 1 while :math:`\rho_t < 5`.

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
