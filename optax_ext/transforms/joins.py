"""Joins: functions that compute one update from the two moments of a gradient.

The quotient of the moments is Adam, their product is InvAdam, and a blend of both is DualAdam. A
join is a pure elementwise function of the two estimates, and of scalars that it may keep in its
state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ext import _checks
from optax_ext._numerics import (
    cast_scalar_like,
    first_count,
    next_count,
    root,
    scalar_dtype,
    tree_map,
    upcast,
)
from optax_ext.transforms.rectification import is_tractable, sma_length


class Join(NamedTuple):
    """A function of two moments that makes one update of them.

    Attributes:
      init: a function from the parameters to the state.
      advance: a function from the state of the last step to the state of this step.
      combine: a function from the first moment, the second moment (arrays of one tensor) and the
        state to the update.
    """

    init: Callable[[optax.Params], Any]
    advance: Callable[[Any], Any]
    combine: Callable[[jax.Array, jax.Array, Any], jax.Array]


class ScaleByMomentsState(NamedTuple):
    """State of `scale_by_moments`: the states of its three parts."""

    first: optax.OptState
    second: optax.OptState
    join: Any


def scale_by_moments(
    first: optax.GradientTransformation, second: optax.GradientTransformation, join: Join
) -> optax.GradientTransformationExtraArgs:
    """Estimate both moments of the gradient and join the estimates.

    ::

        u = join(m_hat, v_hat)

    Estimates and join are computed in at least float32. The update is rounded once, to the dtype of
    the gradient.

    Args:
      first: estimator of the first moment, such as `ema`, or any transformation of the gradient.
      second: estimator of the second moment, such as `ema_of_squares`.
      join: a `Join`, as `ratio`, `product`, `blend` and `ratio_once_tractable` return.

    Raises:
      ValueError: an argument has another type, such as a factory that was not called.

    >>> import jax.numpy as jnp, optax_ext
    >>> adam = scale_by_moments(
    ...     optax_ext.ema(decay=0.9), optax_ext.ema_of_squares(decay=0.999), ratio(eps=1e-8)
    ... )
    >>> update, _ = adam.update(jnp.array([0.1, -20.0]), adam.init(jnp.zeros(2)))
    >>> print(update.round(3))
    [ 1. -1.]
    """
    _checks.transformation(first=first, second=second)
    _checks.returned_by(Join, join=join)
    first, second = map(optax.with_extra_args_support, (first, second))

    def init(params: optax.Params) -> ScaleByMomentsState:
        _checks.float_leaves(params=params)
        return ScaleByMomentsState(first.init(params), second.init(params), join.init(params))

    def update(updates, state, params=None, **extra_args):
        gradient = upcast(updates)
        mu, first_state = first.update(gradient, state.first, params, **extra_args)
        nu, second_state = second.update(gradient, state.second, params, **extra_args)
        join_state = join.advance(state.join)
        joined = tree_map(
            lambda g, m, v: join.combine(m, v, join_state).astype(g.dtype), updates, mu, nu
        )
        return joined, ScaleByMomentsState(first_state, second_state, join_state)

    return optax.GradientTransformationExtraArgs(init, update)


def ratio(*, eps: ArrayLike) -> Join:
    """Return Adam's join, `m_hat / (√v_hat + ε)`.

    Args:
      eps: ε, in [0, inf), in units of the gradient.
    """
    _checks.non_negative(eps=eps)
    return _stateless(lambda m, v: m / (root(v) + cast_scalar_like(eps, v)))


def product(*, eps: ArrayLike, scale_free: bool = False) -> Join:
    """Return InvAdam's join, `m_hat (√v_hat + ε)`.

    It grows with the square of the gradient's scale: gradients above 1e19 overflow float32, and a
    loss scale changes the method. `scale_free` divides the root by its root mean square over the
    tensor. The product then grows in proportion to the gradient. If a square overflowed,
    `scale_free` leaves its coordinate out of the mean and sets its product to 0. So this coordinate
    does not move, as in Adam, and the others do.

    Args:
      eps: ε, in [0, inf), in units of the gradient (without unit if `scale_free`).
      scale_free: whether to normalize the root over each tensor.
    """
    _checks.non_negative(eps=eps)
    _checks.flag(scale_free=scale_free)
    factor = _inverse(eps, scale_free)
    return _stateless(lambda m, v: m * factor(v))


class BlendState(NamedTuple):
    """State of `blend`.

    Attributes:
      count: number of updates done.
      inverse_share: weight of the product in the last update; 1 before the first.
    """

    count: jax.Array
    inverse_share: jax.Array


def blend(inverse_share: optax.Schedule, *, eps: ArrayLike, scale_free: bool = False) -> Join:
    """Return DualAdam's join, which goes from the product to the ratio.

    ::

        (1 - r) m_hat / (√v_hat + ε) + r m_hat (√v_hat + ε)

    At r = 0 it is the ratio, even where the product overflows.

    Args:
      inverse_share: schedule of r. Like all schedules of Optax, it is called with the
        number of updates already done: 0 at the first step. `linear_inverse_share` is the authors'.
      eps: as in `ratio` and in `product`.
      scale_free: as in `product`.
    """
    _checks.schedule(inverse_share=inverse_share)
    _checks.non_negative(eps=eps)
    _checks.flag(scale_free=scale_free)

    def init(params: optax.Params) -> BlendState:
        return BlendState(first_count(), jnp.ones((), scalar_dtype(params)))

    def advance(state: BlendState) -> BlendState:
        share = jnp.asarray(inverse_share(state.count), state.inverse_share.dtype)
        return BlendState(next_count(state.count), share)

    inverse = _inverse(eps, scale_free)

    def combine(m, v, state):
        # Blending the factors instead of the updates leaves XLA one product to fuse, not three.
        share = cast_scalar_like(state.inverse_share, v)
        adam = 1 / (root(v) + cast_scalar_like(eps, v))
        return m * jnp.where(share == 0, adam, (1 - share) * adam + share * inverse(v))

    return Join(init, advance, combine)


def linear_inverse_share(switch_rate: float | jax.Array) -> optax.Schedule:
    """Return DualAdam's schedule: `r = 1 - t s` from t = 1 while it is at least s, then 0.

    The authors decide on the host, in double precision, when the blend ends. For s = 0.05 its last
    step is t = 18, because 1 - 19 s is slightly smaller than s in double precision. If s is a
    Python number, the last step is computed here once, in the same way, and compared as an integer.
    So the switch is exact in every dtype. If s is an array, traced or not, `r = max(0, 1 - t s)` at
    every step.

    Args:
      switch_rate: s, in [0, 1]; 0 never switches, 1 never blends.

    Raises:
      ValueError: `switch_rate` is out of its range.

    >>> share = linear_inverse_share(0.25)
    >>> print([float(share(count)) for count in range(5)])
    [0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _checks.fraction(switch_rate=switch_rate)

    def fallen(count) -> jax.Array:
        return 1 - (jnp.asarray(count, float) + 1) * switch_rate

    if isinstance(switch_rate, jax.Array):
        return lambda count: jnp.maximum(0, fallen(count))
    s = float(switch_rate)
    if s == 0:
        return lambda count: jnp.ones_like(count, dtype=float)
    last = int(min(1 / s + 1, jnp.iinfo(jnp.int32).max))
    while max(0.0, 1 - last * s) < s and last > 0:
        last -= 1
    return lambda count: jnp.where(jnp.asarray(count) < last, fallen(count), 0)


class TractabilityState(NamedTuple):
    """State of `ratio_once_tractable`.

    Attributes:
      count: number of updates done.
      sma_length: ρ of the last update; 0 before the first.
    """

    count: jax.Array
    sma_length: jax.Array


def ratio_once_tractable(*, b2: ArrayLike, eps: ArrayLike) -> Join:
    """Return RAdam's join: `m_hat` until the second moment is reliable, then the ratio.

    It switches where `rectify` does, at ρ ≥ 5. It does not apply the factor r.

    Args:
      b2: decay of the second moment, in (2/3, 1).
      eps: as in `ratio`.
    """
    _checks.tractable_decay_rate(b2=b2)
    _checks.non_negative(eps=eps)

    def init(params: optax.Params) -> TractabilityState:
        return TractabilityState(first_count(), jnp.zeros((), scalar_dtype(params)))

    def advance(state: TractabilityState) -> TractabilityState:
        count = next_count(state.count)
        dtype = state.sma_length.dtype
        return TractabilityState(count, sma_length(b2, count, dtype).astype(dtype))

    def combine(m, v, state):
        return jnp.where(
            is_tractable(state.sma_length), m / (root(v) + cast_scalar_like(eps, v)), m
        )

    return Join(init, advance, combine)


def _inverse(eps: ArrayLike, scale_free: bool) -> Callable[[jax.Array], jax.Array]:
    """Return the factor on `m_hat` as a function of `v_hat`."""
    if not scale_free:
        return lambda v: root(v) + cast_scalar_like(eps, v)

    def relative(v: jax.Array) -> jax.Array:
        overflowed = v == jnp.inf
        squares = jnp.where(overflowed, 0, v)
        # Relative to the largest, since a sum of squares overflows long before a square does.
        largest = jnp.max(squares, initial=0)
        largest = jnp.where(largest == 0, 1, largest)
        mean = jnp.sum(squares / largest) / float(max(v.size, 1))  # JAX refuses large integers
        scale = jnp.where(mean == 0, 0, jax.lax.rsqrt(jnp.where(mean == 0, 1, mean)))
        factor = scale / root(largest)
        return jnp.where(overflowed, 0, root(squares) * factor + cast_scalar_like(eps, v))

    return relative


def _stateless(combine: Callable[[jax.Array, jax.Array], jax.Array]) -> Join:
    return Join(
        lambda params: optax.EmptyState(),
        lambda state: state,
        lambda m, v, state: combine(m, v),
    )
