"""Bias correction of exponential moving averages that start at zero.

After t steps the weights of an average with decay b add up to `1 - b^t`, not to 1. So the average
is divided by this sum.
"""

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
    scale,
    tree_map,
)


def total_weight(decay: ArrayLike, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the sum `1 - b^t` of an average's weights after `count` steps.

    It is computed as `-expm1(t log b)`. The plain form loses five of float32's
    seven digits for b = 0.999 and small t.
    """
    return _total_weight(jnp.asarray(decay - 1, dtype), count.astype(dtype))


@jax.custom_jvp
def _total_weight(x: jax.Array, t: jax.Array) -> jax.Array:
    """Return `1 - (1 + x)^t`."""
    return -jnp.expm1(t * jnp.log1p(x))


@_total_weight.defjvp
def _derivative(primals, tangents):
    """Differentiate the plain form, because the logarithm's derivative is infinite at b = 0."""
    (x, t), (dx, _) = primals, tangents
    first = t == 1  # 0^0, whose own derivative is NaN
    power = jnp.where(first, 1, jnp.where(first, 1, 1 + x) ** (t - 1))
    return _total_weight(x, t), -t * power * dx


def debias(average: optax.Updates, decay: ArrayLike, count: jax.Array) -> optax.Updates:
    """Divide an average of decay `decay` by its total weight after `count` steps."""
    unbias = 1 / total_weight(decay, count, scalar_dtype(average))
    return tree_map(lambda m: cast_scalar_like(unbias, m) * m, average)


class CorrectBiasState(NamedTuple):
    """State of `correct_bias`: the number of updates done."""

    count: jax.Array


def correct_bias(*, b1: ArrayLike, b2: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Correct the bias of both moments together, in their quotient.

    ::

        u = u √(1 - b2^t) / (1 - b1^t)

    Keras' Adam adds eps to the root of the uncorrected second moment, divides the uncorrected first
    moment by this sum, and corrects the bias afterwards. The usual form corrects each moment first.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).

    Raises:
      ValueError: a decay is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = correct_bias(b1=0.9, b2=0.99)
    >>> update, _ = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{update[0]:.3f}")
    1.000
    """
    _checks.decay_rate(b1=b1, b2=b2)

    def init(params: optax.Params) -> CorrectBiasState:
        _checks.float_leaves(params=params)
        return CorrectBiasState(first_count())

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = next_count(state.count)
        dtype = scalar_dtype(updates)
        factor = jnp.sqrt(total_weight(b2, count, dtype)) / total_weight(b1, count, dtype)
        return tree_map(lambda u: scale(factor, u), updates), CorrectBiasState(count)

    return optax.GradientTransformationExtraArgs(init, update)
