"""The shardings of leaves, as arrays, types or the user give them."""

from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# One sharding for all parameters, or a tree of them like the parameters.
Shardings = Any


def check(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    """Refuse a sharding that does not cut the shape into equal parts."""
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{name} of shape {shape} can't be sharded by {sharding.spec} on {sharding.mesh}"
        ) from error


def of_value(x: Any) -> NamedSharding | None:
    """Return the sharding of an array, or of a tracer on an explicit mesh."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding  # of a single device too: its name is in all types
    if isinstance(x, Tracer) or sharding.mesh.size == 1:
        return None  # where `jit` will put it is not known yet
    return sharding


def of_parameters(params: Any, shardings: Shardings) -> dict[str, NamedSharding]:
    """Return the shardings that a user gives, by the paths of the parameters.

    As with `jit`, one that stands in place of a subtree is for all of its parameters.

    Raises:
      ValueError: one is missing, stands for no parameter, or is none.
    """
    given = {
        _keys(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings, is_leaf=_is_sharding)
    }
    found, used = {}, set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        keys = _keys(path)
        above = next((keys[:i] for i in range(len(keys) + 1) if keys[:i] in given), None)
        if above is None:
            raise ValueError(
                f"shardings must have one for each parameter, but none for {_name(path)}"
            )
        found[_name(path)] = _named(_name(path), given[above])
        used.add(above)
    for keys in given:
        if keys not in used and not (keys == () and _is_sharding(shardings)):
            raise ValueError(f"shardings has one for {'/'.join(keys)}, which is no parameter")
    return found


def _named(name: str, sharding: Any) -> NamedSharding:
    if isinstance(sharding, NamedSharding):
        return sharding
    if not isinstance(sharding, PartitionSpec):
        raise ValueError(
            f"shardings must be NamedSharding or PartitionSpec, got {sharding!r} for {name}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"a PartitionSpec in shardings needs jax.set_mesh around the step, got {sharding}"
            f" for {name}"
        )
    try:
        return NamedSharding(mesh, sharding)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} can't be sharded by {sharding} on {mesh}") from error


def _is_sharding(x: Any) -> bool:
    return isinstance(x, NamedSharding | PartitionSpec)


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(_name((key,)) for key in path)


_name = partial(jax.tree_util.keystr, simple=True, separator="/")
