"""The layout of one launch over many leaves: blocks of the grid, operands, results.

Each leaf is cut into spans of equally wide blocks. Leaves whose programs have equal bodies are
adjacent in the grid, and share one kernel body for each block width. Statistics take two launches:
every block writes its partial statistics to memory, then one launch for the whole phase combines
them.

A layout contains no values and no nodes of a graph, so equal launches have equal layouts.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.program import Body

# The warps that run a block of Mosaic's kernels. In a block of several rows, each has whole rows.
WARPS = 4
# The first operands of a launch: all scalars, as one float vector and one integer vector.
PACKS = ("float32", "int32")


@dataclass(frozen=True)
class Span:
    """Blocks of one width that are consecutive in a leaf and in the grid.

    Attributes:
      leaf: index of the leaf in the layout.
      first: index of the first element of the first block.
      blocks: number of blocks.
    """

    leaf: int
    first: int
    blocks: int


@dataclass(frozen=True)
class Group:
    """Spans of one width in leaves of one form: their blocks run the same code."""

    form: int
    width: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Slot:
    """The position of a form's scalar in the packs of a launch.

    Attributes:
      pack: index of the pack.
      start: index in the pack, of the first leaf's scalar if each leaf has one.
      per_leaf: whether each leaf has its own scalar.
      dtype: the dtype of the scalar.
    """

    pack: int
    start: int
    per_leaf: bool
    dtype: str

    def read(self, packs: Sequence[Any], which: Any) -> jax.Array:
        """Return the scalar of the form's leaf with index `which`."""
        value = packs[self.pack][self.start + which if self.per_leaf else self.start]
        return value != 0 if self.dtype == "bool" else value.astype(self.dtype)


@dataclass(frozen=True)
class Form:
    """Leaves of any size whose programs have the same body.

    Attributes:
      body: the body.
      sizes: the number of elements of each leaf.
      slots: the positions of the body's scalars.
    """

    body: Body
    sizes: tuple[int, ...]
    slots: tuple[Slot, ...]


class Leaf(NamedTuple):
    """A leaf of a launch: its body and its number of elements."""

    body: Body
    size: int


@dataclass(frozen=True)
class Layout:
    """The positions of one launch's leaves in its grid and among its operands.

    Attributes:
      forms: the leaves, form by form.
      widths: the widths of blocks, in decreasing order. A block of the last width may extend past a
        leaf's end.
    """

    forms: tuple[Form, ...]
    widths: tuple[int, ...]

    @cached_property
    def leaves(self) -> list[Leaf]:
        """All leaves, form by form."""
        return [Leaf(form.body, size) for form in self.forms for size in form.sizes]

    @cached_property
    def first(self) -> list[int]:
        """The index of each form's first leaf; then the number of leaves."""
        return _starts(len(form.sizes) for form in self.forms)

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of blocks, in the order of the grid."""
        return [*self._groups()]

    @cached_property
    def starts(self) -> list[int]:
        """The index in the grid of each span's first block; then the number of blocks."""
        return _starts(span.blocks for group in self.groups for span in group.spans)

    @cached_property
    def first_input(self) -> list[int]:
        """The index of each leaf's first input among the operands; then their number."""
        return [len(PACKS) + i for i in _starts(len(leaf.body.inputs) for leaf in self.leaves)]

    @cached_property
    def first_result(self) -> list[int]:
        """The index of each leaf's first stored result; then their number."""
        return _starts(len(leaf.body.stored) for leaf in self.leaves)

    @cached_property
    def columns(self) -> int:
        """The largest number of statistics of a leaf."""
        return max(len(form.body.reductions) for form in self.forms)

    @cached_property
    def blocks_of_leaves(self) -> list[int]:
        """The number of blocks of each leaf, over all widths."""
        counts = [0] * len(self.leaves)
        for group in self.groups:
            for span in group.spans:
                counts[span.leaf] += span.blocks
        return counts

    @cached_property
    def results(self) -> list[tuple[jax.ShapeDtypeStruct, int | None]]:
        """The shape of each stored result, and the index of the operand that it overwrites."""
        return [
            (
                jax.ShapeDtypeStruct((leaf.size // root.row,), jnp.dtype(root.dtype)),
                None if root.in_place is None else first + root.in_place,
            )
            for leaf, first in zip(self.leaves, self.first_input, strict=False)
            for root in leaf.body.stored
        ]

    def _groups(self) -> Iterator[Group]:
        for form in range(len(self.forms)):
            widths = self._widths(self.forms[form].body)
            spans: dict[int, list[Span]] = {width: [] for width in widths}
            for leaf in range(self.first[form], self.first[form + 1]):
                size, at = self.leaves[leaf].size, 0
                for width in widths:
                    whole, rest = divmod(size - at, width)
                    blocks = whole + (rest > 0 and width == widths[-1])
                    if blocks:
                        spans[width].append(Span(leaf, at, blocks))
                    at += whole * width
            yield from (Group(form, width, tuple(s)) for width, s in spans.items() if s)

    def _widths(self, body: Body) -> tuple[int, ...]:
        """Return the widths of a body's blocks.

        If blocks may not extend past a leaf's end, they have one row, or at least one for each
        warp.
        """
        if self.widths[-1] > 1 or not body.lengths:
            return self.widths
        row, (first, *rest) = body.longest_row, self.widths
        of_rows = (width if width >= WARPS * row else row for width in rest)
        return tuple(dict.fromkeys((max(first, WARPS * row), *of_rows)))


@dataclass(frozen=True)
class PartialReduction:
    """A launch that combines the partial statistics of a phase.

    Most statistics have one block. Those of a large leaf have several, and XLA combines their
    results.

    Attributes:
      rows: for each launch of the phase, the index of the block for its first statistic; then the
        number of blocks.
      table: for each block four integers: the index of the first part, the number of parts, the
        index of the reduction in `kinds`, and the index of the result.
      kinds: the reductions that occur.
      tiles: for each statistic, the number of its results, which are adjacent.
    """

    rows: tuple[int, ...]
    table: tuple[tuple[int, int, int, int], ...]
    kinds: tuple[str, ...]
    tiles: tuple[int, ...]


def _starts(counts: Any) -> list[int]:
    return [0, *itertools.accumulate(counts)]
