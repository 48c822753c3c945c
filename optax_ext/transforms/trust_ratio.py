"""The trust ratio: it makes the step of each tensor proportional to the tensor's parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ext import _checks
from optax_ext._numerics import flatten, norm, require, scalar_dtype, scale_each


class TrustRatioState(NamedTuple):
    """State of `scale_by_trust_ratio`.

    Attributes:
      trust_ratio: factor on each tensor of the last update; 1 before the first. It is a vector in
        the order of `jax.tree.leaves(params)`, where `None` counts as a leaf.
    """

    trust_ratio: jax.Array


def scale_by_trust_ratio(*, max_ratio: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scale each tensor of the update to the norm of its parameters, by at most `max_ratio`.

    ::

        u = min(‖θ‖ / ‖u‖, max_ratio) u

    The ratio is 1 where one of the norms is 0. Unlike in `optax.scale_by_trust_ratio`, the ratio is
    bounded, and it can be read from the state.

    Args:
      max_ratio: the largest ratio, in (0, inf).

    Raises:
      ValueError: `max_ratio` is out of its range, or `params` is missing from the update.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_trust_ratio(max_ratio=10.0)
    >>> params = jnp.array([3.0, 4.0])
    >>> update, _ = tx.update(jnp.array([2.0, 0.0]), tx.init(params), params)
    >>> print(update)
    [5. 0.]
    """
    _checks.positive(max_ratio=max_ratio)

    def init(params: optax.Params) -> TrustRatioState:
        _checks.float_leaves(params=params)
        return TrustRatioState(jnp.ones(len(flatten(params)[0]), scalar_dtype(params)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require(params)
        dtype = state.trust_ratio.dtype
        leaves, structure = flatten(updates)
        pairs = zip(structure.flatten_up_to(params), leaves, strict=True)
        ratios = [_ratio(p, u, max_ratio, dtype) for p, u in pairs]
        trust = jnp.stack(ratios) if ratios else state.trust_ratio
        return scale_each(trust, updates), TrustRatioState(trust)

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio(p, u, max_ratio, dtype) -> jax.Array:
    if u is None:
        return jnp.ones((), dtype)
    p_norm, u_norm = norm(p, dtype), norm(u, dtype)
    undefined = (p_norm == 0) | (u_norm == 0)
    ratio = p_norm / jnp.where(undefined, 1, u_norm)
    return jnp.where(undefined, 1, jnp.minimum(ratio, max_ratio)).astype(dtype)
