"""Parts of parameters: where they stand in an array made of them, and what slices leave of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Unknown(NamedTuple):
    """A slice whose index isn't known: another at every place of the computation."""

    equation: int
    place: tuple[Any, ...]


class Cut(NamedTuple):
    """A slice along one axis: start, stop and stride within what there was of the parameter."""

    axis: int
    start: int
    stop: int
    stride: int


@dataclass(frozen=True)
class Part:
    """A parameter, or what slicing left of it.

    Attributes:
      leaf: index of the parameter.
      key: the slices that lead to it, from the whole, which is `()`.
      size: number of its elements.
      ndim: number of its axes.
      long_axes: number of those that aren't of length 1.
      total: number of elements of it and of those that stand beside it (concatenated).
      factor: whether it went into a product with other parameters.
      spans: axis, start and stop, where it doesn't fill the axis of the array.
      foreign: axes of the array that it has not: it is repeated along them, or one of a stack.
      flipped: axes along which it stands in reverse.
    """

    leaf: int
    key: tuple[Cut | Unknown, ...]
    size: int
    ndim: int
    long_axes: int
    total: int
    factor: bool = False
    spans: tuple[tuple[int, int, int], ...] = ()
    foreign: frozenset[int] = frozenset()
    flipped: frozenset[int] = frozenset()


Parts = frozenset[Part]


def kernels(parts: Iterable[Part]) -> set[Part]:
    """Return the largest leaf of an operand, and all factors, but no norms that rescale it."""
    parts = list(parts)
    largest = max((part.total for part in parts), default=0)
    return {part for part in parts if part.factor or part.total == largest}


def beside(operands: Sequence[Parts], lengths: Sequence[int], axis: int) -> Parts:
    """Concatenated along an axis. The kernels stand together, a row of biases beside them."""
    inside = [kernels(parts) for parts in operands]
    ndim = max((part.ndim for parts in inside for part in parts), default=0)
    inside = [{part for part in parts if part.ndim == ndim} for parts in inside]
    total = sum(max((part.total for part in parts), default=0) for parts in inside)
    placed, offset = set[Part](), 0
    for parts, own, length in zip(operands, inside, lengths, strict=True):
        for part in parts:
            start, stop = _span(part, axis, length)
            moved = _spanning(part, axis, offset + start, offset + stop, sum(lengths))
            placed.add(replace(moved, total=total) if part in own else moved)
        offset += length
    return frozenset(placed)


def sliced(
    parts: Parts, axis: int, length: int, index: range | Unknown, size: int
) -> Iterable[Part]:
    """Return what a slice of `size` along an axis leaves of the parts that it meets."""
    for part in parts:
        left = _met(part, axis, length, index) if isinstance(index, range) else None
        if isinstance(index, Unknown):
            left = _met_somewhere(part, axis, length, index, size)
        if left is not None:
            yield left


def _met(part: Part, axis: int, length: int, index: range) -> Part | None:
    first, last = _span(part, axis, length)
    at, end = (
        min(max(-((index.start - bound) // index.step), 0), len(index)) for bound in (first, last)
    )
    inside = index[at:end]
    if not inside:
        return None
    start, stop, count = inside[0] - first, inside[-1] - first, len(inside)
    own, total = last - first, part.total
    if axis in part.flipped:
        start, stop = own - 1 - stop, own - 1 - start
    if axis not in part.foreign or any(span[0] == axis for span in part.spans):
        total = total * len(index) // length
    placed = _spanning(replace(part, total=total), axis, at, at + count, len(index))
    if axis in part.foreign or count == own:
        return placed
    cut = Cut(axis, start, stop + 1, index.step if count > 1 else 1)
    return _shortened(replace(placed, key=(*part.key, cut)), count, own)


def _met_somewhere(part: Part, axis: int, length: int, index: Unknown, size: int) -> Part:
    first, last = _span(part, axis, length)
    anywhere = _spanning(part, axis, 0, length, length)
    if axis in part.foreign:
        return replace(anywhere, total=part.size)
    own = last - first
    left = _shortened(replace(anywhere, key=(*part.key, index)), min(size, own), own)
    return replace(left, total=left.size)


def _shortened(part: Part, length: int, before: int) -> Part:
    """Return the part with an axis of another length than before."""
    became_one = length == 1 < before
    size = part.size * length // before
    return replace(part, size=size, long_axes=part.long_axes - became_one)


def moved(parts: Parts, axes: Mapping[int, int], new: Iterable[int] = ()) -> Parts:
    """With axes renumbered; what isn't named is lost, and `new` ones are foreign to all."""
    return frozenset(
        replace(
            part,
            spans=tuple(sorted((axes[a], *span) for a, *span in part.spans if a in axes)),
            foreign=frozenset(axes[a] for a in part.foreign if a in axes).union(new),
            flipped=frozenset(axes[a] for a in part.flipped if a in axes),
        )
        for part in parts
    )


def flipped(parts: Parts, axis: int, length: int) -> Parts:
    """In reverse along an axis."""
    found = set[Part]()
    for part in parts:
        start, stop = _span(part, axis, length)
        there = _spanning(part, axis, length - stop, length - start, length)
        found.add(replace(there, flipped=part.flipped ^ {axis}))
    return frozenset(found)


def squeezed(parts: Parts, ndim: int, lost: Sequence[int], stacked: bool = False) -> Parts:
    """Without these axes. Of a slice (or a stack) what remains is one of the stacked."""
    kept = [axis for axis in range(ndim) if axis not in lost]
    fewer = {
        replace(part, ndim=part.ndim - len(set(lost) - part.foreign))
        if part.key or stacked
        else part
        for part in parts
    }
    return moved(frozenset(fewer), {axis: i for i, axis in enumerate(kept)})


def row(parts: Parts, ndim: int, i: int, length: int) -> Parts:
    """Return the i-th of the stacked parts."""
    found = frozenset(sliced(parts, 0, length, range(i, i + 1), 1))
    return squeezed(found, ndim, [0], stacked=True)


def stacked(arrays: Sequence[Parts], ndim: int, axis: int = 0) -> Parts:
    """Along a new axis of arrays that have `ndim` others; a single one is repeated."""
    others = {old: old + (old >= axis) for old in range(ndim)}
    lifted = [moved(parts, others, new=[axis]) for parts in arrays]
    return lifted[0] if len(lifted) == 1 else beside(lifted, [1] * len(lifted), axis)


def _span(part: Part, axis: int, length: int) -> tuple[int, int]:
    return next(((start, stop) for a, start, stop in part.spans if a == axis), (0, length))


def _spanning(part: Part, axis: int, start: int, stop: int, length: int) -> Part:
    others = [span for span in part.spans if span[0] != axis]
    if (start, stop) != (0, length):
        others.append((axis, start, stop))
    return replace(part, spans=tuple(sorted(others)))
