"""The layout of one launch over many leaves: blocks of the grid, operands, results.

Each leaf is cut into spans of equally wide blocks. Leaves whose programs have the same form are
adjacent in the grid, and share one kernel body for each block width. Statistics take two launches:
every block writes its partial statistics to memory, then one launch for the whole phase adds them
up.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.program import Program
from pallas_kernels.trace import Node


@dataclass(frozen=True)
class Span:
    """Blocks of one width that are consecutive in a leaf and in the grid.

    Attributes:
      leaf: index of the leaf's program in the layout.
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
    """The position of a form's scalar in the packs of a layout.

    Attributes:
      pack: index of the pack.
      start: index in the pack, of the first leaf's scalar if each leaf has one.
      per_leaf: whether each leaf has its own scalar.
      dtype: the dtype of the scalar.
    """

    pack: int
    start: int
    per_leaf: bool
    dtype: Any

    def read(self, packs: Sequence[Any], which: Any) -> Any:
        """Return the scalar of the form's leaf with index `which`."""
        value = packs[self.pack][self.start + which if self.per_leaf else self.start]
        return value != 0 if self.dtype == bool else value.astype(self.dtype)


class Layout:
    """The positions of one launch's leaves in its grid and among its operands.

    Attributes:
      forms: for each form, its programs; they share kernel bodies.
      programs: all programs, form by form.
      first: for each form, the index of its first program; then the number of programs.
      groups: the groups of blocks, in the order of the grid.
      starts: for each span, the index of its first block in the grid; then the number of blocks.
      first_result: for each program, the index of its first result; then the number of results.
      columns: the largest number of statistics of a leaf.
      packs: all scalars, as one float vector and one integer vector.
      slots: for each form, the positions of its scalars.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        scalar: Callable[[Node], Any],
        widths: Sequence[int],
    ):
        """Cut leaves into blocks of decreasing `widths`; the last may extend past a leaf's end."""
        forms: dict[Any, list[Program]] = {}
        for program in programs:
            forms.setdefault(program.signature(), []).append(program)
        self.forms = list(forms.values())
        self.programs = [p for form in self.forms for p in form]
        self.first = [0, *itertools.accumulate(len(form) for form in self.forms)]
        self.groups = list(self._groups(widths))
        self.starts = [0, *itertools.accumulate(s.blocks for g in self.groups for s in g.spans)]
        self.first_result = [0, *itertools.accumulate(len(p.stored()) for p in self.programs)]
        self.columns = max(len(p.reduced()) for p in self.programs)
        self.packs, self.slots = self._pack(scalar)

    def cache_key(self) -> Any:
        """Return a key that is equal for launches that can share a kernel."""
        sizes = tuple(p.size for p in self.programs)
        forms = tuple((form[0].signature(), len(form)) for form in self.forms)
        return sizes, forms, tuple(map(tuple, self.slots))

    def _groups(self, widths) -> Iterator[Group]:
        for form in range(len(self.forms)):
            spans: dict[int, list[Span]] = {width: [] for width in widths}
            for leaf in range(self.first[form], self.first[form + 1]):
                size, at = self.programs[leaf].size, 0
                for width in widths:
                    whole, rest = divmod(size - at, width)
                    blocks = whole + (rest > 0 and width == widths[-1])
                    if blocks:
                        spans[width].append(Span(leaf, at, blocks))
                    at += whole * width
            yield from (Group(form, width, tuple(s)) for width, s in spans.items() if s)

    def _pack(self, scalar) -> tuple[list[Any], list[list[Slot]]]:
        floats: list[Any] = []
        integers: list[Any] = []
        slots = []
        for form in self.forms:
            slots.append([])
            for place, node in enumerate(form[0].scalars):
                floating = jnp.issubdtype(node.dtype, jnp.floating)
                values = [p.scalars[place] for p in form]
                shared = all(v is node for v in values)
                pack = floats if floating else integers
                slots[-1].append(Slot(0 if floating else 1, len(pack), not shared, node.dtype))
                pack += [scalar(v) for v in (values[:1] if shared else values)]
        packs = [
            jnp.stack([jnp.asarray(x, dtype).reshape(()) for x in pack or [0]])
            for pack, dtype in ((floats, jnp.float32), (integers, jnp.int32))
        ]
        return packs, slots

    def operands(self, array: Callable[[Node], jax.Array]) -> tuple[list[jax.Array], list[int]]:
        """Return all operands (packs, then inputs), and the index of each leaf's first input."""
        operands, offsets = list(self.packs), []
        for program in self.programs:
            offsets.append(len(operands))
            operands += [array(node) for node in program.inputs]
        return operands, offsets

    def results(self, offsets: Sequence[int]) -> list[tuple[jax.ShapeDtypeStruct, int | None]]:
        """Return for each stored result its shape, and the index of the operand it overwrites."""
        return [
            (
                jax.ShapeDtypeStruct((program.size,), root.dtype),
                None if root.in_place is None else offset + root.in_place,
            )
            for program, offset in zip(self.programs, offsets, strict=True)
            for _, root in program.stored()
        ]

    def statistics(self) -> list["Statistic"]:
        """Return the statistics of this launch, leaf by leaf."""
        counts = self.blocks_of_leaves()
        first = [0, *itertools.accumulate(counts)]
        return [
            Statistic(node, root.reduction, k, k * first[-1] + first[leaf], counts[leaf])
            for leaf, program in enumerate(self.programs)
            for k, (node, root) in enumerate(program.reduced())
        ]

    def blocks_of_leaves(self) -> list[int]:
        """Return the number of blocks of each leaf, over all widths."""
        counts = [0] * len(self.programs)
        for group in self.groups:
            for span in group.spans:
                counts[span.leaf] += span.blocks
        return counts


class Statistic(NamedTuple):
    """A statistic, and the position of its parts in the partial statistics of a launch.

    Attributes:
      node: the result.
      reduction: "sum", "max" or "min".
      column: its index among the statistics of its leaf.
      first: index of its first part.
      parts: number of parts.
    """

    node: Node
    reduction: str
    column: int
    first: int
    parts: int


class PartialReduction:
    """A launch that adds up the partial statistics of a phase, one block for each statistic.

    Attributes:
      rows: for each launch of the phase, the index of the block for its first statistic; then the
        number of blocks.
      table: for each block four integers: the index of the first part, the number of parts, the
        index of the reduction in `kinds`, and the index of the result in `nodes`.
      kinds: the reductions that occur.
      nodes: the results, in order.
    """

    def __init__(self, layouts: Sequence[Layout]):
        """Order results by column, then by creation, so that XLA can read them as whole slices."""
        statistics = [layout.statistics() for layout in layouts]
        self.rows = [0, *itertools.accumulate(map(len, statistics))]
        rows = [s for each in statistics for s in each]
        self.kinds = sorted({s.reduction for s in rows})
        order = sorted(rows, key=lambda s: (s.column, s.node.index))
        self.nodes = [s.node for s in order]
        places = {node: place for place, node in enumerate(self.nodes)}
        self.table = [
            (s.first, s.parts, self.kinds.index(s.reduction), places[s.node]) for s in rows
        ]
