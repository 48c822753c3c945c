"""VRAdam: AdamW with a rate that falls as the momentum grows."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext.transforms.joins import ratio, scale_by_moments
from optax_ext.transforms.moments import ema, ema_of_squares
from optax_ext.transforms.velocity import velocity_regularized


def vradam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    beta3: ArrayLike = 1.0,
    lr_cutoff: ArrayLike = 10.0,
    eps: ArrayLike = 1e-8,
    *,
    power: ArrayLike = 2.0,
    norm_of: str = "velocity",
    norm_scope: str = "global",
    norm_reduction: str = "sum",
    weight_decay: optax.ScalarOrSchedule = 1e-5,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return VRAdam: AdamW with a rate that falls as the velocity grows.

    ::

        u = b1 u + (1 - b1) g,    u_hat = u / (1 - b1^t)
        v = b2 v + (1 - b2) g²,   v_hat = v / (1 - b2^t)
        gate = 1 / (1 + min(beta3 ‖u‖², c))
        θ = θ - α gate (u_hat / (√v_hat + ε) + λ θ)

    c is `lr_cutoff`. The norm is one number for all tensors together. It measures the velocity u
    before its bias correction, as `mu_dtype` stores it. The rate stays within [α / (1 + c), α].
    With beta3 = 0 this is AdamW.

    Provenance. The rule, `power`, the norm of the gradient, and the defaults: [code]; the rule also
    [paper, second-hand]. A gate per tensor, of the mean square, or of the corrected velocity:
    [ours]. `docs/methods/vradam.md` has the details, a picture, our evidence, and pitfalls.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the velocity, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      beta3: weight of the penalty, in [0, inf). The right value depends on the size of the model,
        because the penalty is a sum over coordinates.
      lr_cutoff: c, largest penalty, in [0, inf).
      eps: ε, in [0, inf), added to the root.
      power: p in (0, inf); the penalty is the sum of `|u|^p`, not its root.
      norm_of: "velocity", "corrected_velocity" or "gradient".
      norm_scope: "global", or "tensor" for a gate per tensor.
      norm_reduction: "sum", or "mean" over the coordinates in scope.
      weight_decay: λ, decoupled, in [0, inf), or a schedule. The gate scales the decay too.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores u; `None` is the dtype of the parameters. bfloat16 is precise
        enough for decays up to .9: see `ema`.
      nu_dtype: dtype that stores v; `None` is at least float32. In bfloat16, v stops following the
        gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The optimizer. Its state has `gate`, `mu` and `nu` for `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing from the update.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.vradam(learning_rate=0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(200):
    ...     gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> gate = optax.tree.get(state, "gate")
    >>> print(f"loss 5.000 -> {jnp.sum(params**2):.3f}, gate {gate:.3f}")
    loss 5.000 -> 0.000, gate 1.000

    References:
      Vaidhyanathan, Schorling, Ares, Osborne, "A Physics-Inspired Optimizer: Velocity Regularized
      Adam", arXiv 2505.13196, ICLR 2026.
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
    adamw = optax.chain(
        scale_by_moments(
            ema(decay=b1, dtype=mu_dtype), ema_of_squares(decay=b2, dtype=nu_dtype), ratio(eps=eps)
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return velocity_regularized(
        adamw,
        beta3=beta3,
        lr_cutoff=lr_cutoff,
        power=power,
        norm_of=norm_of,
        norm_scope=norm_scope,
        norm_reduction=norm_reduction,
        b1=b1,
    )
