"""The module tree as paths tell it: names of leaves and of modules, order, kernels by shape."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

_VALUE = (jax.tree_util.GetAttrKey("value"),)


def named_leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Keys and value of every leaf, also of `None`.

    A `.value` that is all that its parent holds, as Flax's variables do, is not a level.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    below = Counter(keys[:n] for keys, _ in leaves for n in range(len(keys)))
    named = [
        (keys[:-1] if keys[-1:] == _VALUE and below[keys[:-1]] == 1 else keys, leaf)
        for keys, leaf in leaves
    ]
    first: dict[str, Any] = {}
    for keys, _ in named:
        path = leaf_path(keys)
        if path in first:
            raise ValueError(
                f"params must have a path of its own for every leaf, got {path!r} for"
                f" {jax.tree_util.keystr(first[path])} and {jax.tree_util.keystr(keys)}"
            )
        first[path] = keys
    return named


def leaf_path(keys: Sequence[Any]) -> str:
    """The keys joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def module_path(keys: Sequence[Any]) -> str:
    """The path of the leaf's parent."""
    return leaf_path(keys[:-1])


def natural(path: str) -> list[tuple[int, int, str]]:
    """Sorts conv2 before conv10."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def connections_by_shape(shape: Sequence[int]) -> int | None:
    """A kernel, which has more than one axis, has as many connections as elements; others none."""
    return math.prod(shape) if len(shape) > 1 else None
