"""Launches on Pallas' Mosaic GPU backend: many leaves in one grid, without masks.

Mosaic accesses either a vector with all threads of a warpgroup, or a single element. Neither access
has a mask. So a leaf is cut into blocks that never extend past its end: wide blocks, then blocks of
128 elements, then single elements. A block finds its leaf by comparing its index in the grid with
the constant bounds of the spans. Leaves whose programs have the same form share the code of the
computation. Only the loads and the stores have code for each leaf.

A leaf with rows is cut into blocks of whole rows, and then into single rows: `tile.py` has the
shape of a block.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backends.evaluate import (
    COMBINE,
    KERNEL_CACHE_SIZE,
    REDUCE,
    evaluate,
    holds,
    identity_of,
)
from pallas_kernels.backends.tile import LANES, Tile, load, reduce_to, shape_in_memory
from pallas_kernels.layout import Group, Layout, PartialReduction, Span
from pallas_kernels.ops import MOSAIC

# Partial statistics that one step of `reduce_partials` reads: few steps with many loads in flight.
_PARTIALS = 16 * LANES

_INTERPRETER = getattr(plgpu, "InterpretGPUParams", None)


def launch(
    layout: Layout, operands: Sequence[jax.Array], *, interpret: bool
) -> Sequence[jax.Array]:
    """Run one launch, as `protocol.Kernels` says."""
    return _make_launch(layout, interpret)(*operands)


@lru_cache(KERNEL_CACHE_SIZE)
def _make_launch(layout: Layout, interpret: bool) -> Callable[..., Any]:
    """Return a function of the operands, which `jit` lowers only once for equal layouts."""
    return jax.jit(lambda *operands: _launch(layout, operands, interpret=interpret))


def _launch(layout: Layout, operands: Sequence[jax.Array], *, interpret: bool) -> list[jax.Array]:
    operands = _reshape_inputs(layout, operands)
    in_place = {i: x for i, (_, x) in enumerate(layout.results) if x is not None}
    fresh = {i: x for i, x in enumerate(_shapes_of_results(layout)) if i not in in_place}

    def kernel(table: Any, *refs: Any) -> None:
        sources, new = refs[: len(operands)], refs[len(operands) :]
        targets = {i: sources[operand] for i, operand in in_place.items()}
        targets |= dict(zip(fresh, new, strict=True))
        _run_block(layout, table, sources, partial(_store_results, layout, table, targets))

    table = jnp.asarray(_table(layout), jnp.int32)
    call = partial(_make(kernel, layout.starts[-1], list(fresh.values()), interpret), table)
    if not in_place:
        return [x.reshape(-1) for x in call(*operands)]
    return _call_in_place(call, operands, fresh, in_place)


def _reshape_inputs(layout: Layout, operands: Sequence[jax.Array]) -> list[jax.Array]:
    # Mosaic's interpreter can't reshape an array inside of a kernel.
    packs = layout.first_input[0]
    shapes = [shape_in_memory(leaf, row) for leaf in layout.leaves for row in leaf.body.rows]
    inputs = [x.reshape(shape) for x, shape in zip(operands[packs:], shapes, strict=True)]
    return [*operands[:packs], *inputs]


def _shapes_of_results(layout: Layout) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the stored results, then that of the partial statistics, if any."""
    stored = [(leaf, root) for leaf in layout.leaves for root in leaf.body.stored]
    shapes = [
        jax.ShapeDtypeStruct(shape_in_memory(leaf, root.row), x.dtype)
        for (leaf, root), (x, _) in zip(stored, layout.results, strict=True)
    ]
    if layout.columns:  # padded, because `reduce_partials` reads whole vectors
        size = layout.columns * layout.starts[-1] + _PARTIALS
        shapes.append(jax.ShapeDtypeStruct((size,), jnp.float32))
    return shapes


def _store_results(
    layout: Layout,
    table: Any,
    targets: Mapping[int, Any],
    block: "_Block",
    scalars: Sequence[jax.Array],
    values: Sequence[jax.Array],
) -> None:
    """Store a block's results in `targets`, and its partial statistics in the last of them."""
    pairs = [*zip(layout.forms[block.group.form].body.roots, values, strict=True)]
    parts = [(root.reduction, x.astype(jnp.float32)) for root, x in pairs if root.reduction]
    for k, (reduction, value) in enumerate(parts):
        mine = k * layout.starts[-1] + block.me + block.look_up(table, _SHIFT)
        targets[len(layout.results)][mine] = reduce_to(0, value, REDUCE[reduction])
    stored = [(root, x.astype(root.dtype)) for root, x in pairs if not root.reduction]

    def store(leaf: int, at: jax.Array) -> Any:
        for k, (root, value) in enumerate(stored):
            target = targets[layout.first_result[leaf] + k]
            write = partial(block.tile.store, target, at, value)
            if root.needed is None:
                write()
            else:
                pl.when(holds(root.needed, scalars))(write)

    if stored:
        block.on_leaf(store)


def _call_in_place(
    call: Callable[..., Any],
    operands: Sequence[jax.Array],
    fresh: Mapping[int, jax.ShapeDtypeStruct],
    in_place: Mapping[int, int],
) -> list[jax.Array]:
    """Return the results of a call that overwrites operands; `fresh` are those that are new."""

    def run(state: Any) -> None:
        written, new = state
        arrays = [written.get(i, x) for i, x in enumerate(operands)]
        for i, x in zip(fresh, call(*arrays), strict=True):
            new[i][...] = x

    # `jax.new_ref` would be shorter, but the step would have to declare its effect.
    written, new = pl.run_state(run)(
        (
            {i: operands[i] for i in in_place.values()},
            {i: jnp.zeros(x.shape, x.dtype) for i, x in fresh.items()},
        )
    )
    new |= {i: written[operand] for i, operand in in_place.items()}
    return [new[i].reshape(-1) for i in sorted(new)]


def reduce_partials(
    work: PartialReduction, parts: Sequence[jax.Array], *, interpret: bool
) -> jax.Array:
    """Combine partial statistics, as `protocol.Kernels` says."""

    def kernel(*refs: Any) -> None:
        table, *sources, results = refs
        me = lax.axis_index("block")
        first, count, kind, index = (table[me * 4 + i] for i in range(4))

        def add_up(source: Any, reduction: str) -> None:
            layout = plgpu.Layout.WG_STRIDED((_PARTIALS,), vec_size=1)
            neutral = jnp.full((_PARTIALS,), identity_of(reduction), jnp.float32)
            neutral = plgpu.layout_cast(neutral, layout)
            lane = plgpu.layout_cast(lax.iota(jnp.int32, _PARTIALS), layout)

            def step(i: jax.Array, total: jax.Array) -> jax.Array:
                x = load(source.at[pl.ds(first + i * _PARTIALS, _PARTIALS)], layout)
                return COMBINE[reduction](
                    total, jnp.where(lane < count - i * _PARTIALS, x, neutral)
                )

            total = lax.fori_loop(0, (count + _PARTIALS - 1) // _PARTIALS, step, neutral)
            results[index] = REDUCE[reduction](total)

        source = _find_range(me, work.rows[:-1])
        branches = [partial(add_up, *each) for each in itertools.product(sources, work.kinds)]
        lax.switch(source * len(work.kinds) + kind, branches)

    shape = jax.ShapeDtypeStruct((len(work.table),), jnp.float32)
    table = jnp.asarray(work.table, jnp.int32).reshape(-1)
    (results,) = _make(kernel, len(work.table), [shape], interpret)(table, *parts)
    return results


def _make(
    kernel: Callable[..., None], blocks: int, out_type: Any, interpret: bool
) -> Callable[..., Any]:
    interpreter: Any = False
    if interpret:
        if _INTERPRETER is None:
            raise NotImplementedError(f"jax {jax.__version__} can't interpret Mosaic GPU kernels")
        interpreter = _INTERPRETER()
    return pl.kernel(
        kernel,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpreter,
    )


# The columns of the table in which a block looks up its span. `_WHICH` is the index of its leaf
# among those of the form. `_SHIFT` is the index of its partial statistics minus its index in the
# grid: the partial statistics of a leaf are adjacent, but its blocks are not.
_WHICH, _SHIFT = 0, 1
_COLUMNS = 2


def _table(layout: Layout) -> list[int]:
    counts = layout.blocks_of_leaves
    done = [0] * len(counts)
    table = []
    spans = ((group, span) for group in layout.groups for span in group.spans)
    for (group, span), start in zip(spans, layout.starts, strict=False):
        shift = sum(counts[: span.leaf]) + done[span.leaf] - start
        table += [span.leaf - layout.first[group.form], shift]
        done[span.leaf] += span.blocks
    return table


@dataclass(frozen=True)
class _Block:
    """A block of the grid; all blocks of a group run the same code.

    Attributes:
      me: its index in the grid.
      group: its group.
      first_span: the index of the group's first span among all spans.
      starts: for each span of the group, the index of its first block.
      span: the index of the block's span in the group.
      tile: the shapes of its values.
    """

    me: jax.Array
    group: Group
    first_span: int
    starts: Sequence[int]
    span: jax.Array
    tile: Tile

    def look_up(self, table: Any, column: int) -> jax.Array:
        """Return an entry of the table for the block's span."""
        return table[(self.first_span + self.span) * _COLUMNS + column]

    def on_leaf(self, access: Callable[[int, jax.Array], Any]) -> Any:
        """Call `access(leaf, at)` with the block's leaf and the index of its first element."""

        def in_span(span: Span, start: int) -> Any:
            return access(span.leaf, span.first + (self.me - start) * self.group.width)

        branches = [
            partial(in_span, *each) for each in zip(self.group.spans, self.starts, strict=True)
        ]
        return lax.switch(self.span, branches)


def _run_block(
    layout: Layout, table: Any, sources: Sequence[Any], store_results: Callable[..., Any]
) -> None:
    """Load this block's scalars and inputs, compute, and call `store_results`."""
    me = lax.axis_index("block")
    bounds = [0]
    for group in layout.groups:
        bounds.append(bounds[-1] + len(group.spans))

    def run_group(number: int) -> None:
        group = layout.groups[number]
        starts = layout.starts[bounds[number] : bounds[number + 1]]
        form = layout.forms[group.form]
        tile = Tile(group.width, form.body.lengths)
        block = _Block(me, group, bounds[number], starts, _find_range(me, starts), tile)
        which = block.look_up(table, _WHICH) if any(slot.per_leaf for slot in form.slots) else 0
        scalars = [slot.read(sources, which) for slot in form.slots]

        def load_inputs(leaf: int, at: jax.Array) -> Any:
            refs = sources[layout.first_input[leaf] : layout.first_input[leaf + 1]]
            each = zip(refs, form.body.rows, form.body.loads, strict=True)
            return tile.kept_apart(
                [tile.load_if(needed, scalars, ref, at, row) for ref, row, needed in each]
            )

        values = evaluate(form.body, block.on_leaf(load_inputs), scalars, tile, MOSAIC)
        store_results(block, scalars, values)

    starts_of_groups = [layout.starts[bound] for bound in bounds[:-1]]
    # One flat switch: lowering a cond lowers its first branch twice, and nesting multiplies this.
    lax.switch(
        _find_range(me, starts_of_groups),
        [partial(run_group, number) for number in range(len(layout.groups))],
    )


def _find_range(me: jax.Array, starts: Sequence[int]) -> jax.Array:
    """Return the index of the range that contains block `me`, given the starts of all ranges."""
    return sum((jnp.where(me >= start, 1, 0) for start in starts[1:]), jnp.int32(0))
