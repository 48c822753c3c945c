"""CaAdam: Adam with one rate per tensor, from the network's connections."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._units import Overrides
from optax_ext.network import Architecture
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
    r"""CaAdam: Keras' Adam, each tensor's rate scaled by a constant of the architecture.

    .. math:: \theta \leftarrow \theta - \alpha\, S\, \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}
        \frac{m}{\sqrt{v} + \epsilon} - \alpha \lambda \theta

    The scale S of a tensor comes from its connections or its depth: `scale_by_connections` has
    the formulas, `connection_table` prints them for a model, `optax_ext.architecture` reads
    connections and depth from its computation instead of from names and shapes.

    Provenance. The Keras form with ε = 1e-7 beside the *uncorrected* root, AMSGrad's maximum of
    the uncorrected v, the scalings "additive", "multiplicative" and "depth" and their strengths
    (the classes' defaults; the optimizer's own default is "additive" with .9), and decoupled decay,
    which Keras' base optimizer applies before the step and S doesn't scale: [code]. "signed", what
    the code's comment promises: [code's comment]. Units by module, overrides, the architecture from
    the computation, and S = 1 on sides of zero width: [ours].

    The default differs from the code on purpose. As written, biases and normalizations count 0
    connections and get up to 5.6 times the rate, or count as layers of depth. Here they go along
    with their kernel, or keep S = 1. `units="leaf"` is the authors' formulas as written.

    What the authors ran [code]: the counts are keyed by the variable's name, which Keras 3 sets to
    "kernel" for every layer, so that every kernel got the scale of the last one. Their ResNet-20
    had its kernels' rate times 1.92 (additive) or 4.75 (multiplicative) on CIFAR-10, and 1.18 or
    1.36 on CIFAR-100, the setting that they report; biases and normalizations got 2.0 or 5.5 times
    the rate. That is close to Adam at a larger rate, and no baseline was tuned: all ran at .001. So
    compare any gain with Adam at `connection_table(...).mean_scale` times the rate.

    Args:
      learning_rate: α, in [0, inf), or a schedule of it.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: ε, in [0, inf), added to the uncorrected root.
      scaling: "additive", "multiplicative", "signed" or "depth".
      strength: s of the scaling; its range and default depend on it, see `scale_by_connections`.
      units: "module", or "leaf" for the authors' own. Flat trees of parameters are told apart too:
        see `scale_by_connections`.
      overrides: per path of a unit, its "connections", "depth" or "scale".
      architecture: what `optax_ext.architecture` read from the network's computation; `None`
        takes names and shapes, which know neither branches nor shared weights.
      amsgrad: whether to take the largest v so far.
      weight_decay: λ, decoupled and not scaled by S, in [0, inf), or a schedule.
      mask: tree of bools, or a function of the parameters to one: where to decay.
      mu_dtype: storage of the first moment; `None` is the parameters' own.
      nu_dtype: storage of the second moment; `None` is at least float32. In bfloat16 it stops
        following the gradient at b2 >= .99: see `ema_of_squares`.

    Returns:
      The chain. Its state has `connection_scale` (S of each tensor), `mu` and `nu` for
      `optax.tree.get`.

    Raises:
      ValueError: an argument is out of its range, an overridden path is not in the parameters (at
        `init`), or `params` is missing from the update.

    Warns:
      UserWarning: at `init`, fewer than two units have connections, so that this is Adam.

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

    Landscapes: `examples/evidence/results/landscape-caadam.png`.

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
