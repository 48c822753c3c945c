"""Training of float32 weights whose parameters are stored in bfloat16: see `master_weights`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext import _checks
from optax_ext._numerics import first_count, next_count, require, tree_map
from optax_ext.low_precision.bits import join, random_bits, round_stochastically, split
from optax_ext.low_precision.formats import check_bits


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      step: number of updates done.
      correction: the weights minus the parameters, as integers; see `bits.split`.
      inner_state: the state of the wrapped optimizer, for float32 weights.
    """

    step: jax.Array
    correction: optax.Params
    inner_state: optax.OptState


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      step: number of updates done.
      inner_state: the state of the wrapped optimizer, for float32 weights.
    """

    step: jax.Array
    inner_state: optax.OptState


def master_weights(
    tx: optax.GradientTransformation, *, bits: int = 24
) -> optax.GradientTransformationExtraArgs:
    """Train float32 weights whose upper half are bfloat16 parameters.

    The parameters are the weights, rounded to bfloat16. The state stores the missing bits: 16
    (`bits=32`) or 8 (`bits=24`). So `bits=32` gives bit-exactly the weights that `tx` computes in
    float32 from the same gradients, in 4 bytes a weight. A float32 copy beside bfloat16 parameters
    takes 6. `bits=24` takes 3 bytes, with a relative error below 2^-15 at each step. It rounds at
    random, as `quantize_state` does, so that smaller updates are not lost.

    `tx` sees float32 weights and gradients. The updates are float32, and `optax.apply_updates`
    lands exactly on the new bfloat16 parameters. Change the parameters by updates only; a parameter
    that is set to 0 otherwise is 0.

    Initialize with the float32 weights, then train with `bfloat16_weights` of them. Initialized
    with bfloat16 parameters, the correction starts at 0.

    Source: ours; 24 bits as in FlashOptim (2602.23349).

    Args:
      tx: a complete optimizer, with its learning rate.
      bits: bits of a weight, 24 or 32.

    Raises:
      ValueError: `tx` is not a transformation, `bits` is neither 24 nor 32, `params` is missing
        from the update, or a parameter has another dtype.

    >>> tx = master_weights(optax.sgd(1.0), bits=32)
    >>> weights = jnp.array([1.0])
    >>> params, state = bfloat16_weights(weights), tx.init(weights)
    >>> for _ in range(10):  # each step is too small for bfloat16
    ...     updates, state = tx.update(jnp.array([-0.0003], jnp.bfloat16), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params.dtype, float32_weights(params, state))
    bfloat16 [1.003]
    """
    _checks.transformation(tx=tx)
    check_bits(bits)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> MasterWeightsState:
        _require_dtypes(params, (jnp.float32, jnp.bfloat16))
        wide = _wide(params)
        correction = jax.tree.map(lambda w: split(w, bits)[1], wide)
        return MasterWeightsState(first_count(), correction, tx.init(wide))

    def update(updates, state, params=None, **extra_args):
        require(params)
        _require_dtypes(params, (jnp.bfloat16,))
        step = next_count(state.step)
        weights = jax.tree.map(join, params, state.correction)
        steps, inner_state = tx.update(_wide(updates), state.inner_state, weights, **extra_args)

        def apply(u, g, w, p):
            random = None if bits == 32 else _random_bits(g, w, step)
            high, low = split((w + u).astype(jnp.float32), bits, random)
            return _difference(high, p), low

        new = tree_map(apply, steps, updates, weights, params)
        result = tree_map(lambda _, n: n[0], steps, new)
        correction = jax.tree.map(lambda old, n: old if n is None else n[1], state.correction, new)
        return result, MasterWeightsState(step, correction, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def bfloat16_weights(weights: optax.Params) -> optax.Params:
    """Return the bfloat16 parameters for float32 weights, rounded as `master_weights` rounds.

    A value halfway between two bfloat16 numbers is rounded away from 0; `astype` rounds it to the
    even one. Leaves that are not float32 are returned as they are.

    >>> print(bfloat16_weights(jnp.array([1.00390625])))
    [1.00781]
    """

    def round_float32(w):
        return split(w, 32)[0].astype(jnp.bfloat16) if w.dtype == jnp.float32 else w

    return jax.tree.map(round_float32, weights)


def float32_weights(params: optax.Params, state: Any) -> optax.Params:
    """Return the float32 weights of a run with `master_weights`, to export them.

    Args:
      params: the parameters. Those that `optax.masked` leaves out are returned as they are.
      state: the state of the optimizer, with one `MasterWeightsState` at any depth.

    Raises:
      KeyError: there is no such state, or more than one.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MasterWeightsState))
    found = [x for x in nodes if isinstance(x, MasterWeightsState)]
    if len(found) != 1:
        raise KeyError(f"state must contain one MasterWeightsState, got {len(found)}")
    # A mask can be a prefix, so a masked node stands for a leaf or for many.
    return jax.tree.map(
        lambda low, p: p if isinstance(low, optax.MaskedNode) else join(p, low),
        found[0].correction,
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def stochastic_rounding(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Round bfloat16 parameters up or down at random, so that small updates are not lost.

    The mean of the rounded weight is the weight, so nothing has to be stored, and a weight takes 2
    bytes. `tx` sees float32 parameters and gradients, and keeps float32 state. Randomness
    comes from the bits of gradient and parameter, as for `quantize_state`. The updates are float32,
    and `optax.apply_updates` lands exactly on the rounded weights. A zero update changes nothing.

    Args:
      tx: a complete optimizer, with its learning rate.

    Raises:
      ValueError: `tx` is not a transformation, `params` is missing from the update, or a parameter
        is not bfloat16.

    >>> tx = stochastic_rounding(optax.sgd(1.0))
    >>> params, grads = jnp.ones(1000, jnp.bfloat16), jnp.linspace(-0.0015, -0.0005, 1000)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(f"{updates.mean():.3f}", jnp.unique(optax.apply_updates(params, updates)))
    0.001 [1 1.00781]
    """
    _checks.transformation(tx=tx)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> StochasticRoundingState:
        _require_dtypes(params, (jnp.bfloat16,))
        return StochasticRoundingState(first_count(), tx.init(_wide(params)))

    def update(updates, state, params=None, **extra_args):
        require(params)
        _require_dtypes(params, (jnp.bfloat16,))
        step, wide = next_count(state.step), _wide(params)
        steps, inner_state = tx.update(_wide(updates), state.inner_state, wide, **extra_args)

        def rounded(u, g, p):
            new = (p + u).astype(jnp.float32)
            return _difference(round_stochastically(new, _random_bits(g, p, step)), p)

        return tree_map(rounded, steps, updates, wide), StochasticRoundingState(step, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _random_bits(gradient: jax.Array | None, weight: jax.Array, step: jax.Array) -> jax.Array:
    """Return random bits from a gradient, which can be absent, and its weight.

    bfloat16 gradients have few different values, so the bits of the weights count, too.
    """
    sources = [x for x in (gradient, weight) if x is not None]
    return random_bits(*sources, step=step)


def _difference(new: jax.Array, params: jax.Array) -> jax.Array:
    """Return the float32 update from `params` to `new`; 0 if both are the same infinity."""
    return jnp.where(new == params, 0, new - params.astype(jnp.float32))


def _wide(tree: Any) -> Any:
    return tree_map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _require_dtypes(params: Any, allowed: tuple[Any, ...]) -> None:
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if jnp.result_type(p) not in allowed:
            names = " or ".join(jnp.dtype(dtype).name for dtype in allowed)
            raise ValueError(
                f"params must be {names}, got {jnp.result_type(p)} for"
                f" {jax.tree_util.keystr(path, simple=True, separator='/')}: use bfloat16_weights,"
                " or leave it out with optax.masked"
            )
