"""NOVAK: rectified AdamW with Nesterov variants, trust ratio, autoscaling and lookahead."""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext.transforms import autoscaling, rectification
from optax_ext.transforms import lookahead as lookaheads
from optax_ext.transforms.joins import ratio, ratio_once_tractable, scale_by_moments
from optax_ext.transforms.moments import ema, ema_of_squares
from optax_ext.transforms.nesterov import nesterov_ema, scheduled_nesterov_ema
from optax_ext.transforms.trust_ratio import scale_by_trust_ratio

_MAX_TRUST_RATIO = 10.0


def novak(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    decay_coupling: str = "base",
    nesterov: str = "none",
    rectify: bool = True,
    rectify_fallback: str = "adam",
    trust_ratio: bool = False,
    autoscale: bool = False,
    autoscale_decay: ArrayLike = 0.99,
    lookahead: str = "exact",
    sync_period: int | jax.Array = 5,
    slow_step_size: ArrayLike = 0.5,
    slow_dtype: DTypeLike | None = None,
    offload: str | None = None,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return a reconstruction of NOVAK: rectified AdamW inside lookahead.

    It is reconstructed from the paper's abstract and a third-party summary of its equations. No
    code is public, and the full text was not available.

    ::

        m = b1 m + (1 - b1) g,    m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g²,   v_hat = v / (1 - b2^t)
        d = m_hat / (√v_hat + ε)
        θ = θ - α r trust auto d - α λ θ
        every k steps: slow = slow + a (θ - slow), θ = slow

    Here r is the rectification of RAdam (see `optax_ext.rectify`). Two factors are off by default:
    trust = ‖θ‖ / ‖d‖ of each tensor, within [0, 10], and auto = 1 / (1 + max(0, log n)) with the
    average norm n of the gradient. While both are off, the step is elementwise and takes one pass.
    They add norms and nothing else.

    Provenance. Rectification that keeps the adaptive denominator before it starts, trust ratio,
    autoscale, and decay at the base rate: [second-hand]. "Multiple variants of Nesterov momentum",
    and lookahead in O(p + p/k): [abstract]. The maximum in the autoscale and the decay of its
    average, the formulas of the Nesterov variants, "rotating", what the trust ratio measures, and
    the default decay: [ours]. `docs/methods/novak.md` has the details, a picture, our evidence, and
    pitfalls.

    With `rectify_fallback="momentum"`, no decay and no lookahead, this is `optax.radam`. Without
    rectification and lookahead it is `optax.adamw`.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1). With rectification it must be in (2/3, 1), because
        rectification never starts for a smaller one.
      eps: ε, in [0, inf), added to the root.
      weight_decay: λ, decoupled, in [0, inf), or a schedule.
      decay_coupling: rate of the decay, "base" or "effective". "effective" adds λ θ to d before the
        trust ratio measures d, as in LAMB.
      nesterov: form of `m_hat`: "none", "nadam" (equal to `optax.nadam`), "classical",
        "hybrid" or "nadam_scheduled". See `nesterov_ema`, and `scheduled_nesterov_ema` for the
        last.
      rectify: whether to rectify.
      rectify_fallback: direction before rectification starts, "adam" (d) or "momentum"
        (`m_hat`).
      trust_ratio: whether to scale each tensor's step in proportion to its parameters.
      autoscale: whether to scale by the gradient's norm.
      autoscale_decay: decay of the average norm, in [0, 1).
      lookahead: "exact", "rotating" or "none". "rotating" is a different algorithm, which has slow
        weights for one k-th of the parameters at a time: see `optax_ext.lookahead`.
      sync_period: k, an integer >= 1; for "rotating" it must be a Python integer.
      slow_step_size: a, in [0, 1].
      slow_dtype: dtype that stores the slow weights; `None` is the dtype of the parameters.
        bfloat16 can stop the training: see `optax_ext.lookahead`.
      offload: memory that stores the slow weights: "pinned_host" is the host's memory, `None` the
        device's.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores the first moment; `None` is the dtype of the parameters. bfloat16
        is precise enough for decays up to .9: see `ema`.
      nu_dtype: dtype that stores the second moment; `None` is at least float32. In bfloat16 the
        second moment stops following the gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The optimizer. Its state has `rectification`, `trust_ratio` and `autoscale` where they are on,
      `slow`, `mu` and `nu` for `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing from the update.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.novak(learning_rate=0.3)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(150):
    ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> r = optax.tree.get(state, "rectification")
    >>> print(f"loss 5.000 -> {jnp.sum(params**2):.3f}, rectification {r:.2f}")
    loss 5.000 -> 0.000, rectification 0.27

    References:
      Kavun, "NOVAK: Unified adaptive optimizer for deep neural networks", arXiv 2601.07876.
      Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265.
      Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", arXiv 1907.08610.
    """
    _checks.flag(rectify=rectify, trust_ratio=trust_ratio, autoscale=autoscale)
    (_checks.tractable_decay_rate if rectify else _checks.decay_rate)(b2=b2)
    _checks.of_adam(
        learning_rate=learning_rate,
        b1=b1,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    _checks.decay_rate(autoscale_decay=autoscale_decay)
    _checks.one_of(("base", "effective"), decay_coupling=decay_coupling)
    _checks.one_of(("adam", "momentum"), rectify_fallback=rectify_fallback)
    _checks.one_of(("exact", "rotating", "none"), lookahead=lookahead)
    _checks.period(sync_period=sync_period)
    _checks.fraction(slow_step_size=slow_step_size)
    _checks.storage_dtype(slow_dtype=slow_dtype)
    _checks.memory(offload=offload)

    bare = rectify and rectify_fallback == "momentum"
    join = ratio_once_tractable(b2=b2, eps=eps) if bare else ratio(eps=eps)
    first = _first_moment(nesterov, b1, mu_dtype)
    direction = scale_by_moments(first, ema_of_squares(decay=b2, dtype=nu_dtype), join)
    decay = optax.add_decayed_weights(weight_decay, mask)

    # The trust ratio normalizes the result of the pieces before it. So factors that it must not
    # undo come after it.
    pieces: list[optax.GradientTransformation] = [direction]
    if decay_coupling == "effective":
        pieces.append(decay)
    if trust_ratio:
        pieces.append(scale_by_trust_ratio(max_ratio=_MAX_TRUST_RATIO))
    if rectify:
        pieces.append(rectification.rectify(b2=b2))
    step = optax.chain(*pieces)
    if autoscale:
        step = autoscaling.autoscale(step, decay=autoscale_decay)
    if decay_coupling == "base":
        step = optax.chain(step, decay)

    fast = optax.chain(step, optax.scale_by_learning_rate(learning_rate))
    if lookahead == "none":
        return fast
    return lookaheads.lookahead(
        fast,
        sync_period=sync_period,
        slow_step_size=slow_step_size,
        mode=lookahead,
        slow_dtype=slow_dtype,
        offload=offload,
    )


def _first_moment(nesterov, b1, mu_dtype) -> optax.GradientTransformationExtraArgs:
    variants = ("none", "nadam", "nadam_scheduled", "classical", "hybrid")
    _checks.one_of(variants, nesterov=nesterov)
    if nesterov == "none":
        return ema(decay=b1, dtype=mu_dtype)
    if nesterov == "nadam_scheduled":
        return scheduled_nesterov_ema(decay=b1, dtype=mu_dtype)
    return nesterov_ema(decay=b1, variant=nesterov, dtype=mu_dtype)
