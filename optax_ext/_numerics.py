"""Arithmetic that all pieces share: precision, `None` leaves, per-tensor scalars.

All pieces follow two conventions. They compute in at least float32 for any dtype of the leaves, and
round once: an update to the dtype of the piece's input, state to its storage dtype. A `None` leaf
in the updates is an absent gradient: the update stays `None`, and the leaf's state does not change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from optax._src.base import NO_PARAMS_MSG  # Optax's own message; it is not public


def _is_none(x: Any) -> bool:
    return x is None


def tree_map(f: Callable[..., Any], updates: optax.Updates, *rest: Any) -> Any:
    """Map `f` over the leaves of `updates`; `None` leaves stay `None`."""
    return jax.tree.map(
        lambda u, *others: None if u is None else f(u, *others), updates, *rest, is_leaf=_is_none
    )


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return leaves, `None` included, and structure; per-tensor vectors have the leaves' order."""
    return jax.tree.flatten(tree, is_leaf=_is_none)


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype that leaves of `dtype` are computed in: at least float32."""
    narrow = not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of the absolute value of numbers of `dtype`: real, at least float32."""
    return jnp.finfo(compute_dtype(dtype)).dtype


def scalar_dtype(tree: Any) -> jnp.dtype:
    """Return the dtype of scalars for all of `tree`: real, as precise as its most precise leaf."""
    dtypes = [real_dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype(jnp.float32))


def upcast(tree: Any) -> Any:
    """Cast every leaf to the dtype that it is computed in."""
    return tree_map(lambda x: jnp.asarray(x, compute_dtype(jnp.result_type(x))), tree)


def to_storage_dtype(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast `x` to the dtype that stores it; refuse a real dtype for complex `x`."""
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            "mu_dtype and slow_dtype must be None or complex for complex parameters, got"
            f" {jnp.dtype(dtype).name}"
        )
    return x.astype(dtype)


def zeros_like(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    """Return zeros for a first moment, by default in the dtype of the parameters.

    The zeros are never weakly typed, even if the parameters are, as `jnp.full(2, 0.5)` is. The
    first step would make weakly typed zeros strongly typed, so the second would compile again.
    """
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=jnp.result_type(p) if dtype is None else dtype), params
    )


def real_zeros_like(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    """Return zeros for a second moment: real, by default at least float32."""

    def zeros(p):
        return jnp.zeros_like(p, dtype=real_dtype(jnp.result_type(p)) if dtype is None else dtype)

    return jax.tree.map(zeros, params)


def cast_state_like(new: Any, old: Any) -> Any:
    """Cast `new` to the dtypes of `old`, and return `old` where `new` is `None`."""
    return jax.tree.map(
        lambda o, n: o if n is None else to_storage_dtype(n, o.dtype), old, new, is_leaf=_is_none
    )


def cast_like(tree: Any, like: optax.Updates) -> Any:
    """Cast every leaf to the dtype of its counterpart."""
    return tree_map(lambda u, x: x.astype(u.dtype), like, tree)


def cast_scalar_like(scalar: ArrayLike, like: jax.Array) -> Any:
    """Cast a scalar to the real dtype of `like`, so that it never promotes `like`.

    Python numbers are weakly typed already, so they are returned as they are. They are rounded only
    in arithmetic with an array.
    """
    if isinstance(scalar, (jax.Array, np.ndarray, np.generic)):
        return jnp.asarray(scalar, real_dtype(like.dtype))
    return scalar


def scale(scalar: ArrayLike, x: jax.Array) -> jax.Array:
    """Return `scalar * x`, computed in at least float32 and rounded to the dtype of `x`."""
    wide = x.astype(compute_dtype(x.dtype))
    return (cast_scalar_like(scalar, wide) * wide).astype(x.dtype)


def abs_sq(x: jax.Array) -> jax.Array:
    """Return `|x|^2`, real also for complex `x`."""
    return (x * x.conj()).real if jnp.iscomplexobj(x) else x * x


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Return √x, with derivative 0 instead of infinity at 0.

    So a tensor that is 0 and stays 0 adds 0 to a derivative. An infinite derivative would make it
    NaN. A rule of its own leaves the plain root to steps that nobody differentiates.
    """
    return jnp.sqrt(x)


@root.defjvp
def _derivative_of_root(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = root(x)
    return y, jnp.where(y == 0, 0, 0.5 / jnp.where(y == 0, 1, y)) * dx


def norm(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the Euclidean norm of one tensor, accumulated in `dtype`."""
    return root(jnp.sum(abs_sq(upcast(x)), dtype=dtype))


def without_cse(tree: Any) -> Any:
    """Return `tree`, but prevent XLA from sharing arithmetic on it (eliminating subexpressions).

    A gradient's square is needed for its norm and again for its second moment. XLA would compute it
    once, and its CPU backend would store it. Computing it twice needs no memory, and no other
    backend moves more bytes for it.
    """
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def global_norm(tree: Any, dtype: DTypeLike) -> jax.Array:
    """Return the Euclidean norm of all tensors together, accumulated in `dtype`."""
    squares = [jnp.sum(abs_sq(upcast(x)), dtype=dtype) for x in jax.tree.leaves(tree)]
    return root(sum(squares, start=jnp.zeros((), dtype)))


def scale_each(scales: jax.Array, updates: optax.Updates) -> optax.Updates:
    """Multiply the i-th leaf by `scales[i]`, in the order of `flatten`."""
    leaves, structure = flatten(updates)
    scaled = [None if u is None else scale(scales[i], u) for i, u in enumerate(leaves)]
    return jax.tree.unflatten(structure, scaled)


def require(params: optax.Params | None) -> None:
    """Raise Optax's own error if an update has no parameters."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)


def first_count() -> jax.Array:
    """Return the number of updates done before the first update: 0."""
    return jnp.zeros((), jnp.int32)


def next_count(count: jax.Array) -> jax.Array:
    """Return the number of updates done one step later; it stops at the largest integer."""
    return jnp.asarray(optax.safe_increment(count))
