"""Lookahead: k steps forward, one step back (Zhang et al., 1907.08610).

The fast weights are the parameters themselves. Every k steps, the slow weights move a part of the
way to the fast weights, and the fast weights restart from there. Here the slow weights are in the
optimizer's state. So parameters stay ordinary arrays for `optax.apply_updates`, Flax's `TrainState`
and `nnx.Optimizer`. `optax.lookahead` needs pairs of fast and slow parameters instead.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks, _host_memory
from optax_ext._numerics import (
    cast_scalar_like,
    first_count,
    flatten,
    next_count,
    require,
    to_storage_dtype,
    upcast,
)
from optax_ext.transforms import rotation


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      count: number of updates done.
      slow: slow weights, one leaf per parameter. For `mode="rotating"` a leaf has one chunk of its
        parameter, as it was when the chunk's turn began.
      inner_state: state of the transformation that moves the fast weights.
    """

    count: jax.Array
    slow: optax.Params
    inner_state: optax.OptState


def lookahead(
    inner: optax.GradientTransformation,
    *,
    sync_period: int | jax.Array,
    slow_step_size: ArrayLike,
    mode: str = "exact",
    slow_dtype: DTypeLike | None = None,
    offload: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Synchronize the parameters with slow weights every `sync_period` steps.

    ::

        if t is a multiple of k: slow = slow + a (θ - slow), θ = slow

    It wraps a complete optimizer with its learning rate, whose update is added to the parameters.
    Between synchronizations the new slow weights are the old buffers, untouched.

    `mode="rotating"` is a different algorithm. It has slow weights for one k-th of the parameters
    at a time, so they take p/k memory instead of p. The rows of each leaf are distributed over k
    chunks (see `rotation.py`), which take turns of k steps. When a turn begins, the slow weights of
    the chunk are copied from the parameters. When it ends, they are synchronized. A coordinate is
    synchronized once in k² steps. On a mesh, each device has the chunks of its own parameters,
    except along short axes.

    Args:
      inner: optimizer of the fast weights.
      sync_period: k, an integer >= 1; for "rotating" a Python integer, because it decides shapes.
      slow_step_size: a, in [0, 1].
      mode: "exact" or "rotating".
      slow_dtype: dtype that stores the slow weights; `None` is the dtype of the parameters. The
        fast weights restart from the rounded slow weights, so a change that is smaller than the
        rounding is lost in each period. In bfloat16, a weight that changes by less than .2 to .4 %
        in a period never moves.
      offload: memory that stores the slow weights: "pinned_host" is the host's memory, `None` the
        device's. They are moved to the device at a synchronization only, one leaf after another.
        Under a `vmap` over states this is not possible, because the counts of the states may
        differ.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing from the update.

    >>> import jax.numpy as jnp
    >>> tx = lookahead(optax.sgd(1.0), sync_period=2, slow_step_size=0.5)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([-1.0]), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params, state.slow)
    [1.] [0.]
    [1.] [1.]
    """
    _checks.transformation(inner=inner)
    _checks.period(sync_period=sync_period)
    _checks.fraction(slow_step_size=slow_step_size)
    _checks.one_of(("exact", "rotating"), mode=mode)
    _checks.storage_dtype(slow_dtype=slow_dtype)
    _checks.memory(offload=offload)
    k: Any = sync_period
    if mode == "rotating":
        if isinstance(k, jax.Array):
            raise ValueError(
                f"sync_period must be a Python integer for rotating lookahead, got {k!r}; under"
                " optax.inject_hyperparams, name sync_period in its static_args"
            )
        k = int(k)
    inner, a = optax.with_extra_args_support(inner), slow_step_size

    def take_slow(p):
        mine = jnp.asarray(p) if mode == "exact" else rotation.chunk(jnp.asarray(p), 0, k)
        dtype = mine.dtype if slow_dtype is None else slow_dtype
        taken = jnp.array(to_storage_dtype(mine, dtype), copy=True)
        return taken if offload is None else _host_memory.to_host(taken)

    def init(params: optax.Params) -> LookaheadState:
        _checks.float_leaves(params=params)
        slow = jax.tree.map(partial(_also_abstract, take_slow), params)
        return LookaheadState(first_count(), slow, inner.init(params))

    pull = _pull if mode == "exact" else _pull_chunk

    def synchronize(u, slow, p, count):
        if offload is None:
            return pull(u, slow, p, count, k, a)
        # Slow weights are read when a period ends. They are written at the same step; those of a
        # chunk are written when the next period begins.
        begins, ends = (count - 1) % k == 0, count % k == 0
        here = _host_memory.load_if(slow, when=ends)
        step, new = pull(u, here, p, count, k, a)
        return step, _host_memory.store_if(new, slow, when=ends if mode == "exact" else begins)

    def update(updates, state, params=None, **extra_args):
        require(params)
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = next_count(state.count)
        leaves, structure = flatten(steps)
        slow, fast = structure.flatten_up_to(state.slow), structure.flatten_up_to(params)
        synchronized = [
            (u, s) if u is None else synchronize(u, s, p, count)
            for u, s, p in zip(leaves, slow, fast, strict=True)
        ]
        steps = jax.tree.unflatten(structure, [u for u, _ in synchronized])
        slow = jax.tree.unflatten(structure, [s for _, s in synchronized])
        return steps, LookaheadState(count, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _pull(u, slow, p, count, k, a) -> tuple[jax.Array, jax.Array]:
    """Return update and slow weights of one leaf, synchronized at the end of every period."""
    return _meet(u, slow, p, count % k == 0, a)


def _pull_chunk(u, slow, p, count, k, a) -> tuple[jax.Array, jax.Array]:
    """Synchronize a chunk at the end of its turn; copy its slow weights at the beginning."""
    turn = (count - 1) // k % k
    begins, ends = (count - 1) % k == 0, count % k == 0
    chunk = rotation.placed_like(rotation.chunk(p, turn, k), slow)
    slow = jnp.where(begins, to_storage_dtype(chunk, slow.dtype), slow)
    spread, owner = rotation.spread(slow, p, k)
    step, _ = _meet(u, spread, p, ends & (owner == turn), a)
    return step, slow


def _meet(u, slow, p, sync, a) -> tuple[jax.Array, jax.Array]:
    """Return update and slow weights, synchronized where `sync` is true.

    This is a select, not a `cond`. Where `sync` is false the slow weights are the old buffer, so
    XLA needs no copy, and a kernel can skip reading and writing them. The new slow weights are
    computed from the new parameters, rounding included, so XLA need not keep the old parameters.
    """
    wide_u, wide_slow, wide_p = upcast((u, slow, p))
    pulled = wide_slow + cast_scalar_like(a, wide_p) * (wide_p + wide_u - wide_slow)
    step = jnp.where(sync, (pulled - wide_p).astype(u.dtype), u)
    return step, jnp.where(sync, to_storage_dtype(p + step, slow.dtype), slow)


def _also_abstract(f, p):
    """Return `f(p)`, or the shape of `f(p)` where the parameter is only a shape."""
    return jax.eval_shape(f, p) if isinstance(p, jax.ShapeDtypeStruct) else f(p)
