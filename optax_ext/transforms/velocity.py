"""Velocity regularization: a rate that falls as the momentum grows.

VRAdam (2505.13196) damps fast motion as a relativistic kinetic energy would: it divides the rate of
the whole step by one plus a penalty on the velocity.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import (
    abs_sq,
    first_count,
    flatten,
    next_count,
    scalar_dtype,
    scale,
    scale_each,
    tree_map,
    upcast,
    without_cse,
)
from optax_ext.transforms.bias_correction import total_weight


class VelocityRegularizedState(NamedTuple):
    """State of `velocity_regularized`.

    Attributes:
      count: number of updates done.
      gate: factor on the last update, in [1/(1 + lr_cutoff), 1]; 1 before the first. It is a
        scalar, or for `norm_scope="tensor"` a vector in the order of `jax.tree.leaves(params)`,
        where `None` counts as a leaf.
      inner_state: state of the regularized transformation.
    """

    count: jax.Array
    gate: jax.Array
    inner_state: optax.OptState


def velocity_regularized(
    inner: optax.GradientTransformation,
    *,
    beta3: ArrayLike,
    lr_cutoff: ArrayLike,
    power: ArrayLike = 2.0,
    norm_of: str = "velocity",
    norm_scope: str = "global",
    norm_reduction: str = "sum",
    b1: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale the whole update of `inner`, decay included, by a factor that falls with the velocity.

    ::

        update = gate update,   gate = 1 / (1 + min(beta3 Σ |x|^p, c))

    x is what `norm_of` names, by default the velocity: the first moment in the state of `inner`,
    which is the field `mu`, as stored and without bias correction. `inner` can be any
    transformation with such a field, for example Optax's `adamw` or `lion`.

    The penalty is a sum over coordinates, so the right beta3 depends on the size of the
    model and on the scale of the loss. The mean does not depend on the size. With gradients clipped
    to a global norm of 1 and beta3 = 1, the gate is never below 1/2. A tensor without a
    gradient (`None`) is left out of the sum, as in the authors' code, but keeps its velocity.

    Args:
      inner: transformation to regularize, with its learning rate.
      beta3: weight of the penalty, in [0, inf); 0 does not change the updates of `inner`.
      lr_cutoff: c, largest penalty, in [0, inf).
      power: p, in (0, inf). Under `optax.inject_hyperparams`, name it in the `static_args`: for a
        traced 2, the compiled step computes a power of each element, not a square.
      norm_of: the quantity x: "velocity", "corrected_velocity" (divided by `1 - b1^t`) or
        "gradient".
      norm_scope: "global" has one gate for all tensors together, "tensor" one gate per tensor.
      norm_reduction: "sum" or "mean" over the coordinates in scope.
      b1: decay of the velocity; needed for "corrected_velocity" only.

    Raises:
      ValueError: an argument is out of its range, `inner` is not a transformation, or (at `init`)
        the state of `inner` has no velocity, or has it in codes.

    >>> import jax.numpy as jnp
    >>> tx = velocity_regularized(optax.adamw(0.1), beta3=1.0, lr_cutoff=10.0)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
    >>> print(f"{state.gate:.4f}", updates.round(4))  # ||u||^2 = 25, cut off at 10
    0.0909 [-0.0091 -0.0091]
    """
    _checks.transformation(inner=inner)
    _checks.non_negative(beta3=beta3, lr_cutoff=lr_cutoff)
    _checks.positive(power=power)
    _checks.one_of(("velocity", "corrected_velocity", "gradient"), norm_of=norm_of)
    _checks.one_of(("global", "tensor"), norm_scope=norm_scope)
    _checks.one_of(("sum", "mean"), norm_reduction=norm_reduction)
    if norm_of == "corrected_velocity":
        _checks.decay_rate(b1=b1)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> VelocityRegularizedState:
        _checks.float_leaves(params=params)
        inner_state = inner.init(params)
        tensors = len(flatten(params)[0])
        if norm_of != "gradient":
            trees = _velocities(inner_state)
            if not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(trees)):
                raise ValueError(
                    "inner must keep its velocity in floats: wrap velocity_regularized in"
                    " quantize_state, not the reverse"
                )
            if norm_scope == "tensor" and [len(flatten(tree)[0]) for tree in trees] != [tensors]:
                raise ValueError(
                    "norm_scope must be 'global' where inner keeps its velocities in several"
                    " trees, or not for all parameters, got 'tensor'"
                )
        gate = jnp.ones((tensors,) if norm_scope == "tensor" else (), scalar_dtype(params))
        return VelocityRegularizedState(first_count(), gate, inner_state)

    def update(updates, state, params=None, **extra_args):
        count = next_count(state.count)
        dtype = state.gate.dtype
        step, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        moving = without_cse(updates)
        if norm_of != "gradient":
            moving = _without_absent(_velocities(inner_state), updates)
        sizes = penalty(moving, power, norm_scope, norm_reduction, dtype)
        if norm_of == "corrected_velocity" and b1 is not None:
            sizes = sizes / total_weight(b1, count, dtype) ** power
        sizes = jnp.minimum(sizes, jnp.finfo(dtype).max)  # beta3 = 0 times infinity is NaN
        gate = (1 / (1 + jnp.minimum(beta3 * sizes, lr_cutoff))).astype(dtype)
        if norm_scope == "tensor":
            gated = scale_each(gate, step)
        else:
            gated = tree_map(lambda u: scale(gate, u), step)
        return gated, VelocityRegularizedState(count, gate, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def penalty(tree: Any, power: ArrayLike, scope: str, reduction: str, dtype: DTypeLike) -> jax.Array:
    """Return the sum of `|x|^p`, or its mean, over all tensors or for each (a vector)."""

    def powers(x):
        if isinstance(power, (int, float)) and power == 2:
            return abs_sq(upcast(x))
        return jnp.abs(upcast(x)) ** power

    leaves, _ = flatten(tree)
    zero = jnp.zeros((), dtype)
    # Sizes are divisors as floats, because JAX refuses integers above 2^31.
    sums = [zero if x is None else jnp.sum(powers(x), dtype=dtype) for x in leaves]
    sizes = [0 if x is None else x.size for x in leaves]
    if scope == "global":
        total, size = sum(sums, start=zero), sum(sizes)
        return total / float(max(size, 1)) if reduction == "mean" else total
    if reduction == "mean":
        sums = [total / float(max(size, 1)) for total, size in zip(sums, sizes, strict=True)]
    return jnp.stack(sums) if sums else jnp.zeros((0,), dtype)


def _without_absent(velocities: list[Any], updates: optax.Updates) -> list[Any]:
    """Replace the velocities of leaves that are `None` in `updates` by `None`.

    Leaves are matched by path, because `inner` may have velocities for some parameters only.
    """
    leaves = jax.tree.leaves_with_path(updates, is_leaf=lambda g: g is None)
    absent = {path for path, g in leaves if g is None}
    return [
        jax.tree.map_with_path(
            lambda path, u: None if path in absent else u, tree, is_leaf=lambda u: u is None
        )
        for tree in velocities
    ]


def _velocities(inner_state: optax.OptState) -> list[Any]:
    """Return the fields `mu` of named tuples, but no parameters that are named "mu"."""
    found = optax.tree.get_all_with_path(
        inner_state, "mu", lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    )
    if not found:
        raise ValueError("inner must keep a velocity: its state has no field named 'mu'")
    return [tree for _, tree in found]
