"""Launches on Pallas' Mosaic GPU backend: many leaves in one grid, without masks.

Mosaic accesses vectors of whole warpgroups or single elements, all of them or none. So a leaf is
cut into blocks that exist to their ends: wide ones, then some of 128 elements, then single
elements. A block finds its leaf by comparing its place with the constant bounds of the spans.
Leaves with programs of one form share the computation; only access is per leaf.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ops
from pallas_kernels.layout import Group, Layout, PartialReduction
from pallas_kernels.ops import FLOATS, INTEGERS, Operations
from pallas_kernels.program import COMBINE, REDUCE, Predicate, evaluate, identity_of

_LANES = 128  # threads of a warpgroup
_VECTOR = 4  # elements that a thread of a wide block accesses at once
WIDTHS = (_LANES * _VECTOR, _LANES, 1)
# Partial statistics that one step of `reduce_partials` reads: few steps with many loads in flight.
_PARTIALS = 16 * _LANES

_BEFORE_0_11 = jax.__version_info__ < (0, 11)
_STORE = getattr(plgpu, "store", None)
_INTERPRETER = getattr(plgpu, "InterpretGPUParams", None)


def _sqrt(x: jax.Array, **_: Any) -> jax.Array:
    return jnp.where((x == 0) | (x == jnp.inf), x, x * lax.rsqrt(x))


_MISSING = ("cbrt", "expm1", "log1p", "nextafter", "pow", "reduce_precision", "tan")
OPERATIONS = Operations(
    missing=dict.fromkeys(_MISSING, FLOATS)
    | {"div": INTEGERS, "rem": FLOATS | INTEGERS},  # by 0 they are not XLA's
    rewritten={"ceil": ops.ceil_by_round, "floor": ops.floor_by_round}
    | ({"sqrt": _sqrt} if _BEFORE_0_11 else {}),
    in_memory=FLOATS | INTEGERS,
)


def launch(
    layout: Layout,
    operands: Sequence[jax.Array],
    offsets: Sequence[int],
    kernel_cache: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Run one launch, as Triton's `launch` does; none is reused."""
    del kernel_cache
    results, blocks = layout.results(offsets), layout.starts[-1]
    fresh = {i: shape for i, (shape, operand) in enumerate(results) if operand is None}
    in_place = {i: operand for i, (_, operand) in enumerate(results) if operand is not None}
    if layout.columns:  # `reduce_partials` reads whole vectors, past the last statistic too
        parts = jax.ShapeDtypeStruct((layout.columns * blocks + _PARTIALS,), jnp.float32)
        fresh[len(results)] = parts

    def kernel(table, *refs):
        sources, new = refs[: len(operands)], refs[len(operands) :]
        targets = {place: sources[i] for place, i in in_place.items()}
        targets |= dict(zip(fresh, new, strict=True))

        def store_results(block, scalars, values):
            pairs = [*zip(layout.forms[block.group.form][0].roots, values, strict=True)]
            parts = [(root.reduction, x.astype(jnp.float32)) for root, x in pairs if root.reduction]
            for k, (reduction, value) in enumerate(parts):
                mine = k * blocks + block.me + block.look_up(table, _SHIFT)
                new[-1][mine] = REDUCE[reduction](value) if value.shape else value
            stored = [(root, x.astype(root.dtype)) for root, x in pairs if not root.reduction]

            def store(leaf, at):
                for k, (root, value) in enumerate(stored):
                    write = partial(_store, targets[layout.first_result[leaf] + k], at, value)
                    if root.needed is None:
                        write()
                    else:
                        pl.when(_holds(root.needed, scalars))(write)

            if stored:
                block.on_leaf(store)

        _run_block(layout, table, sources, offsets, store_results)

    table = jnp.asarray(_table(layout), jnp.int32)
    call = _make(kernel, blocks, list(fresh.values()), interpret)
    if not in_place:
        return list(call(table, *operands))

    def run(state):
        written, new = state
        arrays = [written.get(i, x) for i, x in enumerate(operands)]
        for place, x in zip(fresh, call(table, *arrays), strict=True):
            new[place][...] = x

    # `jax.new_ref` would be shorter, but its effect can't pass the `custom_jvp` around a step.
    written, new = pl.run_state(run)(
        (
            {i: operands[i] for i in in_place.values()},
            {place: jnp.zeros(x.shape, x.dtype) for place, x in fresh.items()},
        )
    )
    new |= {place: written[i] for place, i in in_place.items()}
    return [new[place] for place in sorted(new)]


def reduce_partials(
    work: PartialReduction,
    parts: Sequence[jax.Array],
    kernel_cache: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> jax.Array:
    """Add up the partial statistics of a phase, as Triton's `reduce_partials` does."""
    del kernel_cache

    def kernel(*refs):
        table, *sources, results = refs
        me = lax.axis_index("block")
        first, count, kind, place = (table[me * 4 + i] for i in range(4))

        def add_up(source, reduction):
            neutral = _strided(jnp.full((_PARTIALS,), identity_of(reduction), jnp.float32))
            lane = _strided(lax.iota(jnp.int32, _PARTIALS))

            def step(i, total):
                x = _load(source, first + i * _PARTIALS, _PARTIALS, vector=1)
                return COMBINE[reduction](
                    total, jnp.where(lane < count - i * _PARTIALS, x, neutral)
                )

            total = lax.fori_loop(0, (count + _PARTIALS - 1) // _PARTIALS, step, neutral)
            results[place] = REDUCE[reduction](total)

        source = _count_passed(me, work.rows[:-1])
        branches = [partial(add_up, *each) for each in itertools.product(sources, work.kinds)]
        lax.switch(source * len(work.kinds) + kind, branches)

    shape = jax.ShapeDtypeStruct((len(work.table),), jnp.float32)
    table = jnp.asarray(work.table, jnp.int32).reshape(-1)
    (results,) = _make(kernel, len(work.table), [shape], interpret)(table, *parts)
    return results


def _make(kernel, blocks: int, out_type, interpret: bool) -> Callable[..., Any]:
    if interpret and _INTERPRETER is None:
        raise NotImplementedError(f"jax {jax.__version__} can't interpret Mosaic GPU kernels")
    return pl.kernel(
        kernel,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_INTERPRETER() if interpret and _INTERPRETER else False,
    )


# What a block looks up for its span: which of the form's leaves it lies in, and the way from its
# place in the grid to that of its partial statistics, where each leaf's lie side by side.
_WHICH, _SHIFT, _COLUMNS = range(3)


def _table(layout: Layout) -> list[int]:
    counts = layout.blocks_of_leaves()
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
    """A block of the grid, in code that is the same for all blocks of its group.

    Attributes:
      me: its place in the grid.
      group: what it belongs to.
      first_span: the group's first one, among all of the grid.
      starts: the first block of each of the group's spans.
      span: which of these spans it lies in.
    """

    me: jax.Array
    group: Group
    first_span: int
    starts: Sequence[int]
    span: jax.Array

    def look_up(self, table, column: int) -> jax.Array:
        """Return an entry of the table for the block's span."""
        return table[(self.first_span + self.span) * _COLUMNS + column]

    def on_leaf(self, access: Callable[[int, jax.Array], Any]) -> Any:
        """Call `access(leaf, at)` for the block's leaf and its first element there."""

        def in_span(span, start):
            return access(span.leaf, span.first + (self.me - start) * self.group.width)

        branches = [
            partial(in_span, *each) for each in zip(self.group.spans, self.starts, strict=True)
        ]
        return lax.switch(self.span, branches)


def _run_block(layout: Layout, table, sources, offsets, store_results) -> None:
    """Load what this block needs, compute, and call `store_results` with the values."""
    me = lax.axis_index("block")
    bounds = [0]
    for group in layout.groups:
        bounds.append(bounds[-1] + len(group.spans))

    def run_group(number):
        group = layout.groups[number]
        starts = layout.starts[bounds[number] : bounds[number + 1]]
        block = _Block(me, group, bounds[number], starts, _count_passed(me, starts))
        slots = layout.slots[group.form]
        which = block.look_up(table, _WHICH) if any(slot.per_leaf for slot in slots) else 0
        scalars = [slot.read(sources, which) for slot in slots]
        program = layout.forms[group.form][0]

        def load(leaf, at):
            refs = sources[offsets[leaf] : offsets[leaf] + len(program.inputs)]
            return _kept_apart(
                [
                    _load_if(needed, scalars, ref, at, group.width)
                    for ref, needed in zip(refs, program.loads, strict=True)
                ]
            )

        shape = () if group.width == 1 else (group.width,)
        store_results(
            block, scalars, evaluate(program, block.on_leaf(load), scalars, shape, OPERATIONS)
        )

    starts_of_groups = [layout.starts[bound] for bound in bounds[:-1]]
    # One flat switch: lowering a cond takes its first branch twice, a nested one twice each level.
    lax.switch(
        _count_passed(me, starts_of_groups),
        [partial(run_group, number) for number in range(len(layout.groups))],
    )


def _count_passed(me, starts: Sequence[int]) -> jax.Array:
    """Return the index of the range that the block lies in, given where ranges start."""
    return sum((jnp.where(me >= start, 1, 0) for start in starts[1:]), jnp.int32(0))


def _load_if(needed: Predicate | None, scalars, ref, at, width: int) -> jax.Array:
    """Load the block's part of an array; where it is not needed, return zeros without access."""
    vector = width // _LANES

    def zeros():
        return _strided(jnp.zeros((width,) if vector else (), ref.dtype), vector)

    load = partial(_load, ref, at, width, vector)
    return load() if needed is None else lax.cond(_holds(needed, scalars), load, zeros)


def _load(ref, at, width: int, vector: int) -> jax.Array:
    if width == 1:
        return ref[at]
    whole = {"idx": ()} if _BEFORE_0_11 else {}
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)
    return plgpu.load(ref.at[pl.ds(at, width)], **whole, layout=layout, optimized=False)


def _kept_apart(blocks: list[jax.Array]) -> list[jax.Array]:
    """Keep the loads of one leaf in code of their own.

    Otherwise LLVM merges the loads of all leaves into one from a pointer whose alignment it no
    longer knows, and accesses vectors element by element.
    """
    # The barrier takes whole registers: no booleans, and no single elements of 16 bits.
    whole = [i for i, x in enumerate(blocks) if x.size > _LANES and x.dtype != bool]
    passed = lax.optimization_barrier([blocks[i] for i in whole])
    apart = dict(zip(whole, passed, strict=True))
    return [apart.get(i, x) for i, x in enumerate(blocks)]


def _store(ref, at, value: jax.Array) -> None:
    if not value.shape:
        ref[at] = value
    elif _STORE is None:
        ref[pl.ds(at, value.size)] = value
    else:
        _STORE(ref.at[pl.ds(at, value.size)], value, optimized=False)


def _strided(x: jax.Array, vector: int = 1) -> jax.Array:
    """Give `x` the layout of an array that `_load` returns."""
    if not x.shape:
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED(x.shape, vec_size=vector))


def _holds(needed: Predicate, scalars) -> jax.Array:
    (_, place), value = needed
    return scalars[place] if value else jnp.logical_not(scalars[place])
