r"""Lookahead: k steps forward, one step back (Zhang et al., 1907.08610).

Slow weights follow the fast ones, which are the parameters themselves, from afar; every k steps
they move a part of the way and the fast weights restart from there. Here the slow weights live in
the optimizer's state, so that parameters stay ordinary arrays for `optax.apply_updates`, Flax's
`TrainState` and `nnx.Optimizer`; `optax.lookahead` asks for pairs of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_ext import _checks
from optax_ext._numerics import (
    cast,
    first_count,
    flatten,
    next_count,
    require,
    rounded,
    upcast,
)


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      count: number of updates done.
      slow: slow weights, one leaf per parameter; for `mode="rotating"` those of one chunk of each,
        as they were when its turn began.
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
) -> optax.GradientTransformationExtraArgs:
    r"""Synchronizes the parameters with slow weights every `sync_period` steps.

    .. math:: t \bmod k = 0: \quad s \leftarrow s + a\,(\theta - s), \quad \theta \leftarrow s

    Wraps a complete optimizer, learning rate included: its update must be what is added to the
    parameters. Between synchronizations the new slow weights are the old buffers, untouched.

    `mode="rotating"` keeps slow weights for one k-th of the parameters at a time, so they take
    p/k memory instead of p, and is another algorithm: each leaf is cut along its largest axis
    into k chunks, which take turns of k steps: slow weights are taken from the parameters when the
    turn begins and synchronized when it ends. A coordinate is synchronized once in k² steps.

    Args:
      inner: optimizer of the fast weights.
      sync_period: k, an integer >= 1; for "rotating" a Python one, since it decides shapes.
      slow_step_size: a, in [0, 1].
      mode: "exact" or "rotating".
      slow_dtype: storage of the slow weights; `None` is the parameters' own. A synchronization
        pulls towards the rounded ones.

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
    _checks.period(sync_period=sync_period)
    _checks.fraction(slow_step_size=slow_step_size)
    _checks.one_of(("exact", "rotating"), mode=mode)
    _checks.storage_dtype(slow_dtype=slow_dtype)
    if mode == "rotating" and isinstance(sync_period, jax.Array):
        raise ValueError(
            f"sync_period must be a Python integer for mode='rotating', got {sync_period}"
        )
    inner = optax.with_extra_args_support(inner)
    k, a = sync_period, slow_step_size

    def take_slow(p):
        mine = jnp.asarray(p) if mode == "exact" else _chunk(p, 0, int(k))
        dtype = mine.dtype if slow_dtype is None else slow_dtype
        return jnp.array(rounded(mine, dtype), copy=True)

    def init(params: optax.Params) -> LookaheadState:
        slow = jax.tree.map(partial(_also_abstract, take_slow), params)
        return LookaheadState(first_count(), slow, inner.init(params))

    def synchronize(u, slow, p, count):
        if mode == "exact":
            return _pull(u, slow, p, count % k == 0, a)
        return _pull_chunk(u, slow, p, count, int(k), a)

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


def _pull(u, slow, p, sync, a) -> tuple[jax.Array, jax.Array]:
    """Update and slow weights of one leaf (or chunk), pulled together where `sync` is true.

    A select, not a `cond`: where `sync` is false the slow weights are literally the old buffer,
    which costs XLA no copy and lets a kernel skip reading and writing them. The new slow weights
    are the new parameters, rounding included, so XLA need not keep the old ones for them.
    """
    wide_u, wide_slow, wide_p = upcast((u, slow, p))
    pulled = wide_slow + cast(a, wide_p) * (wide_p + wide_u - wide_slow)
    step = jnp.where(sync, (pulled - wide_p).astype(u.dtype), u)
    return step, jnp.where(sync, rounded(p + step, slow.dtype), slow)


def _pull_chunk(u, slow, p, count, k, a) -> tuple[jax.Array, jax.Array]:
    """`_pull` at the end of a chunk's turn; at the beginning its slow weights are taken."""
    turn = (count - 1) // k % k
    begins, ends = (count - 1) % k == 0, count % k == 0
    slow = jnp.where(begins, rounded(_chunk(p, turn, k), slow.dtype), slow)
    spread, owner = _spread(slow, p, k)
    step, _ = _pull(u, spread, p, ends & (owner == turn), a)
    return step, slow


def _cut(x, k) -> tuple[int, int, int]:
    """Axis along which a leaf is cut, its size, and the length of a chunk of it.

    A 0-d leaf is cut as a vector of one. Chunks are of one length, so that their number can be
    traced; the last ones may own less than they hold, or nothing.
    """
    shape = x.shape or (1,)
    axis = max(range(len(shape)), key=lambda i: shape[i])
    return axis, shape[axis], -(-shape[axis] // k)


def _chunk(x, j, k) -> jax.Array:
    """Chunk `j` of `k`, filled up with the leaf's last entries."""
    axis, _, length = _cut(x, k)
    x = jnp.atleast_1d(x)
    at = (slice(None),) * axis + (j * length + jnp.arange(length, dtype=jnp.int32),)
    return x.at[at].get(mode="clip", out_sharding=_gathered(x, axis))


def _gathered(x, axis) -> jax.NamedSharding:
    """The sharding of `x` but for `axis`, which is whole on every device.

    A chunk is of no size that a mesh divides; under explicit sharding that must be said.
    """
    own = jax.typeof(x).sharding
    names = (None if i == axis else name for i, name in enumerate(own.spec))
    return jax.NamedSharding(own.mesh, jax.P(*names))


def _spread(chunk, like, k) -> tuple[jax.Array, jax.Array]:
    """A chunk's entries at every place they could come from, and the chunk that owns each place.

    Elementwise, where putting the chunk into its place would copy the leaf.
    """
    shape, like = like.shape, jnp.atleast_1d(like)
    axis, size, length = _cut(like, k)
    sharding = jax.typeof(like).sharding
    at = (slice(None),) * axis + (jnp.arange(size, dtype=jnp.int32) % max(length, 1),)
    spread = chunk.at[at].get(mode="clip", out_sharding=sharding)
    place = jax.lax.broadcasted_iota(jnp.int32, like.shape, axis, out_sharding=sharding)
    return spread.reshape(shape), (place // max(length, 1)).reshape(shape)


def _also_abstract(f, p):
    """`f(p)`, abstract where the parameter is: slow weights have no other value to start from."""
    return jax.eval_shape(f, p) if isinstance(p, jax.ShapeDtypeStruct) else f(p)
