"""The units of a parameter tree, modules or leaves, with their connections and depths.

Both are read from names and shapes, or from the network's architecture.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optax_ext import _paths
from optax_ext.network import Architecture

Overrides = Mapping[str, Mapping[str, float]]


class Connection(NamedTuple):
    """One unit of the network.

    Attributes:
      path: path of the unit, its keys joined by "/".
      size: number of its parameters.
      connections: number of its connections, `None` if it has none and is left out.
      depth: its index, or what the architecture says; `None` likewise.
      scale: the factor S on its rate.
    """

    path: str
    size: int
    connections: float | None
    depth: float | None
    scale: Any


def find_units(
    params: optax.Params, units: str, overrides: Overrides, architecture: Architecture | None
) -> tuple[list[Connection], list[int]]:
    """The units in order, and for every leaf the index of its unit (-1 for a `None` leaf)."""
    members: dict[str, list[_Member]] = {}
    of_leaf: list[str | None] = []
    for keys, leaf in _paths.named_leaves(params):
        path_of = _paths.module_path if units == "module" else _paths.leaf_path
        name = None if leaf is None else path_of(keys)
        of_leaf.append(name)
        if name is not None:
            members.setdefault(name, []).append(_member(keys, leaf, architecture))
    unknown = set(overrides) - set(members)
    if members and unknown:
        known = ", ".join(map(repr, members))
        raise ValueError(f"overrides names {sorted(unknown)}, which are not among {known}")

    order = list(members) if units == "leaf" else sorted(members, key=_paths.natural)
    found, index = [], 0
    for path in order:
        unit = _unit(path, members[path], units, index)
        index += unit.connections is not None
        found.append(unit._replace(**overrides.get(path, {})))
    position = {path: i for i, path in enumerate(order)}
    return found, [-1 if name is None else position[name] for name in of_leaf]


class _Member(NamedTuple):
    """A leaf of a unit; its depth is `None` if only the unit's place in the tree is known."""

    size: int
    connections: float | None
    depth: float | None


def _member(keys: Any, leaf: Any, architecture: Architecture | None) -> _Member:
    shape = jnp.shape(leaf)
    if architecture is None:
        return _Member(math.prod(shape), _paths.connections_by_shape(shape), None)
    path = _paths.leaf_path(keys)
    if path not in architecture:
        known = ", ".join(map(repr, list(architecture)[:4]))
        raise ValueError(
            f"architecture must hold every parameter, got none for {path!r} but for {known}, ..."
        )
    placed = architecture[path]
    return _Member(math.prod(shape), placed.connections, placed.depth)


def _unit(path: str, leaves: list[_Member], units: str, index: int) -> Connection:
    """The leaves' connections together; the depth of the first of them, or the index."""
    kernels = [leaf for leaf in leaves if leaf.connections is not None]
    counted = kernels or (leaves if units == "leaf" else [])
    depths = [leaf.depth for leaf in counted if leaf.depth is not None]
    return Connection(
        path=path,
        size=sum(leaf.size for leaf in leaves),
        connections=sum(leaf.connections or 0 for leaf in counted) if counted else None,
        depth=min(depths, default=index) if counted else None,
        scale=None,
    )
