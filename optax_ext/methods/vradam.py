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
    r"""Return VRAdam: AdamW with a rate that falls as the velocity grows.

    .. math::
      u &= b_1 u + (1 - b_1)\, g, \qquad v = b_2 v + (1 - b_2)\, g^2 \\
      \alpha_t &= \frac{\alpha}{1 + \min(\beta_3 \lVert u \rVert^2, c)} \\
      \theta &\leftarrow \theta - \alpha_t \left( \frac{\hat u}{\sqrt{\hat v} + \epsilon}
        + \lambda \theta \right)

    The norm is one number for all tensors together. It measures the velocity u before its bias
    correction. The gate is the factor :math:`\alpha_t / \alpha`.

    Provenance. The rule, `power` (the penalty is :math:`\sum |u|^p`, not its root), the norm of
    the gradient instead of the velocity, and the defaults: [code]; the rule also [paper,
    second-hand]. Earlier code measured the gradient and had a cutoff of 19. The gate per tensor,
    of the mean square, or of the corrected velocity: [ours].

    The penalty is a sum over coordinates. So the effect of :math:`\beta_3` depends on the model
    size and on the loss scale. `norm_reduction="mean"` divides by the number of coordinates. The
    rate stays within :math:`[\alpha/(1 + c), \alpha]`. :math:`\beta_3 = 0` is AdamW. The gate
    measures the stored velocity, which `mu_dtype` rounds. The authors' code has one norm for each
    parameter group. For the same result, use one `vradam` for each group under `optax.partition`.

    What the authors ran [code]. Their sweeps drew α log-uniformly from [1e-4, .1] (transformers:
    from 1e-5), :math:`\beta_3` from [.1, 1.5] (transformers: to 5), c from 3 to 30, and whether the
    norm is that of the gradient. For Adam they drew the rate only. Their baseline is Adam with L2
    decay of 1e-5, which the paper calls AdamW. Their figure of the edge of stability compares
    VRAdam at α = .002 (norm of the gradient, c = 19) with Adam at .001. In it, only Adam's
    sharpness is preconditioned. Their values for CIFAR-10 are α = .0846, c = 29 and :math:`\beta_3`
    = 1.015 [second-hand].

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the velocity, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      beta3: :math:`\beta_3`, weight of the penalty, in [0, inf).
      lr_cutoff: c, largest penalty, in [0, inf).
      eps: ε, in [0, inf), added to the root.
      power: p, the exponent in :math:`\sum |u|^p`, in (0, inf).
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
      The chain. Its state has `gate` (α_t / α), `mu` and `nu` for `optax.tree.get`.

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

    Paths on three landscapes: `examples/evidence/results/landscapes.png`.

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
