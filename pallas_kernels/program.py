"""The program of one leaf in one launch: straight-line code for its blocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ops import REDUCTIONS, SAME_ORDER, Operations, maximum, minimum
from pallas_kernels.trace import Kind, Node

# A value inside a program: ("input" | "op" | "scalar", index) or ("number", value, dtype).
Ref = tuple[Any, ...]
# A condition: a scalar, and the value that it must have.
Predicate = tuple[Ref, int]


@dataclass(frozen=True)
class Root:
    """A result of a program.

    Attributes:
      value: the value to store or reduce.
      needed: the condition for storing it; `None` means always.
      in_place: the index of the input whose memory it reuses, if any.
      dtype: the dtype of the result.
      reduction: "sum", "max" or "min" over the leaf; `None` means that the leaf is stored.
    """

    value: Ref
    needed: Predicate | None
    in_place: int | None
    dtype: str
    reduction: str | None


@dataclass
class Program:
    """Straight-line code for the blocks of one leaf.

    Attributes:
      results: the nodes that the roots compute.
      size: number of elements of the leaf per device.
      inputs: arrays that are read block by block.
      loads: for each input, the condition for reading it; `None` means always.
      scalars: values that are the same for all blocks.
      ops: the operations in order: primitive, parameters, operands.
      roots: the values to store or reduce, one for each result.
    """

    results: list[Node]
    size: int
    inputs: list[Node] = field(default_factory=list)
    loads: list[Predicate | None] = field(default_factory=list)
    scalars: list[Node] = field(default_factory=list)
    ops: list[tuple[Any, dict[str, Any], tuple[Ref, ...]]] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)

    def stored(self) -> list[tuple[Node, Root]]:
        """Return the results that are leaves, and their roots."""
        return [r for r in zip(self.results, self.roots, strict=True) if r[1].reduction is None]

    def reduced(self) -> list[tuple[Node, Any]]:
        """Return the results that are statistics, and their roots."""
        return [r for r in zip(self.results, self.roots, strict=True) if r[1].reduction is not None]

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that are read and written, and how many of them some steps skip."""
        moved = [*zip(self.inputs, self.loads, strict=True)]
        moved += [(node, root.needed) for node, root in self.stored()]
        skipped = sum(node.dtype.itemsize for node, needed in moved if needed is not None)
        return self.size * sum(node.dtype.itemsize for node, _ in moved), self.size * skipped

    def signature(self) -> Any:
        """Return a key that is equal for programs that can share a kernel body."""
        ops = tuple(
            (p.name, tuple(sorted((k, str(v)) for k, v in q.items())), r) for p, q, r in self.ops
        )
        dtypes = tuple(str(n.dtype) for n in (*self.inputs, *self.scalars))
        return ops, tuple(self.roots), tuple(self.loads), dtypes, len(self.inputs)


def make(
    results: Sequence[Node], size: int, targets: Mapping[Node, Node], given: Sequence[Node] = ()
) -> Program:
    """Return the program that computes `results` from arguments and from earlier results.

    Args:
      results: values of one component. The statistics that they depend on are already known.
      size: number of elements per device.
      targets: for some results, the argument whose memory the result reuses.
      given: values that are read from memory instead of computed.
    """
    program = Program(list(results), size)
    refs: dict[Node, Ref] = {}

    def visit(node: Node) -> Ref:
        if node not in refs:
            refs[node] = new_ref(node)
        return refs[node]

    def new_ref(node: Node) -> Ref:
        if node.kind is Kind.BROADCAST:
            return visit(node.args[0])
        if node.kind is Kind.LITERAL:
            return "number", node.params["value"], str(node.dtype)
        if node.kind is Kind.ELEMENTWISE and node not in given:
            if node.operation in SAME_ORDER:
                return visit(node.args[0])
            operands = tuple(visit(a) for a in node.args)
            program.ops.append((node.primitive, node.params, operands))
            return "op", len(program.ops) - 1
        if node.on_leaf:
            program.inputs.append(node)
            return "input", len(program.inputs) - 1
        program.scalars.append(node)
        return "scalar", len(program.scalars) - 1

    for result in results:
        reduced, old = result.kind is Kind.REDUCED, targets.get(result)
        value, needed = (result.args[0] if reduced else result), None
        if old is not None and _keeps(value, old):
            kept = int(value.args[2] is old)  # the value of the predicate that selects `old`
            needed, value = (visit(value.args[0]), 1 - kept), value.args[2 - kept]
        index_of_old = None if old is None else visit(old)[1]
        reduction = REDUCTIONS[result.operation] if reduced else None
        program.roots.append(Root(visit(value), needed, index_of_old, str(result.dtype), reduction))
    program.loads = _needed_inputs(program)
    return program


def _keeps(value: Node, old: Node) -> bool:
    """Return whether `value` is a select by a scalar between `old` and a new value."""
    return (
        value.primitive is lax.select_n_p
        and len(value.args) == 3
        and value.args[0].kind in (Kind.BROADCAST, Kind.XLA, Kind.INPUT)
        and not value.args[0].on_leaf
        and (value.args[1] is old) != (value.args[2] is old)
    )


def _needed_inputs(program: Program) -> list[Predicate | None]:
    """Return the condition for reading each input; `None` means always."""
    never = object()
    needs: dict[Ref, Any] = {}

    def need(ref: Ref, when: Predicate | None) -> None:
        needs[ref] = when if needs.get(ref, never) in (never, when) else None

    for root in program.roots:
        need(root.value, root.needed)
    for i in reversed(range(len(program.ops))):
        primitive, _, operands = program.ops[i]
        when = needs.get(("op", i))
        if (
            primitive is lax.select_n_p
            and operands[0][0] == "scalar"
            and len(operands) == 3
            and when is None
        ):
            need(operands[1], (operands[0], 0))
            need(operands[2], (operands[0], 1))
        else:
            for operand in operands:
                need(operand, when)
    return [needs.get(("input", i)) for i in range(len(program.inputs))]


def evaluate(
    program: Program,
    blocks: Sequence[Any],
    scalars: Sequence[Any],
    shape: tuple[int, ...],
    operations: Operations,
) -> list[Any]:
    """Return the roots' values for one block; a kernel has no other arithmetic.

    Args:
      program: what to compute.
      blocks: one block of each input, of shape `shape`.
      scalars: the values of the program's scalars.
      shape: the shape of a block; `()` for a single element.
      operations: the operations of the backend.
    """
    done: list[Any] = []

    def get(ref: Ref) -> Any:
        if ref[0] == "input":
            return blocks[ref[1]]
        if ref[0] == "op":
            return done[ref[1]]
        if ref[0] == "scalar":
            return scalars[ref[1]]
        return jnp.asarray(ref[1], ref[2])

    def wide(ref: Ref) -> Any:
        return jnp.broadcast_to(get(ref), shape)

    for primitive, params, operands in program.ops:
        values = [wide(ref) for ref in operands]
        plain = {k: None if k == "sharding" else v for k, v in params.items()}
        done.append(operations.apply(primitive, values, plain))
    return [wide(root.value) for root in program.roots]


def identity_of(reduction: str, dtype: Any = np.float32) -> Any:
    """Return the neutral element of a reduction."""
    return np.asarray({"sum": 0.0, "max": -np.inf, "min": np.inf}[reduction], dtype)


def or_nan(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Make a reduction return NaN if an element is NaN; Triton's reductions ignore NaN."""

    def reduced(x):
        missing = jnp.sum(jnp.where(x != x, jnp.ones_like(x), jnp.zeros_like(x)))
        return jnp.where(missing > 0, jnp.asarray(jnp.nan, x.dtype), reduce(x))

    return reduced


REDUCE: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum,
    "max": or_nan(jnp.max),
    "min": or_nan(jnp.min),
}
COMBINE: dict[str, Callable[..., Any]] = {"sum": jnp.add, "max": maximum, "min": minimum}
