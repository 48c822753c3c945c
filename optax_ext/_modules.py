"""The leaves of one module: which of them are kernels, and with which kernel the others go."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile

Shape = tuple[int, ...]


def kernels_by_shape(shapes: Sequence[Shape]) -> list[int]:
    """Return the places of the kernels, as far as shapes tell.

    `scale_by_connections` states the rule.
    """
    ndims = Counter(map(len, shapes))
    return [i for i in range(len(shapes)) if _is_kernel(i, shapes, ndims)]


def _is_kernel(i: int, shapes: Sequence[Shape], ndims: Mapping[int, int]) -> bool:
    shape, ndim = shapes[i], len(shapes[i])
    if long_axes(shape) > 1:
        neighbours = (*shapes[max(i - 1, 0) : i], *shapes[i + 1 : i + 2])
        return not any(is_bias_of(shape, neighbour) for neighbour in neighbours)
    if ndim < 2 or (ndim > 2 and math.prod(shape) in (shape[0], shape[-1])):
        return False
    return 1 in ndims or (ndim == max(ndims) and ndims[ndim] == 1)


def long_axes(shape: Shape) -> int:
    """Return the number of axes that aren't of length 1, as those of broadcasting are."""
    return sum(length != 1 for length in shape)


def is_bias_of(shape: Shape, kernel: Shape) -> bool:
    """Return whether it is shaped as a kernel's output, in whichever layout."""
    return any(_fits(shape, kernel, output) for output in _OUTPUTS)


# The axis of a kernel's output features: the last in JAX's layouts, the first in PyTorch's.
_OUTPUTS = (-1, 0)


@cache
def _fits(shape: Shape, kernel: Shape, output: int) -> bool:
    """Return whether it has some of the kernel's axes, in order, the output's among them."""
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
    """Return for every leaf the place of the kernel that it goes with; of a kernel, its own.

    All leaves go with a single kernel. Of several, they go with one whose output they fit, `None`
    if there is none: the nearest in depth, then that of the most alike name, then the nearest
    before it, then the first after it. Outputs are last axes, or first ones if more fit these. In
    names, a number is one character.
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
    """Return how much of their beginnings and of their ends is the same."""
    return _in_common(a, b) + _in_common(a[::-1], b[::-1])


def _in_common(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
