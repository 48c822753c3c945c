"""The units of a parameter tree, modules or leaves, with their connections and depths.

Connections and depths are read from names and shapes, or from the network's architecture.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optax_ext import _checks, _module_tree
from optax_ext.architecture import Architecture

Overrides = Mapping[str, Mapping[str, float]]


class Connection(NamedTuple):
    """One unit of the network.

    Attributes:
      path: path of the unit, its keys joined by "/".
      size: number of its parameters.
      connections: number of its connections; `None` if the unit has none and is left out.
      depth: its index, or its depth in the architecture; `None` if the unit is left out.
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
    """Return the units in order, and for every leaf the index of its unit (-1 for `None`)."""
    named = _named_floats(params)
    shapes = {path: jnp.shape(x) for path, x in named if x is not None}
    if architecture is None:
        leaves = _leaves_by_shape(shapes, units)
    else:
        leaves = {path: _leaf(path, shape, architecture) for path, shape in shapes.items()}
    unit_of = _units_by_module(leaves) if units == "module" else {path: path for path in leaves}
    members: dict[str, list[_Leaf]] = {}
    for path, unit in unit_of.items():
        members.setdefault(unit, []).append(leaves[path])
    unknown = set(overrides) - set(members)
    if members and unknown:
        known = ", ".join(map(repr, members))
        raise ValueError(f"overrides names {sorted(unknown)}, which are not among {known}")

    order = list(members) if units == "leaf" else sorted(members, key=_module_tree.natural)
    found, index = [], 0
    for path in order:
        unit = _unit(path, members[path], units, index)
        index += unit.connections is not None
        found.append(unit._replace(**overrides.get(path, {})))
    position = {path: i for i, path in enumerate(order)}
    return found, [-1 if x is None else position[unit_of[path]] for path, x in named]


class _Leaf(NamedTuple):
    """A leaf of a unit; its depth is `None` if only the unit's place in the tree is known."""

    shape: _module_tree.Shape
    connections: float | None
    depth: float | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _named_floats(params: optax.Params | None) -> list[tuple[str, Any]]:
    if params is None:
        raise ValueError("params must be a tree of arrays, got None")
    named = _module_tree.named_arrays(params)
    _checks.float_leaves(params=params)
    return named


def _leaf(path: str, shape: _module_tree.Shape, architecture: Architecture) -> _Leaf:
    if path not in architecture:
        known = ", ".join(map(repr, list(architecture)[:4]))
        raise ValueError(f"architecture lacks the parameter {path!r}; it has {known}, ...")
    placed = architecture[path]
    return _Leaf(shape, placed.connections, placed.depth)


def _leaves_by_shape(shapes: dict[str, _module_tree.Shape], units: str) -> dict[str, _Leaf]:
    """Return the leaves; a kernel has as many connections as elements."""
    if units == "leaf":  # the authors' rule
        kernels = {path for path, shape in shapes.items() if len(shape) > 1}
    else:
        kernels = {
            paths[i]
            for paths in _module_tree.modules(shapes).values()
            for i in _module_tree.kernels_by_shape([shapes[path] for path in paths])
        }
    return {
        path: _Leaf(shape, math.prod(shape) if path in kernels else None, None)
        for path, shape in shapes.items()
    }


def _units_by_module(leaves: dict[str, _Leaf]) -> dict[str, str]:
    """Return the unit of every leaf: its module, or its kernel if the module has several."""
    unit_of: dict[str, str] = {}
    for module, paths in _module_tree.modules(leaves).items():
        inside = [leaves[path] for path in paths]
        kernels = [i for i, leaf in enumerate(inside) if leaf.connections is not None]
        shapes, depths = [leaf.shape for leaf in inside], [leaf.depth or 0 for leaf in inside]
        goes_with = _module_tree.kernels_of(paths, shapes, kernels, depths)
        for path, kernel in zip(paths, goes_with, strict=True):
            unit_of[path] = module if kernel is None or len(kernels) == 1 else paths[kernel]
    return unit_of


def _unit(path: str, leaves: list[_Leaf], units: str, index: int) -> Connection:
    """Return the unit of `leaves`: their total connections, and their smallest depth or `index`."""
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
