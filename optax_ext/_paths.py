"""The module tree as paths tell it: names of leaves and of modules, order, kernels by shape."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax


def leaf_path(keys: Sequence[Any]) -> str:
    """The keys joined by "/"; the `.value` that Flax nnx adds is not a level."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def module_path(keys: Sequence[Any]) -> str:
    """The path of the leaf's parent."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return leaf_path(keys[:-1])


def natural(path: str) -> list[tuple[int, int, str]]:
    """Sorts conv2 before conv10."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def connections_by_shape(shape: Sequence[int]) -> int | None:
    """A kernel, which has more than one axis, has as many connections as elements; others none."""
    return math.prod(shape) if len(shape) > 1 else None
