"""Estimators of the first and of the second moment of the gradient.

An estimator is a `GradientTransformation` that replaces the gradient by an estimate of its moment.
Each estimator here keeps one average. `cascades.py` has estimators that average several times, and
`nesterov.py` has estimators that look one step ahead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import first_count, real_zeros_like, tree_map, zeros_like
from optax_ext.transforms.averages import average, estimator, squares
from optax_ext.transforms.bias_correction import debias


class EmaState(NamedTuple):
    """State of an average of the gradient.

    Attributes:
      count: number of updates done.
      mu: the uncorrected average, one leaf per parameter.
    """

    count: jax.Array
    mu: optax.Updates


class EmaOfSquaresState(NamedTuple):
    """State of an average of the squared gradient.

    Attributes:
      count: number of updates done.
      nu: the uncorrected average, one real leaf per parameter, by default in at least float32.
    """

    count: jax.Array
    nu: optax.Updates


class MaxEmaOfSquaresState(NamedTuple):
    """State of the running maximum of an average of the squared gradient.

    Attributes:
      count: number of updates done.
      nu: the uncorrected average.
      nu_max: its elementwise maximum so far.
    """

    count: jax.Array
    nu: optax.Updates
    nu_max: optax.Updates


def ema(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Estimate the first moment by the exponential moving average of the gradient.

    ::

        m = b m + (1 - b) g,   m_hat = m / (1 - b^t)

    A stored average stops changing when its step `(1 - b) |g - m|` is smaller than the rounding
    error, half a unit in the last place. In bfloat16, `|g - m|` is then still 2 to 4 % of m for
    b = .9, 4 to 8 % for .95 and 20 to 40 % for .99. At .999, m does not fall at all. float16 has an
    eighth of these errors, but no numbers below 6e-8.

    Args:
      decay: b, in [0, 1).
      bias_correction: "adam" returns `m_hat`, "none" m.
      dtype: dtype that stores `mu`; `None` is the dtype of the parameters.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = ema(decay=0.9)
    >>> estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{estimate[0]:.3f}")
    2.000
    """
    _check(decay, bias_correction, dtype, jnp.inexact)
    zeros = partial(zeros_like, dtype=dtype)
    return _moment(EmaState, lambda g: g, zeros, decay, bias_correction)


def ema_of_squares(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Estimate the second moment by the exponential moving average of the squared gradient.

    ::

        v = b v + (1 - b) |g|²,   v_hat = v / (1 - b^t)

    Second moments have decays that are too large for 16-bit storage (see `ema`). In bfloat16, when
    the gradient falls, v stays up to 60 % too large for b = .99, and does not fall at all for .999.
    In float16, squares of gradients below 2e-4 are 0. So v is stored in float32 by default.

    Args:
      decay: b, in [0, 1).
      bias_correction: "adam" returns `v_hat`, "none" v.
      dtype: dtype that stores `nu`; `None` is float32, or the dtype of the parameters where that
        is wider.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = ema_of_squares(decay=0.99)
    >>> estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{estimate[0]:.3f}")
    4.000
    """
    _check(decay, bias_correction, dtype, jnp.floating)
    zeros = partial(real_zeros_like, dtype=dtype)
    return _moment(EmaOfSquaresState, squares, zeros, decay, bias_correction)


def max_ema_of_squares(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Estimate the second moment as AMSGrad does, by the largest average of squares so far.

    ::

        v = b v + (1 - b) |g|²
        v_max = max(v_max, v),   v_hat = v_max / (1 - b^t)

    The maximum is that of the *uncorrected* average, as in PyTorch, Keras and the released code of
    FAME and CaAdam. `optax.scale_by_amsgrad` corrects the bias before the maximum by default.

    Args:
      decay: b, in [0, 1).
      bias_correction: "adam" returns `v_hat`, "none" `v_max`.
      dtype: dtype that stores `nu` and `nu_max`; `None` is float32, or the dtype of the parameters
        where that is wider. `ema_of_squares` says what narrower ones cost.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = max_ema_of_squares(decay=0.5, bias_correction="none")
    >>> state = tx.init(jnp.zeros(1))
    >>> for gradient in (2.0, 0.0):
    ...     estimate, state = tx.update(jnp.array([gradient]), state)
    >>> print(estimate, state.nu)
    [2.] [1.]
    """
    _check(decay, bias_correction, dtype, jnp.floating)

    def init(params: optax.Params) -> MaxEmaOfSquaresState:
        zeros = partial(real_zeros_like, params, dtype)
        return MaxEmaOfSquaresState(first_count(), zeros(), zeros())

    def advance(g, state, count):
        nu = average(squares(g), state.nu, decay)
        nu_max = tree_map(lambda v, top: jnp.maximum(top.astype(v.dtype), v), nu, state.nu_max)
        estimate = debias(nu_max, decay, count) if bias_correction == "adam" else nu_max
        return estimate, MaxEmaOfSquaresState(count, nu, nu_max)

    return estimator(init, advance)


def _moment(
    state: Callable[[jax.Array, Any], Any],
    of: Callable[[optax.Updates], optax.Updates],
    zeros: Callable[[optax.Params], optax.Updates],
    decay: ArrayLike,
    bias_correction: str,
) -> optax.GradientTransformationExtraArgs:
    """Return the average of `of(gradient)`; the second field of `state` stores it."""

    def init(params: optax.Params) -> Any:
        return state(first_count(), zeros(params))

    def advance(g, previous, count):
        averaged = average(of(g), previous[1], decay)
        estimate = debias(averaged, decay, count) if bias_correction == "adam" else averaged
        return estimate, state(count, averaged)

    return estimator(init, advance)


def _check(decay, bias_correction, dtype, kind) -> None:
    _checks.decay_rate(decay=decay)
    _checks.one_of(("adam", "none"), bias_correction=bias_correction)
    _checks.storage_dtype(kind, dtype=dtype)
