r"""Estimators of the first and of the second moment of the gradient.

An estimator is a `GradientTransformation` that returns, in the place of the gradient, what it
believes the moment to be. All of them run one recursion, the exponential moving average

.. math:: \mathrm{EMA}_b(x)_t = b\, \mathrm{EMA}_b(x)_{t-1} + (1 - b)\, x_t

or a cascade of them, each averaging the one before. They differ in what they average (:math:`g`
or :math:`|g|^2`), in how they combine the stages, and in how they correct the zero start.
"""

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
    abs_sq,
    cast,
    cast_like,
    compute_dtype,
    first_count,
    next_count,
    real_zeros_like,
    scalar_dtype,
    store,
    tree_map,
    upcast,
)
from optax_ext.transforms.bias_correction import debias


def average(x: Any, previous: Any, decay: ArrayLike) -> Any:
    """One step of an exponential moving average, leaf by leaf, in compute precision.

    Less the opposite of `b m`, not plus `b m`: from a sum, XLA takes out the factor that both
    terms share at b = 1/2, then computes the rest once for each use, and in place only of a copy.
    """
    return tree_map(
        lambda x, m: cast(1 - decay, x) * x - cast(0 - decay, x) * m.astype(compute_dtype(m.dtype)),
        x,
        previous,
    )


def cascade(x: Any, stages: Sequence[Any], decays: Sequence[ArrayLike]) -> tuple[Any, ...]:
    """One step of averages of averages: the first averages `x`, each next the one before it."""
    advanced = []
    for stage, decay in zip(stages, decays, strict=True):
        x = average(x, stage, decay)
        advanced.append(x)
    return tuple(advanced)


def cancel_lag(stages: Sequence[Any]) -> Any:
    r""":math:`\sum_{i=1}^k (-1)^{i+1} \binom{k}{i} \mathrm{EMA}_i`: for k = 3, 3m - 3d + e.

    With equal decays the lags of the k stages cancel to order k - 1.
    """
    order = len(stages)
    weights = [(-1) ** (i + 1) * math.comb(order, i) for i in range(1, order + 1)]
    return tree_map(lambda *m: sum(w * m_i for w, m_i in zip(weights, m, strict=True)), *stages)


def estimator(
    init: optax.TransformInitFn,
    advance: Callable[[optax.Updates, Any, jax.Array], tuple[optax.Updates, Any]],
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of `advance(gradient, state, count) -> (estimate, state)`.

    The state is a NamedTuple with a `count`. Leaves and dtypes are taken care of here.
    """

    def checked_init(params: optax.Params) -> Any:
        _checks.float_leaves(params=params)
        return init(params)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = next_count(state.count)
        estimate, advanced = advance(upcast(updates), state, count)
        return cast_like(estimate, updates), store(advanced, state)

    return optax.GradientTransformationExtraArgs(checked_init, update)


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


class CascadeState(NamedTuple):
    """State of a cascade of averages of the gradient.

    Attributes:
      count: number of updates done.
      mu: the first stage, a plain uncorrected average.
      later: the later stages, a tree like `mu` each.
      response: what each stage would be for a gradient that was always 1; empty unless
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
    later: tuple[optax.Updates, ...]
    response: tuple[jax.Array, ...]


def ema(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""First moment: the exponential moving average of the gradient.

    .. math:: m = b\, m + (1 - b)\, g, \qquad \hat m = m / (1 - b^t)

    A stored average stops where a step :math:`(1 - b) |g - m|` is less than its rounding, half a
    unit in the last place. In bfloat16, :math:`|g - m|` is then still 2 to 4 % of m for b = .9, 4
    to 8 % for .95 and 20 to 40 % for .99; at .999 m does not fall at all. float16 has an eighth of
    these errors, and no numbers below 6e-8.

    Args:
      decay: :math:`b`, in [0, 1).
      bias_correction: "adam" returns :math:`\hat m`, "none" :math:`m`.
      dtype: storage of `mu`; `None` is the parameters' own.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = ema(decay=0.9)
    >>> estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{estimate[0]:.3f}")
    2.000
    """
    _check_average(decay, bias_correction, dtype)

    def init(params: optax.Params) -> EmaState:
        return EmaState(first_count(), optax.tree.zeros_like(params, dtype=dtype))

    def advance(g, state, count):
        mu = average(g, state.mu, decay)
        estimate = debias(mu, decay, count) if bias_correction == "adam" else mu
        return estimate, EmaState(count, mu)

    return estimator(init, advance)


def ema_of_squares(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Second moment: the exponential moving average of the squared gradient.

    .. math:: v = b\, v + (1 - b)\, |g|^2, \qquad \hat v = v / (1 - b^t)

    Decays of second moments are too large for narrow storage (see `ema`). In bfloat16, v stays up
    to 60 % too large after the gradient fell for b = .99, and does not fall at all for .999. In
    float16, squares of gradients below 2e-4 are 0. So v is stored in float32 by default.

    Args:
      decay: :math:`b`, in [0, 1).
      bias_correction: "adam" returns :math:`\hat v`, "none" :math:`v`.
      dtype: storage of `nu`; `None` is float32, or the parameters' own where that is wider.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = ema_of_squares(decay=0.99)
    >>> estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> print(f"{estimate[0]:.3f}")
    4.000
    """
    _check_average(decay, bias_correction, dtype, jnp.floating)

    def init(params: optax.Params) -> EmaOfSquaresState:
        return EmaOfSquaresState(first_count(), real_zeros_like(params, dtype))

    def advance(g, state, count):
        nu = average(squares(g), state.nu, decay)
        estimate = debias(nu, decay, count) if bias_correction == "adam" else nu
        return estimate, EmaOfSquaresState(count, nu)

    return estimator(init, advance)


def max_ema_of_squares(
    *, decay: ArrayLike, bias_correction: str = "adam", dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Second moment of AMSGrad: the largest average of the squared gradient so far.

    .. math:: v = b\, v + (1 - b)\, |g|^2, \quad v_{max} = \max(v_{max}, v), \quad
      \hat v = v_{max} / (1 - b^t)

    The maximum is taken of the *uncorrected* average, as in PyTorch, Keras and the released code
    of FAME and CaAdam; `optax.scale_by_amsgrad` corrects first by default.

    Args:
      decay: :math:`b`, in [0, 1).
      bias_correction: "adam" returns :math:`\hat v`, "none" :math:`v_{max}`.
      dtype: storage of `nu` and `nu_max`; `None` is float32, or the parameters' own where that is
        wider. For less see `ema_of_squares`.

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
    _check_average(decay, bias_correction, dtype, jnp.floating)

    def init(params: optax.Params) -> MaxEmaOfSquaresState:
        zeros = partial(real_zeros_like, params, dtype)
        return MaxEmaOfSquaresState(first_count(), zeros(), zeros())

    def advance(g, state, count):
        nu = average(squares(g), state.nu, decay)
        nu_max = tree_map(lambda v, top: jnp.maximum(top.astype(v.dtype), v), nu, state.nu_max)
        estimate = debias(nu_max, decay, count) if bias_correction == "adam" else nu_max
        return estimate, MaxEmaOfSquaresState(count, nu, nu_max)

    return estimator(init, advance)


def triple_ema(
    *,
    decays: Sequence[ArrayLike],
    bias_correction: str = "adam",
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""First moment: the triple exponential moving average of the gradient, or one of any order.

    .. math:: m = \mathrm{EMA}_{b_1}(g), \quad d = \mathrm{EMA}_{b_2}(m), \quad
      e = \mathrm{EMA}_{b_3}(d), \qquad \mathrm{TEMA} = 3m - 3d + e

    and in general :math:`\sum_i (-1)^{i+1} \binom{k}{i} \mathrm{EMA}_i` for k decays: one is the
    plain average, two the double one (DEMA).

    The mean lag in steps is :math:`L_1 - 2 L_2 + L_3` with :math:`L = b / (1 - b)`: it vanishes
    for equal decays, (.9, .9, .9), and is 12.1 for (.9, .3, .8), more than the 9.0 of a plain .9.
    The price of no lag is noise: its gain (the sum of squared weights) is .199 instead of .053.
    Each stage is an average of its own and needs the precision that `ema` says for its decay.

    Args:
      decays: one decay in [0, 1) per stage.
      bias_correction: "adam" divides by :math:`1 - b_1^t`, "exact" by what the same cascade makes
        of a constant 1 (with four or more very unequal decays that can be 0: prefer near-equal
        ones), "none" by nothing.
      dtype: storage of the stages; `None` is the parameters' own.

    Raises:
      ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = triple_ema(decays=(0.9, 0.9, 0.9), bias_correction="exact")
    >>> state = tx.init(jnp.zeros(1))
    >>> for t in range(200):
    ...     estimate, state = tx.update(jnp.array([float(t)]), state)
    >>> print(f"{estimate[0]:.2f}")  # a ramp is followed without lag
    199.00
    """
    decays = _check_cascade(decays, bias_correction, dtype, jnp.inexact)

    def init(params: optax.Params) -> CascadeState:
        mu, *later = (optax.tree.zeros_like(params, dtype=dtype) for _ in decays)
        response = _first_response(decays, params, bias_correction)
        return CascadeState(first_count(), mu, tuple(later), response)

    def advance(g, state, count):
        mu, *later = stages = cascade(g, (state.mu, *state.later), decays)
        combined = cancel_lag(stages)
        estimate, response = _correct(combined, decays, count, state.response, bias_correction)
        return estimate, CascadeState(count, mu, tuple(later), response)

    return estimator(init, advance)


def triple_ema_of_squares(
    *,
    decays: Sequence[ArrayLike],
    bias_correction: str = "adam",
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Second moment: the triple exponential moving average of the squared gradient.

    .. math:: \hat v = \max(0, 3 v_1 - 3 v_2 + v_3) / c_t

    The stages are those of `triple_ema`, run on :math:`|g|^2`. For equal decays the combination
    weighs some past squares negatively and can fall below 0: it is clamped there, since a root
    is taken of it next. The stages nearly cancel, so they need float32 whatever their decays.

    Args:
      decays: one decay in [0, 1) per stage.
      bias_correction: :math:`c_t` as in `triple_ema`.
      dtype: storage of the stages; `None` is float32, or the parameters' own where that is wider.

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
    decays = _check_cascade(decays, bias_correction, dtype, jnp.floating)

    def init(params: optax.Params) -> CascadeOfSquaresState:
        nu, *later = (real_zeros_like(params, dtype) for _ in decays)
        response = _first_response(decays, params, bias_correction)
        return CascadeOfSquaresState(first_count(), nu, tuple(later), response)

    def advance(g, state, count):
        nu, *later = stages = cascade(squares(g), (state.nu, *state.later), decays)
        clamped = tree_map(_clamp, cancel_lag(stages), nu)
        estimate, response = _correct(clamped, decays, count, state.response, bias_correction)
        return estimate, CascadeOfSquaresState(count, nu, tuple(later), response)

    return estimator(init, advance)


def _clamp(combined: jax.Array, v: jax.Array) -> jax.Array:
    """At least 0; where squares overflowed, infinite like a plain average, not inf - inf."""
    overflowed = jnp.isnan(combined) & ~jnp.isnan(v)
    return jnp.where(overflowed, jnp.inf, jnp.maximum(combined, 0))


def squares(g: optax.Updates) -> optax.Updates:
    """:math:`|g|^2`, leaf by leaf."""
    return tree_map(abs_sq, g)


def _first_response(decays, params, bias_correction) -> tuple[jax.Array, ...]:
    if bias_correction != "exact":
        return ()
    return tuple(jnp.zeros((), scalar_dtype(params)) for _ in decays)


def _correct(combined, decays, count, response, bias_correction):
    """The combined stages without their bias, and the advanced response."""
    if bias_correction == "none":
        return combined, response
    if bias_correction == "adam":
        return debias(combined, decays[0], count), response
    response = cascade(jnp.ones((), scalar_dtype(response)), response, decays)
    unbias = 1 / cancel_lag(response)
    return tree_map(lambda x: cast(unbias, x) * x, combined), response


def _check_average(decay, bias_correction, dtype, kind=jnp.inexact) -> None:
    _checks.decay_rate(decay=decay)
    _checks.one_of(("adam", "none"), bias_correction=bias_correction)
    _checks.storage_dtype(kind, dtype=dtype)


def _check_cascade(decays, bias_correction, dtype, kind) -> tuple[ArrayLike, ...]:
    if not isinstance(decays, Sequence):
        raise ValueError(f"decays must be a sequence of decays, got {decays!r}")
    decays = tuple(decays)
    if not decays:
        raise ValueError("decays must hold at least one decay, got ()")
    _checks.decay_rate(**{f"decays[{i}]": decay for i, decay in enumerate(decays)})
    _checks.one_of(("adam", "exact", "none"), bias_correction=bias_correction)
    _checks.storage_dtype(kind, dtype=dtype)
    return decays
