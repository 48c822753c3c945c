"""Launches on Pallas' Triton backend: many leaves in one grid.

Every leaf has a range of blocks in the grid. A block finds its leaf by a binary search over these
ranges, whose bounds are constants. Then it loads its part of the leaf's arrays, computes, and
stores. Leaves whose programs have the same form share the code of the computation. Only the search,
the loads and the stores have code for each leaf.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import ops, quiet
from pallas_kernels.layout import Layout, PartialReduction
from pallas_kernels.ops import FLOATS, INTEGERS, Operations
from pallas_kernels.program import COMBINE, REDUCE, Predicate, evaluate, identity_of

BLOCK = 512
WIDTHS = (BLOCK,)
# Parts of a statistic that a block adds up at once: few steps, with many loads in flight each.
_PARTS = 4096
_VECTOR_BYTES = 16
_PARAMS = plt.CompilerParams(num_warps=4, num_stages=1)
OPERATIONS = Operations(
    missing=dict.fromkeys(("erf", "nextafter", "reduce_precision"), FLOATS)
    | {"div": INTEGERS, "rem": FLOATS | INTEGERS},  # results for 0 differ from XLA's
    rewritten={"round": ops.round_by_floor},
)


def launch(
    layout: Layout,
    operands: Sequence[jax.Array],
    offsets: Sequence[int],
    kernel_cache: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Run one launch; return the stored leaves as flat arrays, then the partial statistics.

    The partial statistics of all blocks are one vector, column by column. It exists only if the
    launch computes statistics.

    Args:
      layout: the layout of the launch.
      operands: the packs of scalars, then the inputs of all programs.
      offsets: for each program, the index of its first input among the operands.
      kernel_cache: kernels that this step has made so far; equal launches reuse them.
      interpret: whether to run in Pallas' interpreter.
    """
    make = partial(_make, layout, offsets)
    return _once(kernel_cache, layout.cache_key(), make, interpret)(*operands)


def reduce_partials(
    work: PartialReduction,
    parts: Sequence[jax.Array],
    kernel_cache: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> jax.Array:
    """Add up the partial statistics that the launches of a phase wrote to memory."""
    key = ("reduce_partials", tuple(work.rows), tuple(work.kinds), tuple(x.shape for x in parts))
    add_up = _once(kernel_cache, key, partial(_make_reduction, work), interpret)
    (results,) = add_up(jnp.asarray(work.table, jnp.int32).reshape(-1), *parts)
    return results


def _make(layout: Layout, offsets: Sequence[int], interpret: bool) -> Callable[..., Any]:
    results = layout.results(offsets)
    shapes = [shape for shape, _ in results]
    aliases = {operand: i for i, (_, operand) in enumerate(results) if operand is not None}
    blocks = layout.starts[-1]
    if layout.columns:
        shapes.append(jax.ShapeDtypeStruct((layout.columns * blocks,), jnp.float32))
    operands = offsets[-1] + len(layout.programs[-1].inputs)

    def kernel(*refs):
        sources, targets = refs[:operands], refs[operands:]

        def store(leaf, scalars, values, index, inside):
            roots = [root for _, root in layout.programs[leaf].stored()]
            for k, (root, value) in enumerate(zip(roots, values, strict=True)):
                ref = targets[layout.first_result[leaf] + k]
                mask = _both(inside, root.needed, scalars)
                if mask is None:
                    ref[index] = value
                else:
                    plt.store(ref.at[index], value, mask=mask)
            return ()

        def store_results(me, leaves, program, scalars, arrays, valid):
            values = evaluate(program, arrays, scalars, (BLOCK,), OPERATIONS)
            pairs = [*zip(program.roots, values, strict=True)]
            parts = [(root.reduction, value) for root, value in pairs if root.reduction]
            for k, (reduction, value) in enumerate(parts):
                neutral = jnp.full((BLOCK,), identity_of(reduction), jnp.float32)
                kept = jnp.where(jnp.arange(BLOCK) < valid, value.astype(jnp.float32), neutral)
                targets[-1][k * blocks + me] = REDUCE[reduction](kept)
            stored = [value.astype(root.dtype) for root, value in pairs if not root.reduction]
            if stored:
                _on_leaf(layout, me, leaves, lambda leaf, *at: store(leaf, scalars, stored, *at))

        _run_block(layout, sources, offsets, store_results)

    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        out_shape=shapes,
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=_PARAMS,
    )


def _make_reduction(work: PartialReduction, interpret: bool) -> Callable[..., Any]:
    def kernel(*refs):
        table, *sources, results = refs
        me = pl.program_id(0)
        first, count, kind, place = (table[me * 4 + i] for i in range(4))

        def add_up(source, reduction):
            neutral = jnp.full((_PARTS,), identity_of(reduction), jnp.float32)

            def step(i, total):
                row = i * _PARTS + jnp.arange(_PARTS)
                x = plt.load(source.at[first + row], mask=row < count, other=neutral)
                return COMBINE[reduction](total, x)

            total = lax.fori_loop(0, (count + _PARTS - 1) // _PARTS, step, neutral)
            return REDUCE[reduction](total)

        def add_up_from(launch):
            branches = [partial(add_up, sources[launch], reduction) for reduction in work.kinds]
            return lax.switch(kind, branches)

        results[place] = _search(me, range(len(sources)), work.rows, add_up_from)

    return pl.pallas_call(
        kernel,
        grid=(len(work.table),),
        out_shape=[jax.ShapeDtypeStruct((len(work.table),), jnp.float32)],
        interpret=interpret,
        compiler_params=_PARAMS,
    )


def _once(kernel_cache, structure, make, interpret) -> Callable[..., Any]:
    """Return the kernel of a structure; make it only once, so that `jit` lowers it once."""
    if structure not in kernel_cache:
        made = make(interpret)
        kernel_cache[structure] = jax.jit(made if interpret else partial(quiet.call, made))
    return kernel_cache[structure]


def _run_block(layout, sources, offsets, store_results) -> None:
    """Load this block's scalars and inputs, and call `store_results` with them."""
    me = pl.program_id(0)

    def load(leaf, scalars, index, inside):
        program, blocks = layout.programs[leaf], []
        for k, (node, needed) in enumerate(zip(program.inputs, program.loads, strict=True)):
            ref = sources[offsets[leaf] + k]
            mask = _both(inside, needed, scalars)
            if mask is None:
                blocks.append(ref[index])
            else:
                blocks.append(plt.load(ref.at[index], mask=mask, other=jnp.zeros((), node.dtype)))
        return (*blocks, jnp.int32(program.size) - index.start)

    def run_form(number):
        program = layout.forms[number][0]
        leaves = range(layout.first[number], layout.first[number + 1])
        slots = layout.slots[number]
        which = 0
        if any(slot.per_leaf for slot in slots):
            zero = jnp.minimum(me, 0)
            which = _search(me, leaves, layout.starts, lambda leaf: zero + (leaf - leaves[0]))
        scalars = [slot.read(sources, which) for slot in slots]
        *blocks, valid = _on_leaf(layout, me, leaves, lambda leaf, *at: load(leaf, scalars, *at))
        store_results(me, leaves, program, scalars, blocks, valid)
        return ()

    starts_of_forms = [layout.starts[first] for first in layout.first]
    _search(me, range(len(layout.forms)), starts_of_forms, run_form)


def _search(me, candidates: range, starts: Sequence[int], found: Callable[[int], Any]) -> Any:
    """Call `found(i)` for the candidate `i` whose range of blocks contains block `me`."""
    if len(candidates) == 1:
        return found(candidates[0])
    middle = len(candidates) // 2
    return lax.cond(
        me < starts[candidates[middle]],
        lambda: _search(me, candidates[:middle], starts, found),
        lambda: _search(me, candidates[middle:], starts, found),
    )


def _on_leaf(layout, me, leaves, access: Callable[..., Any]) -> Any:
    """Call `access(leaf, index, inside)` for this block.

    `inside` is the mask of elements inside of the leaf, or `None` if all are inside.
    """

    def on(leaf):
        program = layout.programs[leaf]
        first = (me - layout.starts[leaf]) * BLOCK
        index = pl.ds(first, BLOCK)
        if program.size % BLOCK == 0:
            return access(leaf, index, None)
        inside = first + jnp.arange(BLOCK) < program.size
        # A mask that can change inside of a vector makes Triton access single elements.
        vector = _VECTOR_BYTES // min(node.dtype.itemsize for node in program.inputs)
        if program.size < BLOCK or program.size % vector == 0:
            return access(leaf, index, inside)
        return lax.cond(
            first + BLOCK <= program.size,
            lambda: access(leaf, index, None),
            lambda: access(leaf, index, inside),
        )

    return _search(me, leaves, layout.starts, on)


def _both(inside, needed: Predicate | None, scalars) -> Any:
    """Return the mask of an access, or `None` if all elements are always accessed."""
    if needed is None:
        return inside
    (_, place), value = needed
    wanted = scalars[place] if value else jnp.logical_not(scalars[place])
    wanted = jnp.broadcast_to(wanted, (BLOCK,))
    return wanted if inside is None else inside & wanted
