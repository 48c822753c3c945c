"""FAME: Adam with triple exponential moving averages."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext.transforms.cascades import triple_ema, triple_ema_of_squares
from optax_ext.transforms.joins import ratio, scale_by_moments
from optax_ext.transforms.moments import ema_of_squares, max_ema_of_squares


def fame(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.5,
    b4: ArrayLike = 0.7,
    b5: ArrayLike = 0.5,
    eps: ArrayLike = 1e-8,
    *,
    second_moment: str = "ema",
    bias_correction: str = "adam",
    amsgrad: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return FAME: Adam whose momentum is a triple exponential moving average of the gradient.

    ::

        m = b1 m + (1 - b1) g
        d = b3 d + (1 - b3) m
        e = b5 e + (1 - b5) d
        TEMA = 3 m - 3 d + e
        v = b2 v + (1 - b2) g²
        θ = θ - α (TEMA / (1 - b1^t)) / (√(v / (1 - b2^t)) + ε)

    Provenance. The cascade of averages: [paper, code]. The rule above, L2 decay, the AMSGrad
    maximum and all defaults except b4: [code]. A triple average also for the second moment, without
    bias correction or decay, and b1 … b5 = .9 .999 .3 .7 .8: [paper]. The exact bias correction:
    [ours].

    Paper and code differ. The default is the code. The paper's method is
    ``fame(lr, .9, .999, .3, .7, .8, second_moment="tema", bias_correction="none")``.
    `docs/methods/fame.md` has the details, a picture, our evidence, and pitfalls.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the first average of the gradient, in [0, 1).
      b2: decay of the first average of its square, in [0, 1).
      b3: decay of the second average of the gradient, in [0, 1).
      b4: decay of the second and third average of the square, in [0, 1); for "tema" only.
      b5: decay of the third average of the gradient, in [0, 1); the released code calls it beta4.
      eps: ε, in [0, inf), added to the root.
      second_moment: "ema", or "tema" for the triple average of squares.
      bias_correction: "adam" as above; "exact" divides by the same averages of a constant 1; or
        "none".
      amsgrad: whether to use the largest v so far (for "ema" only).
      weight_decay: L2 coefficient, added to the gradient as weight_decay · θ; in [0, inf), or a
        schedule.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores m, d and e; `None` is the dtype of the parameters. bfloat16 is
        precise enough for decays up to .9: see `ema`.
      nu_dtype: dtype that stores v; `None` is at least float32. In bfloat16, v stops following the
        gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The chain. Its state has `mu` (m), `later` (d and e) and `nu` for `optax.tree.get`; with
      "tema" also `nu_later`, with `amsgrad` also `nu_max`.

    Raises:
      ValueError: an argument is out of its range, `amsgrad` is set for "tema", or `params` is
        missing from the update.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.fame(learning_rate=0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(60):
    ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(f"loss 5.000 -> {jnp.sum(params**2):.3f}")
    loss 5.000 -> 0.001

    References:
      Peleg, Smadar, Lazebnik, Hoogi, "Break a Lag: Triple Exponential Moving Average for Enhanced
      Optimization", arXiv 2306.01423.
    """
    _checks.of_adam(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    _checks.decay_rate(b3=b3, b4=b4, b5=b5)
    _checks.one_of(("ema", "tema"), second_moment=second_moment)
    _checks.one_of(("adam", "exact", "none"), bias_correction=bias_correction)
    _checks.flag(amsgrad=amsgrad)
    if amsgrad and second_moment == "tema":
        raise ValueError("amsgrad must be False for second_moment='tema', got True")

    first = triple_ema(decays=(b1, b3, b5), bias_correction=bias_correction, dtype=mu_dtype)
    if second_moment == "tema":
        second = triple_ema_of_squares(
            decays=(b2, b4, b4), bias_correction=bias_correction, dtype=nu_dtype
        )
    else:
        # For a single average, Adam's bias correction is the exact one.
        correction = "none" if bias_correction == "none" else "adam"
        of_squares = max_ema_of_squares if amsgrad else ema_of_squares
        second = of_squares(decay=b2, bias_correction=correction, dtype=nu_dtype)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        scale_by_moments(first, second, ratio(eps=eps)),
        optax.scale_by_learning_rate(learning_rate),
    )
