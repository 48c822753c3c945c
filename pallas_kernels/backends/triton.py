"""Launches on Pallas' Triton backend: many leaves in one grid.

Every leaf has a range of blocks in the grid. A block finds its leaf by a binary search over these
ranges, whose bounds are constants. Then it loads its part of the leaf's arrays, computes, and
stores. Leaves whose programs have the same form share the code of the computation. Only the search,
the loads and the stores have code for each leaf.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.backends.evaluate import (
    COMBINE,
    KERNEL_CACHE_SIZE,
    REDUCE,
    evaluate,
    holds,
    identity_of,
)
from pallas_kernels.layout import Layout, PartialReduction
from pallas_kernels.ops import TRITON
from pallas_kernels.program import Predicate

(BLOCK,) = TRITON.widths
# Parts of a statistic that a block combines at once: few steps, with many loads in flight each.
_PARTS = 4096
_VECTOR_BYTES = 16
_PARAMS = plt.CompilerParams(num_warps=4, num_stages=1)


def launch(
    layout: Layout, operands: Sequence[jax.Array], *, interpret: bool
) -> Sequence[jax.Array]:
    """Run one launch, as `protocol.Kernels` says."""
    return _make(layout, interpret)(*operands)


def reduce_partials(
    work: PartialReduction, parts: Sequence[jax.Array], *, interpret: bool
) -> jax.Array:
    """Combine partial statistics, as `protocol.Kernels` says."""
    add_up = _make_reduction(work.rows, work.kinds, len(work.table), interpret)
    (results,) = add_up(jnp.asarray(work.table, jnp.int32).reshape(-1), *parts)
    return results


@lru_cache(KERNEL_CACHE_SIZE)
def _make(layout: Layout, interpret: bool) -> Callable[..., Any]:
    shapes = [shape for shape, _ in layout.results]
    aliases = {operand: i for i, (_, operand) in enumerate(layout.results) if operand is not None}
    if layout.columns:
        shapes.append(jax.ShapeDtypeStruct((layout.columns * layout.starts[-1],), jnp.float32))

    def kernel(*refs: Any) -> None:
        sources, targets = refs[: layout.first_input[-1]], refs[layout.first_input[-1] :]
        me = pl.program_id(0)
        starts = [layout.starts[first] for first in layout.first]
        _search(
            me,
            range(len(layout.forms)),
            starts,
            lambda form: _Block(layout, form, me, sources, targets).run(),
        )

    return jax.jit(
        pl.pallas_call(
            kernel,
            grid=(layout.starts[-1],),
            out_shape=shapes,
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=_PARAMS,
        )
    )


@dataclass(frozen=True)
class _Block:
    """A block of the grid, whose leaf has a known form.

    Attributes:
      layout: the layout of the launch.
      form: the index of the form.
      me: the index of the block in the grid.
      sources, targets: the launch's operands and results in memory.
    """

    layout: Layout
    form: int
    me: jax.Array
    sources: Sequence[Any]
    targets: Sequence[Any]

    def run(self) -> tuple[()]:
        """Load the block, compute, and store the results."""
        body, scalars = self.layout.forms[self.form].body, self._scalars()
        *arrays, valid = self._on_leaf(partial(self._load, scalars))
        values = evaluate(body, arrays, scalars, _VectorShape(), TRITON)
        pairs = [*zip(body.roots, values, strict=True)]
        parts = [(root.reduction, root.row, x) for root, x in pairs if root.reduction]
        for k, (reduction, row, value) in enumerate(parts):
            neutral = jnp.full(value.shape, identity_of(reduction), jnp.float32)
            inside = lax.iota(jnp.int32, value.size) * row < valid
            kept = jnp.where(inside, value.astype(jnp.float32), neutral)
            self.targets[-1][k * self.layout.starts[-1] + self.me] = REDUCE[reduction](kept)
        stored = [value.astype(root.dtype) for root, value in pairs if not root.reduction]
        if stored:
            self._on_leaf(partial(self._store, scalars, stored))
        return ()

    @property
    def _leaves(self) -> range:
        return range(self.layout.first[self.form], self.layout.first[self.form + 1])

    def _scalars(self) -> list[jax.Array]:
        slots, which = self.layout.forms[self.form].slots, 0
        if any(slot.per_leaf for slot in slots):
            zero, first = jnp.minimum(self.me, 0), self._leaves[0]
            which = _search(
                self.me, self._leaves, self.layout.starts, lambda leaf: zero + (leaf - first)
            )
        return [slot.read(self.sources, which) for slot in slots]

    def _load(
        self, scalars: Sequence[jax.Array], leaf: int, access: "_Access"
    ) -> tuple[jax.Array, ...]:
        """Return the block's part of each input, and how many elements are left in the leaf."""
        body, size = self.layout.leaves[leaf]
        blocks: list[jax.Array] = []
        for k, (dtype, row, needed) in enumerate(
            zip(body.inputs, body.rows, body.loads, strict=True)
        ):
            ref = self.sources[self.layout.first_input[leaf] + k]
            index, mask = access.index(row), access.mask(row, needed, scalars)
            if mask is None:
                blocks.append(ref[index])
            else:
                blocks.append(plt.load(ref.at[index], mask=mask, other=jnp.zeros((), dtype)))
        return (*blocks, jnp.int32(size) - access.first)

    def _store(
        self,
        scalars: Sequence[jax.Array],
        values: Sequence[jax.Array],
        leaf: int,
        access: "_Access",
    ) -> tuple[()]:
        roots = self.layout.leaves[leaf].body.stored
        for k, (root, value) in enumerate(zip(roots, values, strict=True)):
            ref = self.targets[self.layout.first_result[leaf] + k]
            index, mask = access.index(root.row), access.mask(root.row, root.needed, scalars)
            if mask is None:
                ref[index] = value
            else:
                plt.store(ref.at[index], value, mask=mask)
        return ()

    def _on_leaf(self, access: Callable[[int, "_Access"], Any]) -> Any:
        """Call `access(leaf, ...)` for the block's leaf."""

        def on(leaf: int) -> Any:
            body, size = self.layout.leaves[leaf]
            first = (self.me - self.layout.starts[leaf]) * BLOCK
            whole, ragged = _Access(first, None), _Access(first, size)
            if size % BLOCK == 0:
                return access(leaf, whole)
            # A mask that can change inside of a vector makes Triton access single elements.
            vector = _VECTOR_BYTES // min(jnp.dtype(dtype).itemsize for dtype in body.inputs)
            if size < BLOCK or size % vector == 0:
                return access(leaf, ragged)
            return lax.cond(
                first <= size - BLOCK,  # the sum would overflow near 2^31
                lambda: access(leaf, whole),
                lambda: access(leaf, ragged),
            )

        return _search(self.me, self._leaves, self.layout.starts, on)


@lru_cache(KERNEL_CACHE_SIZE)
def _make_reduction(
    rows: tuple[int, ...], kinds: tuple[str, ...], blocks: int, interpret: bool
) -> Callable[..., Any]:
    def kernel(*refs: Any) -> None:
        table, *sources, results = refs
        me = pl.program_id(0)
        first, count, kind, index = (table[me * 4 + i] for i in range(4))

        def add_up(source: Any, reduction: str) -> jax.Array:
            neutral = jnp.full((_PARTS,), identity_of(reduction), jnp.float32)

            def step(i: jax.Array, total: jax.Array) -> jax.Array:
                row = i * _PARTS + lax.iota(jnp.int32, _PARTS)
                x = plt.load(source.at[first + row], mask=row < count, other=neutral)
                return COMBINE[reduction](total, x)

            total = lax.fori_loop(0, (count + _PARTS - 1) // _PARTS, step, neutral)
            return REDUCE[reduction](total)

        def add_up_from(launch: int) -> jax.Array:
            branches = [partial(add_up, sources[launch], reduction) for reduction in kinds]
            return lax.switch(kind, branches)

        results[index] = _search(me, range(len(sources)), rows, add_up_from)

    return jax.jit(
        pl.pallas_call(
            kernel,
            grid=(blocks,),
            out_shape=[jax.ShapeDtypeStruct((blocks,), jnp.float32)],
            interpret=interpret,
            compiler_params=_PARAMS,
        )
    )


def _search(
    me: jax.Array, candidates: range, starts: Sequence[int], found: Callable[[int], Any]
) -> Any:
    """Call `found(i)` for the candidate `i` whose range of blocks contains block `me`."""
    if len(candidates) == 1:
        return found(candidates[0])
    middle = len(candidates) // 2
    return lax.cond(
        me < starts[candidates[middle]],
        lambda: _search(me, candidates[:middle], starts, found),
        lambda: _search(me, candidates[middle:], starts, found),
    )


class _VectorShape:
    """The `evaluate.BlockShape` of all blocks: vectors, which are shorter for rows."""

    def shape(self, row: int) -> tuple[int, ...]:
        return (BLOCK // row,)

    def spread(self, x: jax.Array, row: int) -> jax.Array:
        return jnp.broadcast_to(x[:, None], (x.size, BLOCK // row // x.size)).reshape(-1)

    def reduce(self, x: jax.Array, row: int, reduce: Callable[..., jax.Array]) -> jax.Array:
        return reduce(x.reshape(BLOCK // row, -1), axis=1)


@dataclass(frozen=True)
class _Access:
    """The elements of a leaf that a block accesses.

    Attributes:
      first: the index of the first element.
      size: the size of the leaf; `None` if all elements of the block are inside of it.
    """

    first: jax.Array
    size: int | None

    def index(self, row: int) -> Any:
        """Return the index into an array that has an element for each `row` elements."""
        return pl.ds(self._first(row), BLOCK // row)

    def mask(self, row: int, needed: Predicate | None, scalars: Sequence[jax.Array]) -> Any:
        """Return the mask of an access, or `None` if all elements are always accessed."""
        inside = None
        if self.size is not None:
            inside = self._first(row) + lax.iota(jnp.int32, BLOCK // row) < self.size // row
        if needed is None:
            return inside
        wanted = jnp.broadcast_to(holds(needed, scalars), (BLOCK // row,))
        return wanted if inside is None else inside & wanted

    def _first(self, row: int) -> jax.Array:
        return self.first if row == 1 else lax.div(self.first, jnp.int32(row))
