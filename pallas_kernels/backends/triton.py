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

from pallas_kernels.backends.evaluate import COMBINE, REDUCE, evaluate, holds, identity_of
from pallas_kernels.layout import Layout, PartialReduction
from pallas_kernels.ops import TRITON
from pallas_kernels.program import Predicate

(BLOCK,) = TRITON.widths
# Parts of a statistic that a block combines at once: few steps, with many loads in flight each.
_PARTS = 4096
_VECTOR_BYTES = 16
_PARAMS = plt.CompilerParams(num_warps=4, num_stages=1)
# Kernels that are kept, so that `jit` lowers each only once: those of a few steps.
_KEPT = 256


def launch(
    layout: Layout, operands: Sequence[jax.Array], *, interpret: bool
) -> Sequence[jax.Array]:
    """Run one launch, as `protocol.Kernels` says."""
    return _make(layout, interpret)(*operands)


def reduce_partials(
    work: PartialReduction, parts: Sequence[jax.Array], *, interpret: bool
) -> jax.Array:
    """Add up partial statistics, as `protocol.Kernels` says."""
    add_up = _make_reduction(work.rows, work.kinds, len(work.table), interpret)
    (results,) = add_up(jnp.asarray(work.table, jnp.int32).reshape(-1), *parts)
    return results


@lru_cache(_KEPT)
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
        values = evaluate(body, arrays, scalars, (BLOCK,), TRITON)
        pairs = [*zip(body.roots, values, strict=True)]
        parts = [(root.reduction, value) for root, value in pairs if root.reduction]
        for k, (reduction, value) in enumerate(parts):
            neutral = jnp.full((BLOCK,), identity_of(reduction), jnp.float32)
            kept = jnp.where(jnp.arange(BLOCK) < valid, value.astype(jnp.float32), neutral)
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
        self, scalars: Sequence[jax.Array], leaf: int, index: Any, inside: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Return the block's part of each input, and how many elements are left in the leaf."""
        body, size = self.layout.leaves[leaf]
        blocks: list[jax.Array] = []
        for k, (dtype, needed) in enumerate(zip(body.inputs, body.loads, strict=True)):
            ref = self.sources[self.layout.first_input[leaf] + k]
            mask = _access_mask(inside, needed, scalars)
            if mask is None:
                blocks.append(ref[index])
            else:
                blocks.append(plt.load(ref.at[index], mask=mask, other=jnp.zeros((), dtype)))
        return (*blocks, jnp.int32(size) - index.start)

    def _store(
        self,
        scalars: Sequence[jax.Array],
        values: Sequence[jax.Array],
        leaf: int,
        index: Any,
        inside: jax.Array | None,
    ) -> tuple[()]:
        roots = self.layout.leaves[leaf].body.stored
        for k, (root, value) in enumerate(zip(roots, values, strict=True)):
            ref = self.targets[self.layout.first_result[leaf] + k]
            mask = _access_mask(inside, root.needed, scalars)
            if mask is None:
                ref[index] = value
            else:
                plt.store(ref.at[index], value, mask=mask)
        return ()

    def _on_leaf(self, access: Callable[[int, Any, jax.Array | None], Any]) -> Any:
        """Call `access(leaf, index, inside)` for the block's leaf.

        `inside` is the mask of elements inside of the leaf, or `None` if all are inside.
        """

        def on(leaf: int) -> Any:
            body, size = self.layout.leaves[leaf]
            first = (self.me - self.layout.starts[leaf]) * BLOCK
            index = pl.ds(first, BLOCK)
            if size % BLOCK == 0:
                return access(leaf, index, None)
            inside = first + jnp.arange(BLOCK) < size
            # A mask that can change inside of a vector makes Triton access single elements.
            vector = _VECTOR_BYTES // min(jnp.dtype(dtype).itemsize for dtype in body.inputs)
            if size < BLOCK or size % vector == 0:
                return access(leaf, index, inside)
            return lax.cond(
                first + BLOCK <= size,
                lambda: access(leaf, index, None),
                lambda: access(leaf, index, inside),
            )

        return _search(self.me, self._leaves, self.layout.starts, on)


@lru_cache(_KEPT)
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
                row = i * _PARTS + jnp.arange(_PARTS)
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


def _access_mask(
    inside: jax.Array | None, needed: Predicate | None, scalars: Sequence[jax.Array]
) -> Any:
    """Return the mask of an access, or `None` if all elements are always accessed."""
    if needed is None:
        return inside
    wanted = jnp.broadcast_to(holds(needed, scalars), (BLOCK,))
    return wanted if inside is None else inside & wanted
