"""Autoscaling: a rate that falls with the logarithm of the gradient's norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ext import _checks
from optax_ext._numerics import (
    first_count,
    global_norm,
    next_count,
    scalar_dtype,
    scale,
    tree_map,
    without_cse,
)
from optax_ext.transforms.averages import average
from optax_ext.transforms.bias_correction import total_weight


class AutoscaleState(NamedTuple):
    """State of `autoscale`.

    Attributes:
      count: number of updates done.
      norm_ema: uncorrected average of the global norm of the gradient.
      autoscale: factor on the last update, in (0, 1]; 1 before the first.
      inner_state: state of the scaled transformation.
    """

    count: jax.Array
    norm_ema: jax.Array
    autoscale: jax.Array
    inner_state: optax.OptState


def autoscale(
    inner: optax.GradientTransformation, *, decay: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Scale the update of `inner` by the logarithm of the average norm of its gradient.

    ::

        norm_ema = b norm_ema + (1 - b) ‖g‖,   n = norm_ema / (1 - b^t)
        u = u / (1 + max(0, log n))

    The norm is that of all tensors together. NOVAK has 1 / (1 + log n), which is singular at
    n = 1/e and negative below. The maximum with 0 is ours. If the square of a norm
    overflows, the norm is replaced by the root of the largest number, so the average can recover.

    Args:
      inner: transformation to scale.
      decay: b, decay of the average norm, in [0, 1).

    Raises:
      ValueError: `decay` is out of its range, or `inner` is not a transformation.

    >>> import jax.numpy as jnp
    >>> tx = autoscale(optax.sgd(1.0), decay=0.99)
    >>> update, _ = tx.update(jnp.array([jnp.e]), tx.init(jnp.zeros(1)))
    >>> print(f"{-update[0] / jnp.e:.3f}")
    0.500
    """
    _checks.transformation(inner=inner)
    _checks.decay_rate(decay=decay)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AutoscaleState:
        _checks.float_leaves(params=params)
        dtype = scalar_dtype(params)
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        return AutoscaleState(first_count(), zero, one, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        count = next_count(state.count)
        dtype = state.norm_ema.dtype
        norm = jnp.minimum(global_norm(without_cse(updates), dtype), jnp.finfo(dtype).max ** 0.5)
        norm_ema = average(norm, state.norm_ema, decay).astype(dtype)
        mean = norm_ema / total_weight(decay, count, dtype)
        factor = 1 / (1 + jnp.log(jnp.maximum(1, mean)))
        step, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        scaled = tree_map(lambda u: scale(factor, u), step)
        return scaled, AutoscaleState(count, norm_ema, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
