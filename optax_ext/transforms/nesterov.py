"""Nesterov forms of the first moment: an estimate of the average one step ahead.

All of them keep the plain average m = b m + (1 - b) g. They return a weighted sum of this average
and of the newest gradient::

    m_hat = c_m m + c_g g

They differ only in the two weights. For each form, a function below computes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import (
    cast_scalar_like,
    first_count,
    next_count,
    scalar_dtype,
    tree_map,
    zeros_like,
)
from optax_ext.transforms.averages import average, estimator
from optax_ext.transforms.bias_correction import total_weight
from optax_ext.transforms.moments import EmaState

Weights = tuple[ArrayLike, ArrayLike]


def nadam(b: ArrayLike, t: jax.Array, dtype: DTypeLike) -> Weights:
    """Return the weights of average and gradient: b / (1 - b^(t+1)) and (1 - b) / (1 - b^t)."""
    return b / total_weight(b, next_count(t), dtype), (1 - b) / total_weight(b, t, dtype)


def classical(b: ArrayLike, t: jax.Array, dtype: DTypeLike) -> Weights:
    """Return the weights of "nadam", but with 1 - b^(t+1) as both denominators."""
    ahead = total_weight(b, next_count(t), dtype)
    return b / ahead, (1 - b) / ahead


def hybrid(b: ArrayLike, t: jax.Array, dtype: DTypeLike) -> Weights:
    """Return the means of the weights of "nadam" and of the corrected average, 1 / (1 - b^t)."""
    of_average, of_gradient = nadam(b, t, dtype)
    return (of_average + 1 / total_weight(b, t, dtype)) / 2, of_gradient / 2


_VARIANTS: dict[str, Callable[[ArrayLike, jax.Array, DTypeLike], Weights]] = {
    "nadam": nadam,
    "classical": classical,
    "hybrid": hybrid,
}


def nesterov_ema(
    *, decay: ArrayLike, variant: str, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Estimate the first moment by a Nesterov form of the bias-corrected average.

    ::

        m = b m + (1 - b) g
        "nadam"       m_hat = b m / (1 - b^(t+1)) + (1 - b) g / (1 - b^t)
        "classical"   m_hat = (b m + (1 - b) g) / (1 - b^(t+1))
        "hybrid"      m_hat = the mean of "nadam" and m / (1 - b^t)

    "nadam" is that of Dozat (2016). "classical" is the corrected average after one more step with
    the same g.

    Args:
      decay: b, in [0, 1).
      variant: "nadam", "classical" or "hybrid".
      dtype: dtype that stores `mu`; `None` is the dtype of the parameters.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = nesterov_ema(decay=0.9, variant="classical")
    >>> estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{estimate[0]:.3f}")
    2.000
    """
    _checks.decay_rate(decay=decay)
    _checks.one_of(tuple(_VARIANTS), variant=variant)
    _checks.storage_dtype(dtype=dtype)

    def init(params: optax.Params) -> EmaState:
        return EmaState(first_count(), zeros_like(params, dtype))

    def advance(g, state, count):
        mu = average(g, state.mu, decay)
        weights = _VARIANTS[variant](decay, count, scalar_dtype(g))
        return _weighted(weights, mu, g), EmaState(count, mu)

    return estimator(init, advance)


class ScheduledNesterovState(NamedTuple):
    """State of `scheduled_nesterov_ema`.

    Attributes:
      count: number of updates done.
      mu: the uncorrected average, one leaf per parameter.
      momentum_product: P, the product of the scheduled momenta so far.
    """

    count: jax.Array
    mu: optax.Updates
    momentum_product: jax.Array


def scheduled_momentum(b: ArrayLike, t: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the momentum b (1 - 0.5 · 0.96^(0.004 t)), which rises from b/2 to b."""
    return jnp.asarray(b, dtype) * (1 - 0.5 * 0.96 ** (0.004 * t.astype(dtype)))


def scheduled_nesterov_ema(
    *, decay: ArrayLike, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Estimate the first moment by "nadam" of `nesterov_ema`, with a momentum that warms up.

    ::

        μ(t) = b (1 - 0.5 · 0.96^(0.004 t))
        P(t) = μ(1) μ(2) … μ(t)
        m_hat = μ(t+1) m / (1 - P(t+1)) + (1 - μ(t)) g / (1 - P(t))

    The momentum μ is that of Dozat (2016). The average m itself has the constant decay, as in
    PyTorch's NAdam.

    Args:
      decay: b, in [0, 1).
      dtype: dtype that stores `mu`; `None` is the dtype of the parameters.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = scheduled_nesterov_ema(decay=0.9)
    >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{state.momentum_product:.3f}")
    0.450
    """
    _checks.decay_rate(decay=decay)
    _checks.storage_dtype(dtype=dtype)

    def init(params: optax.Params) -> ScheduledNesterovState:
        zeros = zeros_like(params, dtype)
        return ScheduledNesterovState(first_count(), zeros, jnp.ones((), scalar_dtype(params)))

    def advance(g, state, count):
        mu = average(g, state.mu, decay)
        dtype = state.momentum_product.dtype
        now = scheduled_momentum(decay, count, dtype)
        ahead = scheduled_momentum(decay, next_count(count), dtype)
        product = now * state.momentum_product
        weights = ahead / (1 - ahead * product), (1 - now) / (1 - product)
        return _weighted(weights, mu, g), ScheduledNesterovState(count, mu, product)

    return estimator(init, advance)


def _weighted(weights: Weights, mu: optax.Updates, g: optax.Updates) -> optax.Updates:
    of_average, of_gradient = weights
    return tree_map(
        lambda g, m: cast_scalar_like(of_average, g) * m + cast_scalar_like(of_gradient, g) * g,
        g,
        mu,
    )
