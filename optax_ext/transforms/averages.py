"""The exponential moving average, the recursion that all estimators use.

::

    EMA(x) = b EMA(x) + (1 - b) x
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from optax_ext import _checks
from optax_ext._numerics import (
    abs_sq,
    cast_like,
    cast_scalar_like,
    cast_state_like,
    compute_dtype,
    next_count,
    tree_map,
    upcast,
)


def average(x: Any, previous: Any, decay: ArrayLike) -> Any:
    """Return the exponential moving average one step later, in compute precision.

    The code subtracts `-b m` instead of adding `b m`. In a sum, XLA would factor out 1/2, which
    both terms share at b = 1/2. It would then compute the rest once for each use, and it could
    update a buffer in place only after copying it.
    """
    return tree_map(
        lambda x, m: (
            cast_scalar_like(1 - decay, x) * x
            - cast_scalar_like(0 - decay, x) * m.astype(compute_dtype(m.dtype))
        ),
        x,
        previous,
    )


def squares(g: optax.Updates) -> optax.Updates:
    """Return `|g|²` of every leaf."""
    return tree_map(abs_sq, g)


def estimator(
    init: optax.TransformInitFn,
    advance: Callable[[optax.Updates, Any, jax.Array], tuple[optax.Updates, Any]],
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of `advance(gradient, state, count) -> (estimate, state)`.

    The state is a NamedTuple with a `count`. This function takes care of leaves and dtypes.
    """

    def checked_init(params: optax.Params) -> Any:
        _checks.float_leaves(params=params)
        return init(params)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = next_count(state.count)
        estimate, advanced = advance(upcast(updates), state, count)
        return cast_like(estimate, updates), cast_state_like(advanced, state)

    return optax.GradientTransformationExtraArgs(checked_init, update)
