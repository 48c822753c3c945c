r"""Rectification: how far the second moment can be trusted in the first steps.

RAdam (Liu et al., 1908.03265) treats the second moment as an average over :math:`\rho_t`
independent squares and corrects the rate for its variance. All formulas of it stand here.
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
      rectification: :math:`r_t` of the last update; 1 before the first and while intractable.
    """

    count: jax.Array
    rectification: jax.Array


def sma_length(b2: ArrayLike, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    r"""Return the length of the simple average that the second moment is worth after `count` steps.

    .. math:: \rho_t = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t},
      \qquad \rho_\infty = \frac{2}{1 - b_2} - 1

    In the first steps this is a difference of two large numbers: float32 gets 6.00049 for
    :math:`\rho_6 = 5.99416`. With :math:`\lambda = -\log b_2` both are hyperbolic cotangents,
    :math:`\rho_t = \coth(\lambda/2) - t\,(\coth(t\lambda/2) - 1)`, whose poles cancel, which
    leaves :math:`t + L(\lambda/2) - t\, L(t\lambda/2)` with `langevin` L: nothing large in it.
    """
    t = count.astype(dtype)
    rate = -jnp.log1p(jnp.asarray(b2 - 1, dtype))
    early = t + langevin(rate / 2) - t * langevin(t * rate / 2)
    # Not t / expm1(t λ), the same: that overflows, and its derivative is then NaN.
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
    r"""Return the factor on the rate, 1 where :math:`\rho_t` is not tractable.

    .. math:: r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}
      {(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}
    """
    longest = longest_sma(b2)
    safe = jnp.where(is_tractable(rho), rho, 5)
    square = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
    return jnp.where(is_tractable(rho), jnp.sqrt(square), 1)


def rectify(*, b2: ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Scale the update by :math:`r_t`, and by 1 while :math:`\rho_t < 5`.

    It follows whatever divides by the root of a second moment of decay b2. In the first steps RAdam
    itself drops that denominator: `ratio_once_tractable` is the join that does.

    Args:
      b2: decay of the second moment, in (2/3, 1): below, rectification would never start.

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
