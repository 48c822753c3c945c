"""The module tree of parameters, read from paths and shapes.

Paths say which module a leaf is in. Shapes say which leaves of a module are kernels, and which
kernel each of the others belongs to.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import Any

import jax

Shape = tuple[int, ...]
_VALUE = (jax.tree_util.GetAttrKey("value"),)


def named_arrays(params: Any) -> list[tuple[str, Any]]:
    """Return path and array of every leaf of `params`, `None` included.

    Shapes (`jax.eval_shape`) and Python numbers count as arrays.
    """
    named = named_leaves(params)
    for path, leaf in named:
        if not (leaf is None or is_array(leaf) or isinstance(leaf, (int, float, complex))):
            where = f"for {path}" if path else "for params itself"
            raise ValueError(f"params must contain arrays only, got {leaf!r} {where}")
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


def kernels_by_shape(shapes: Sequence[Shape]) -> list[int]:
    """Return the indices of the kernels, as far as shapes show them.

    The docstring of `scale_by_connections` has the rule.
    """
    ndims = Counter(map(len, shapes))
    return [i for i in range(len(shapes)) if _is_kernel(i, shapes, ndims)]


def _is_kernel(i: int, shapes: Sequence[Shape], ndims: Mapping[int, int]) -> bool:
    shape, ndim = shapes[i], len(shapes[i])
    if long_axes(shape) > 1:
        neighbours = (*shapes[max(i - 1, 0) : i], *shapes[i + 1 : i + 2])
        return not any(
            ndim < len(neighbour) and is_bias_of(shape, neighbour) for neighbour in neighbours
        )
    if ndim < 2 or (ndim > 2 and math.prod(shape) in (shape[0], shape[-1])):
        return False
    return 1 in ndims or (ndim == max(ndims) and ndims[ndim] == 1)


def long_axes(shape: Shape) -> int:
    """Return the number of axes whose length isn't 1."""
    return sum(length != 1 for length in shape)


def is_bias_of(shape: Shape, kernel: Shape) -> bool:
    """Return whether `shape` is that of the kernel's output, in JAX's or in PyTorch's layout."""
    return any(_fits(shape, kernel, output) for output in _OUTPUTS)


# The axis of a kernel's output features: the last in JAX's layouts, the first in PyTorch's.
_OUTPUTS = (-1, 0)


@cache
def _fits(shape: Shape, kernel: Shape, output: int) -> bool:
    """Return whether `shape` has some of the kernel's axes, in order, including the output."""
    axes = tuple(length for length in shape if length != 1) or shape[:1]
    left = iter(kernel)
    return (
        0 < len(axes) < len(kernel)
        and axes[output] == kernel[output]
        and all(length in left for length in axes)
    )


def kernels_of(
    names: Sequence[str],
    shapes: Sequence[Shape],
    kernels: Sequence[int],
    depths: Sequence[float],
) -> list[int | None]:
    """Return, for every leaf, the index of the kernel that it belongs to; kernels have their own.

    If there is one kernel, all leaves belong to it. If there are several, a leaf belongs to a
    kernel whose output it fits, and has `None` if it fits none. If it fits several, the nearest in
    depth is chosen, then the one with the most similar name, then the nearest before the leaf, then
    the first after it. The output is a kernel's last axis, or its first axis if more leaves fit
    that. When names are compared, a number counts as one character.
    """
    if len(kernels) == 1:
        return [kernels[0]] * len(names)
    others = [i for i in range(len(names)) if i not in kernels]
    parts = [re.findall(r"\d+|\D", name) for name in names]

    def fitting(i: int, output: int) -> list[int]:
        return [k for k in kernels if _fits(shapes[i], shapes[k], output)]

    output = max(_OUTPUTS, key=lambda output: sum(bool(fitting(i, output)) for i in others))

    def choose(i: int) -> int | None:
        def nearness(k: int) -> tuple[float, ...]:
            distance = abs(depths[k] - depths[i])
            return (-distance, _likeness(parts[k], parts[i]), k < i, k if k < i else -k)

        return max(fitting(i, output), key=nearness, default=None)

    return [choose(i) if i in others else i for i in range(len(names))]


def _likeness(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the common beginning plus the length of the common end."""
    return _in_common(a, b) + _in_common(a[::-1], b[::-1])


def _in_common(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
