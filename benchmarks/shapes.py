"""Shapes of parameters and of an optimizer's state, on one device or sharded across several."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

import optax_ext

Shape = tuple[int, ...]
Leaves = dict[str, jax.ShapeDtypeStruct]


def leaves(shapes: Iterable[Shape]) -> Leaves:
    """Return a tree of float32 leaves, whose names sort in the order of the shapes."""
    return {
        f"leaf{i:04d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)
    }


def count(params: Any) -> int:
    """Return the number of parameters in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def size(tree: Any) -> int:
    """Return the number of bytes of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def in_words(params: Any) -> str:
    """Describe the number of leaves and of parameters."""
    leaves = len(jax.tree.leaves(params))
    many = "leaf" if leaves == 1 else "leaves"
    return f"{leaves} {many}, {count(params) / 1e6:.1f} million parameters"


def shardings(params: Leaves) -> dict[str, NamedSharding] | None:
    """Return the shardings of the leaves, or `None` if they have none."""
    found = {name: x.sharding for name, x in params.items() if x.sharding is not None}
    return found or None


def shards(tree: Any) -> Any:
    """Return the shapes of the per-device shards."""

    def shard(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(shard, tree)


def prepared(prepare: Callable[[Any], Any], params: Leaves) -> Leaves:
    """Return the parameters in the dtypes that an optimizer's step takes."""
    types = jax.eval_shape(prepare, shards(params))
    return {
        name: jax.ShapeDtypeStruct(p.shape, types[name].dtype, sharding=p.sharding)
        for name, p in params.items()
    }


def state_of(tx: optax.GradientTransformation, params: Any) -> Any:
    """Return the shapes of the optimizer's state, sharded like the parameters if these are."""
    state = jax.eval_shape(tx.init, params)
    if shardings(params) is None:
        return state
    placed = optax_ext.state_shardings(tx, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        placed,
    )
