"""The shardings of leaves, from arrays, from types or from the user."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# One sharding for all parameters, or a tree of shardings with the structure of the parameters.
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
    """Return the sharding of an array on a mesh, or of a tracer on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding  # even on one device, because all types contain it
    if isinstance(x, Tracer) or sharding.mesh.size == 1:
        return None  # unknown inside of `jit`, or only one device
    return sharding


def in_checked_shard_map(arrays: Iterable[Any]) -> bool:
    """Return whether a `shard_map` around the step checks how values vary (`check_vma=True`).

    A kernel's results don't say how they vary, so such a step has to run the chain.
    """
    axes = {axis for x in arrays for axis in jax.typeof(x).sharding.mesh.manual_axes}
    return any(jax.typeof(lax.axis_index(axis)).manual_axis_type.varying for axis in axes)


def of_parameters(params: Any, shardings: Shardings) -> dict[str, NamedSharding]:
    """Return the user's shardings by the paths of the parameters.

    As in `jit`, a sharding in place of a subtree applies to all parameters of the subtree.

    Raises:
      ValueError: a parameter has no sharding, a sharding has no parameter, or a leaf of `shardings`
        is not a valid sharding.
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
                f"shardings must have one for each parameter, but has none for {_name(path)}"
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
