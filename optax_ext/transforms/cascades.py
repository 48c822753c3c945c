"""Cascades of averages: each averages the one before, and in a weighted sum their lags cancel."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import (
    cast_scalar_like,
    first_count,
    real_zeros_like,
    scalar_dtype,
    tree_map,
    zeros_like,
)
from optax_ext.transforms.averages import average, estimator, squares
from optax_ext.transforms.bias_correction import debias


def cascade(x: Any, stages: Sequence[Any], decays: Sequence[ArrayLike]) -> tuple[Any, ...]:
    """Return all stages one step later: the first averages `x`, each other the stage before it."""
    advanced = []
    for stage, decay in zip(stages, decays, strict=True):
        x = average(x, stage, decay)
        advanced.append(x)
    return tuple(advanced)


def cancel_lag(stages: Sequence[Any]) -> Any:
    """Return the stages combined with binomial weights of alternating signs: 3 m - 3 d + e.

    With equal decays the lags of the k stages cancel to order k - 1.
    """
    order = len(stages)
    weights = [(-1) ** (i + 1) * math.comb(order, i) for i in range(1, order + 1)]
    return tree_map(lambda *m: sum(w * m_i for w, m_i in zip(weights, m, strict=True)), *stages)


class CascadeState(NamedTuple):
    """State of a cascade of averages of the gradient.

    Attributes:
      count: number of updates done.
      mu: the first stage, a plain uncorrected average.
      later: the later stages, each a tree like `mu`.
      response: the value of each stage if the gradient had always been 1. It is empty unless
        `bias_correction="exact"`.
    """

    count: jax.Array
    mu: optax.Updates
    later: tuple[optax.Updates, ...]
    response: tuple[jax.Array, ...]


class CascadeOfSquaresState(NamedTuple):
    """State of a cascade of averages of the squared gradient; see `CascadeState`."""

    count: jax.Array
    nu: optax.Updates
    nu_later: tuple[optax.Updates, ...]
    response: tuple[jax.Array, ...]


def triple_ema(
    *,
    decays: Sequence[ArrayLike],
    bias_correction: str = "adam",
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Estimate the first moment by the triple average (TEMA) of the gradient.

    ::

        m = b1 m + (1 - b1) g
        d = b2 d + (1 - b2) m
        e = b3 e + (1 - b3) d
        TEMA = 3 m - 3 d + e

    Any number of decays is possible. One decay is the plain average m, two are the double average
    (DEMA) 2 m - d. The weights are binomial coefficients with alternating signs.

    The mean lag in steps is L1 - 2 L2 + L3 with L = b / (1 - b) of each decay. It is 0 for equal
    decays such as (.9, .9, .9). It is 12.1 for (.9, .3, .8), more than the 9.0 of a plain .9.
    Without lag there is more noise: for (.9, .9, .9) the noise gain (the sum of squared weights) is
    .199 instead of .053. Each stage is an average and needs the precision that `ema` gives for its
    decay.

    Args:
      decays: one decay in [0, 1) per stage.
      bias_correction: "adam" divides by `1 - b1^t`. "exact" divides by the result of the
        same cascade for a constant 1. With four or more very unequal decays this result can be 0,
        so prefer nearly equal ones. "none" corrects nothing.
      dtype: dtype that stores the stages; `None` is the dtype of the parameters.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = triple_ema(decays=(0.9, 0.9, 0.9), bias_correction="exact")
    >>> state = tx.init(jnp.zeros(1))
    >>> for t in range(200):
    ...     estimate, state = tx.update(jnp.array([float(t)]), state)
    >>> print(f"{estimate[0]:.2f}")  # it follows a ramp without lag
    199.00
    """
    decays = _check(decays, bias_correction, dtype, jnp.inexact)
    zeros = partial(zeros_like, dtype=dtype)
    return _combined(CascadeState, lambda g: g, zeros, decays, cancel_lag, bias_correction)


def triple_ema_of_squares(
    *,
    decays: Sequence[ArrayLike],
    bias_correction: str = "adam",
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Estimate the second moment by the triple average of the squared gradient.

    ::

        v_hat = max(0, 3 v1 - 3 v2 + v3) / c

    The stages are those of `triple_ema`, applied to `|g|²`. For equal decays some past
    squares have negative weights, so the combination can be below 0. It is clamped at 0, because
    the next operation is a root. The stages nearly cancel, so they need float32 for all decays.

    Args:
      decays: one decay in [0, 1) per stage.
      bias_correction: the divisor c, as in `triple_ema`.
      dtype: dtype that stores the stages; `None` is float32, or the dtype of the parameters where
        that is wider.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = triple_ema_of_squares(decays=(0.9, 0.9, 0.9), bias_correction="none")
    >>> state = tx.init(jnp.zeros(1))
    >>> for gradient in [1.0] + [0.0] * 20:
    ...     estimate, state = tx.update(jnp.array([gradient]), state)
    >>> print(estimate)
    [0.]
    """
    decays = _check(decays, bias_correction, dtype, jnp.floating)
    zeros = partial(real_zeros_like, dtype=dtype)

    def combine(stages: Sequence[Any]) -> Any:
        return tree_map(_clamp, cancel_lag(stages), stages[0])

    return _combined(CascadeOfSquaresState, squares, zeros, decays, combine, bias_correction)


def _combined(
    state: Callable[..., Any],
    of: Callable[[optax.Updates], optax.Updates],
    zeros: Callable[[optax.Params], optax.Updates],
    decays: Sequence[ArrayLike],
    combine: Callable[[Sequence[Any]], Any],
    bias_correction: str,
) -> optax.GradientTransformationExtraArgs:
    """Return the combined stages of a cascade on `of(gradient)`.

    The fields of `state` are the count, the first stage, the later stages and the response.
    """

    def init(params: optax.Params) -> Any:
        first, *later = (zeros(params) for _ in decays)
        response = _first_response(decays, params, bias_correction)
        return state(first_count(), first, tuple(later), response)

    def advance(g, previous, count):
        _, first, later, response = previous
        first, *later = stages = cascade(of(g), (first, *later), decays)
        estimate, response = _correct(combine(stages), decays, count, response, bias_correction)
        return estimate, state(count, first, tuple(later), response)

    return estimator(init, advance)


def _clamp(combined: jax.Array, v: jax.Array) -> jax.Array:
    """Clamp the combination at 0; where squares overflowed, return infinity, not inf - inf."""
    overflowed = jnp.isnan(combined) & ~jnp.isnan(v)
    return jnp.where(overflowed, jnp.inf, jnp.maximum(combined, 0))


def _first_response(decays, params, bias_correction) -> tuple[jax.Array, ...]:
    if bias_correction != "exact":
        return ()
    return tuple(jnp.zeros((), scalar_dtype(params)) for _ in decays)


def _correct(combined, decays, count, response, bias_correction):
    """Return the combined stages without their bias, and the response one step later."""
    if bias_correction == "none":
        return combined, response
    if bias_correction == "adam":
        return debias(combined, decays[0], count), response
    response = cascade(jnp.ones((), scalar_dtype(response)), response, decays)
    unbias = 1 / cancel_lag(response)
    return tree_map(lambda x: cast_scalar_like(unbias, x) * x, combined), response


def _check(decays, bias_correction, dtype, kind) -> tuple[ArrayLike, ...]:
    if not isinstance(decays, Sequence):
        raise ValueError(f"decays must be a sequence of decays, got {decays!r}")
    decays = tuple(decays)
    if not decays:
        raise ValueError("decays must contain at least one decay, got ()")
    _checks.decay_rate(**{f"decays[{i}]": decay for i, decay in enumerate(decays)})
    _checks.one_of(("adam", "exact", "none"), bias_correction=bias_correction)
    _checks.storage_dtype(kind, dtype=dtype)
    return decays
