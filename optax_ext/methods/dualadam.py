"""InvAdam, which multiplies the moments, and DualAdam, which blends it into Adam."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext.transforms.joins import Join, blend, linear_inverse_share, product, scale_by_moments
from optax_ext.transforms.moments import ema, ema_of_squares


def invadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    scale_free: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return InvAdam: Adam that multiplies by the root of the second moment instead of dividing.

    ::

        m = b1 m + (1 - b1) g,    m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g²,   v_hat = v / (1 - b2^t)
        θ = θ - α m_hat (√v_hat + ε) - α λ θ

    Steps are larger where gradients are large.

    Provenance. The rule: [code]; the paper's form has no ε [second-hand]. Decoupled decay as in
    the authors' DualAdam: [code]. `scale_free`: [ours]. `docs/methods/dualadam.md` has the details,
    a picture, our evidence, and pitfalls.

    The step grows with the square of the gradient. So the right rate depends on the scale of the
    loss, and steps vanish near a minimum. InvAdam is meant as the early phase of `dualadam`.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it; per unit of squared gradient.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε, in [0, inf), added to the root.
      scale_free: whether to divide the root by its root mean square over each tensor. The step
        then grows in proportion to the gradient.
      weight_decay: λ, decoupled, in [0, inf), or a schedule.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores the first moment; `None` is the dtype of the parameters. bfloat16
        is precise enough for decays up to .9: see `ema`.
      nu_dtype: dtype that stores the second moment; `None` is at least float32. In bfloat16 the
        second moment stops following the gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The chain. Its state has `mu` and `nu` for `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing from the update.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.invadam(learning_rate=0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(60):
    ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(f"loss 5.000 -> {jnp.sum(params**2):.3f}")
    loss 5.000 -> 0.000

    References:
      Shi, Chen, Jin, Zhou, arXiv 2603.07122.
    """
    _checks.non_negative(eps=eps)
    _checks.flag(scale_free=scale_free)
    join = product(eps=eps, scale_free=scale_free)
    return _decoupled(learning_rate, b1, b2, join, weight_decay, mask, mu_dtype, nu_dtype)


def dualadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    switch_rate: optax.ScalarOrSchedule = 0.01,
    scale_free: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return DualAdam: a blend that starts close to InvAdam and ends as Adam.

    ::

        r = 1 - t s while this is at least s, then 0
        θ = θ - α ((1 - r) m_hat / (√v_hat + ε) + r m_hat (√v_hat + ε)) - α λ θ

    The moments `m_hat` and `v_hat` are those of `invadam`. The share r of InvAdam falls linearly
    from nearly 1 to 0.

    Provenance. Rule, decoupled decay and s = .01: [code]. A schedule for the share, and
    `scale_free`: [ours]. The last blended step is computed in double precision, as in the authors'
    code: t = 18 for s = .05. `docs/methods/dualadam.md` has the details, a picture, our evidence,
    and pitfalls.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε, in [0, inf), added to the root.
      switch_rate: s, the decrease of InvAdam's share per step, in [0, 1]: 0 is InvAdam, 1 is Adam.
        Or a schedule of the share itself, called with 0 at the first step like all schedules of
        Optax. If s is an array, the share is max(0, 1 - t s) at every step. Under
        `optax.inject_hyperparams`, which makes arrays of numbers and calls schedules, name
        `switch_rate` in the `static_args`.
      scale_free: as in `invadam`.
      weight_decay: λ, decoupled, in [0, inf), or a schedule.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores the first moment; `None` is the dtype of the parameters. bfloat16
        is precise enough for decays up to .9: see `ema`.
      nu_dtype: dtype that stores the second moment; `None` is at least float32. In bfloat16 the
        second moment stops following the gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The chain. Its state has `inverse_share` (r), `mu` and `nu` for `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing from the update.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.dualadam(learning_rate=0.1, switch_rate=0.05)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> share = optax.tree.get(state, "inverse_share")
    >>> print(f"loss 5.000 -> {jnp.sum(params**2):.3f}, inverse share {share:.2f}")
    loss 5.000 -> 0.000, inverse share 0.00

    References:
      Shi, Chen, Jin, Zhou, arXiv 2603.07122.
    """
    _checks.non_negative(eps=eps)
    _checks.schedule_or(_checks.fraction, switch_rate=switch_rate)
    _checks.flag(scale_free=scale_free)
    share = switch_rate if callable(switch_rate) else linear_inverse_share(switch_rate)
    join = blend(share, eps=eps, scale_free=scale_free)
    return _decoupled(learning_rate, b1, b2, join, weight_decay, mask, mu_dtype, nu_dtype)


def _decoupled(
    learning_rate, b1, b2, join: Join, weight_decay, mask, mu_dtype, nu_dtype
) -> optax.GradientTransformationExtraArgs:
    _checks.of_adam(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=mask,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return optax.chain(
        scale_by_moments(
            ema(decay=b1, dtype=mu_dtype), ema_of_squares(decay=b2, dtype=nu_dtype), join
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
