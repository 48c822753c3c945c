"""CaAdam: Adam with one rate per tensor, from the network's connections."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._connection_units import Overrides
from optax_ext.architecture import Architecture
from optax_ext.transforms.bias_correction import correct_bias
from optax_ext.transforms.connections import scale_by_connections
from optax_ext.transforms.joins import ratio, scale_by_moments
from optax_ext.transforms.moments import ema, ema_of_squares, max_ema_of_squares


def caadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-7,
    *,
    scaling: str = "additive",
    strength: ArrayLike | None = None,
    units: str = "module",
    overrides: Overrides | None = None,
    architecture: Architecture | None = None,
    amsgrad: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return CaAdam: Keras' Adam with the rate of each tensor scaled by a constant factor.

    ::

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g²
        θ = θ - α S (√(1 - b2^t) / (1 - b1^t)) m / (√v + ε) - α λ θ

    The scale S of a tensor depends on its connections or on its depth. `scale_by_connections` has
    the formulas, and `connection_table` prints the scales of a model. Connections and depth are
    read from names and shapes, or by `optax_ext.architecture` from the model's computation.

    Provenance. The Keras form, which adds ε to the *uncorrected* root, AMSGrad's maximum, decoupled
    decay, and the scalings "additive", "multiplicative" and "depth" with their strengths: [code].
    "signed": [a comment in the code]. Units by module, overrides, the architecture, and S = 1 for
    counts on a side of the median that has zero width: [ours]. `units="leaf"` gives the authors'
    formulas as written. `docs/methods/caadam.md` has the details, a picture, our evidence, and
    pitfalls.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε, in [0, inf), added to the uncorrected root.
      scaling: "additive", "multiplicative", "signed" or "depth".
      strength: s of the scaling, which is read at `init` only. Its range and its default depend on
        the scaling: see `scale_by_connections`.
      units: "module", or "leaf" for the authors' units. "module" also finds the units of a flat
        tree of parameters: see `scale_by_connections`.
      overrides: for the path of a unit, its "connections", "depth" or "scale".
      architecture: the result of `optax_ext.architecture`, which reads the network's computation.
        `None` reads names and shapes, which show neither branches nor shared weights.
      amsgrad: whether to use the largest v so far.
      weight_decay: λ, decoupled and not scaled by S, in [0, inf), or a schedule.
      mask: where to decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype that stores the first moment; `None` is the dtype of the parameters.
      nu_dtype: dtype that stores the second moment; `None` is at least float32. In bfloat16 the
        second moment stops following the gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The chain. Its state has `connection_scale` (S of each tensor), `mu` and `nu` for
      `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, the parameters lack an overridden path (at
        `init`), or `params` is missing from the update.

    Warns:
      UserWarning: at `init`, fewer than two units have connections, so this is Adam.

    >>> import jax, jax.numpy as jnp, optax, optax_ext
    >>> tx = optax_ext.caadam(learning_rate=0.1, strength=0.5)
    >>> params = {"in": {"kernel": jnp.ones((1, 2))}, "out": {"kernel": jnp.ones((2, 2))}}
    >>> state = tx.init(params)
    >>> for _ in range(60):
    ...     gradient = jax.grad(lambda p: optax.tree.norm(p, squared=True))(params)
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> scale = optax.tree.get(state, "connection_scale")
    >>> print(f"loss 6.000 -> {optax.tree.norm(params, squared=True):.3f}, scales {scale}")
    loss 6.000 -> 0.004, scales [1.5 0.5]

    References:
      Genet, Inzirillo, "CaAdam: Improving Adam optimizer using connection aware methods",
      arXiv 2410.24216.
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
    _checks.flag(amsgrad=amsgrad)

    of_squares = max_ema_of_squares if amsgrad else ema_of_squares
    return optax.chain(
        scale_by_moments(
            ema(decay=b1, bias_correction="none", dtype=mu_dtype),
            of_squares(decay=b2, bias_correction="none", dtype=nu_dtype),
            ratio(eps=eps),
        ),
        correct_bias(b1=b1, b2=b2),
        scale_by_connections(
            scaling=scaling,
            strength=strength,
            units=units,
            overrides=overrides,
            architecture=architecture,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
