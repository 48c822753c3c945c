"""The module tree, read from paths: names of leaves and of modules, and their order."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax

_VALUE = (jax.tree_util.GetAttrKey("value"),)


def named_arrays(params: Any) -> list[tuple[str, Any]]:
    """Return path and array of every leaf of `params`, `None` included.

    Shapes (`jax.eval_shape`) and Python numbers count as arrays.
    """
    named = named_leaves(params)
    for path, leaf in named:
        if not (leaf is None or is_array(leaf) or isinstance(leaf, (int, float, complex))):
            where = f"for {path}" if path else "for params itself"
            raise ValueError(f"params must hold arrays only, got {leaf!r} {where}")
    return named


def is_array(leaf: Any) -> bool:
    """Return whether `leaf` has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return path and value of every leaf, `None` included.

    The path omits a final `.value` if it is the only child of its parent, as in Flax's variables.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    below = Counter(keys[:n] for keys, _ in leaves for n in range(len(keys)))
    named: dict[str, tuple[Any, Any]] = {}
    for keys, leaf in leaves:
        alone = keys[-1:] == _VALUE and below[keys[:-1]] == 1
        path = leaf_path(keys[:-1] if alone else keys)
        if path in named:
            first, _ = named[path]
            raise ValueError(
                f"params must have a path of its own for every leaf, got {path!r} for"
                f" {jax.tree_util.keystr(first)} and {jax.tree_util.keystr(keys)}"
            )
        named[path] = keys, leaf
    return [(path, leaf) for path, (_, leaf) in named.items()]


def leaf_path(keys: Sequence[Any]) -> str:
    """Return the keys joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def module_path(path: str) -> str:
    """Return the path of the leaf's module: all before the last "/", or "." as in PyTorch."""
    return path[: max(path.rfind("/"), path.rfind("."), 0)]


def modules(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths of the leaves of each module."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(module_path(path), []).append(path)
    return found


def natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares numbers as numbers: conv2 comes before conv10."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
