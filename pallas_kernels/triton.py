"""Launches on Pallas' Triton backend: many leaves in one grid.

Every leaf owns a range of the grid's blocks. A block finds its leaf by a binary search over these
ranges, whose bounds are constants, loads its part of the leaf's arrays, computes, and stores.
Leaves with programs of one form share the computation; only the search is per leaf.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import quiet
from pallas_kernels.launch import COMBINE, REDUCE, Layout, is_fusible
from pallas_kernels.plan import Predicate, Program, evaluate, identity_of
from pallas_kernels.trace import Node

BLOCK = 512
_PARAMS = plt.CompilerParams(num_warps=4, num_stages=1)
_MISSING = frozenset(("erf", "nextafter", "reduce_precision", "rem", "cbrt"))


def supports(primitive: str) -> bool:
    """Whether a kernel can compute the primitive."""
    return is_fusible(primitive) and primitive not in _MISSING


def update(
    programs: Sequence[Program],
    array: Callable[[Node], jax.Array],
    scalar: Callable[[Node], Any],
    calls: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> list[list[jax.Array]]:
    """Runs programs that write leaves, in one launch; flat results in the order of the programs.

    Args:
      programs: at least one.
      array: a leaf's value, flat.
      scalar: any other value.
      calls: launches made so far in this step; one of the same structure is reused.
      interpret: whether to run in Pallas' interpreter.
    """
    layout = Layout(programs, scalar, (BLOCK,))
    operands, offsets = layout.operands(array)
    shapes, first_result, aliases = [], [], {}
    for program, offset in zip(layout.programs, offsets, strict=True):
        first_result.append(len(shapes))
        for root in program.roots:
            if root.in_place is not None:
                aliases[offset + root.in_place] = len(shapes)
            shapes.append(jax.ShapeDtypeStruct((program.size,), root.dtype))

    def kernel(*refs):
        sources, targets = refs[: len(operands)], refs[len(operands) :]

        def store(me, leaf, scalars, values):
            program = layout.programs[leaf]
            index, inside = _span(layout, leaf, me)
            for k, (root, value) in enumerate(zip(program.roots, values, strict=True)):
                ref = targets[first_result[leaf] + k]
                mask = _both(inside, root.needed, scalars)
                if mask is None:
                    ref[index] = value
                else:
                    plt.store(ref.at[index], value, mask=mask)

        def finish(me, leaves, program, scalars, blocks, valid):
            del valid
            values = evaluate(program, blocks, scalars, (BLOCK,))
            values = [v.astype(r.dtype) for v, r in zip(values, program.roots, strict=True)]
            _search(me, leaves, layout.starts, lambda leaf: store(me, leaf, scalars, values) or ())

        _run_block(layout, sources, offsets, finish)

    def make():
        return pl.pallas_call(
            kernel,
            grid=(layout.starts[-1],),
            out_shape=shapes,
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=_PARAMS,
        )

    results = _once(calls, layout.structure(), make, interpret)(*operands)
    return layout.by_program(programs, results)


def reduce(
    programs: Sequence[Program],
    array: Callable[[Node], jax.Array],
    scalar: Callable[[Node], Any],
    calls: dict[Any, Callable[..., Any]],
    *,
    interpret: bool,
) -> list[list[jax.Array]]:
    """Runs programs that compute statistics: one launch for partial ones, one to finish them.

    Arguments are those of `update`.
    """
    layout = Layout(programs, scalar, (BLOCK,))
    operands, offsets = layout.operands(array)
    columns = max(len(p.roots) for p in programs)

    def kernel(*refs):
        sources, partial = refs[: len(operands)], refs[-1]

        def finish(me, leaves, program, scalars, blocks, valid):
            del leaves
            values = evaluate(program, blocks, scalars, (BLOCK,))
            inside = jnp.arange(BLOCK) < valid
            for k, (root, value) in enumerate(zip(program.roots, values, strict=True)):
                neutral = jnp.full((BLOCK,), identity_of(root.reduction), jnp.float32)
                kept = jnp.where(inside, value.astype(jnp.float32), neutral)
                partial[me * columns + k] = REDUCE[root.reduction](kept)

        _run_block(layout, sources, offsets, finish)

    def make():
        return pl.pallas_call(
            kernel,
            grid=(layout.starts[-1],),
            out_shape=[jax.ShapeDtypeStruct((layout.starts[-1] * columns,), jnp.float32)],
            interpret=interpret,
            compiler_params=_PARAMS,
        )

    (partial,) = _once(calls, layout.structure(), make, interpret)(*operands)
    return _finish(layout, programs, partial, columns, calls, interpret)


def _finish(layout, programs, partial, columns, calls, interpret) -> list[list[jax.Array]]:
    """The statistics from the blocks' partial ones: one block of a second launch for each."""
    kinds = list(REDUCE)
    table, neutral = [], []
    for leaf, program in enumerate(layout.programs):
        first, last = layout.starts[leaf], layout.starts[leaf + 1]
        for k in range(columns):
            kind = program.roots[k].reduction if k < len(program.roots) else "sum"
            table += [first * columns + k, last - first, kinds.index(kind)]
            neutral.append(identity_of(kind))
    present = {root.reduction for p in layout.programs for root in p.roots}

    def kernel(partial_ref, table_ref, neutral_ref, result_ref):
        me = pl.program_id(0)
        first, count, kind = (table_ref[me * 3 + i] for i in range(3))
        start = jnp.broadcast_to(neutral_ref[me], (BLOCK,))

        def step(i, total):
            row = i * BLOCK + jnp.arange(BLOCK)
            inside = row < count
            loaded = plt.load(partial_ref.at[first + row * columns], mask=inside, other=0.0)
            x = jnp.where(inside, loaded, start)
            return _pick(kind, present, lambda f: f(total, x), COMBINE)

        total = lax.fori_loop(0, (count + BLOCK - 1) // BLOCK, step, start)
        result_ref[me] = _pick(kind, present, lambda f: f(total), REDUCE)

    def make():
        return pl.pallas_call(
            kernel,
            grid=(len(neutral),),
            out_shape=[jax.ShapeDtypeStruct((len(neutral),), jnp.float32)],
            interpret=interpret,
            compiler_params=_PARAMS,
        )

    finish = _once(calls, ("finish", len(neutral), columns, frozenset(present)), make, interpret)
    (result,) = finish(partial, jnp.asarray(table, jnp.int32), jnp.asarray(neutral, jnp.float32))
    row = {id(program): i for i, program in enumerate(layout.programs)}
    return [
        [result[row[id(program)] * columns + k] for k in range(len(program.roots))]
        for program in programs
    ]


def _pick(kind, present, apply, functions):
    """The function of the traced `kind`, among those that occur in the launch."""
    names = [name for name in functions if name in present]
    result = apply(functions[names[0]])
    for name in names[1:]:
        result = jnp.where(kind == list(functions).index(name), apply(functions[name]), result)
    return result


def _once(calls, structure, make, interpret) -> Callable[..., Any]:
    """A launch under `jit`, which traces and lowers the same function only once."""
    if structure not in calls:
        launch = make()
        calls[structure] = jax.jit(launch if interpret else partial(quiet.call, launch))
    return calls[structure]


def _run_block(layout, sources, offsets, finish) -> None:
    """Loads what this block needs, and calls `finish` for the form of its leaf."""
    me = pl.program_id(0)

    def load(leaf, scalars):
        program = layout.programs[leaf]
        index, inside = _span(layout, leaf, me)
        blocks = []
        for k, (node, needed) in enumerate(zip(program.inputs, program.loads, strict=True)):
            ref = sources[offsets[leaf] + k]
            mask = _both(inside, needed, scalars)
            if mask is None:
                blocks.append(ref[index])
            else:
                blocks.append(plt.load(ref.at[index], mask=mask, other=jnp.zeros((), node.dtype)))
        first = (me - layout.starts[leaf]) * BLOCK
        return (*blocks, jnp.int32(program.size) - first)

    def run_form(number):
        program = layout.forms[number][0]
        leaves = range(layout.first[number], layout.first[number + 1])
        slots = layout.slots[number]
        which = 0
        if any(slot.per_leaf for slot in slots):
            zero = jnp.minimum(me, 0)
            which = _search(me, leaves, layout.starts, lambda leaf: zero + (leaf - leaves[0]))
        scalars = [slot.read(sources, which) for slot in slots]
        *blocks, valid = _search(me, leaves, layout.starts, lambda leaf: load(leaf, scalars))
        finish(me, leaves, program, scalars, blocks, valid)
        return ()

    starts_of_forms = [layout.starts[first] for first in layout.first]
    _search(me, range(len(layout.forms)), starts_of_forms, run_form)


def _search(me, candidates: range, starts: Sequence[int], found: Callable[[int], Any]) -> Any:
    """`found(i)` for the candidate whose range of blocks holds this one."""
    if len(candidates) == 1:
        return found(candidates[0])
    middle = len(candidates) // 2
    return lax.cond(
        me < starts[candidates[middle]],
        lambda: _search(me, candidates[:middle], starts, found),
        lambda: _search(me, candidates[middle:], starts, found),
    )


def _span(layout, leaf, me) -> tuple[Any, Any]:
    """This block's elements of a leaf, and which of them exist; `None` if all do."""
    size = layout.programs[leaf].size
    first = (me - layout.starts[leaf]) * BLOCK
    inside = None if size % BLOCK == 0 else first + jnp.arange(BLOCK) < size
    return pl.ds(first, BLOCK), inside


def _both(inside, needed: Predicate | None, scalars) -> Any:
    """The mask of an access; `None` if it always happens."""
    if needed is None:
        return inside
    (_, place), value = needed
    wanted = scalars[place] if value else jnp.logical_not(scalars[place])
    wanted = jnp.broadcast_to(wanted, (BLOCK,))
    return wanted if inside is None else inside & wanted
