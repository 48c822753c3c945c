"""The program of one leaf in one launch: straight-line code for its blocks.

The code itself, a `Body`, contains no nodes of the graph, so leaves with equal bodies share a
kernel. A step compares the bodies of all its leaves. They consist of tuples, which Python compares
fast.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import Primitive

from pallas_kernels.graph import Kind, Node, dtype_name, number_of
from pallas_kernels.ops import REDUCTIONS, ROW_REDUCTIONS, SAME_ORDER

# The bodies of a few steps.
BODY_CACHE_SIZE = 256


class Input(NamedTuple):
    """An array that is read block by block."""

    index: int
    source: str = "input"  # else it would equal a `Scalar` of the same index


class Scalar(NamedTuple):
    """A value that is the same for all blocks."""

    index: int
    source: str = "scalar"


class Result(NamedTuple):
    """The result of an operation."""

    index: int
    source: str = "result"


class Number(NamedTuple):
    """A number that is known while tracing, as the bytes of its dtype."""

    data: bytes
    dtype: str

    @property
    def value(self) -> Any:
        """The number, as a NumPy scalar."""
        return number_of(self.data, self.dtype)


Ref = Input | Scalar | Result | Number


class Predicate(NamedTuple):
    """A condition: a scalar, and the value that it must have."""

    scalar: Scalar
    value: bool


class Op(NamedTuple):
    """An operation on blocks.

    Attributes:
      primitive: the primitive.
      params: its parameters.
      operands: its operands.
      row: how many elements of the leaf share one element of the result; 1 if elementwise.
    """

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]
    operands: tuple[Ref, ...]
    row: int


class Root(NamedTuple):
    """A result of a program.

    Attributes:
      value: the value to store or reduce.
      needed: the condition for storing it; `None` means always.
      in_place: the index of the input whose memory it reuses, if any.
      dtype: the dtype of the result.
      reduction: "sum", "max" or "min" over the leaf; `None` means that the leaf is stored.
      row: how many elements of the leaf share one element of the value; 1 if elementwise.
    """

    value: Ref
    needed: Predicate | None
    in_place: int | None
    dtype: str
    reduction: str | None
    row: int


@dataclass(frozen=True)
class Body:
    """The code of a program.

    Attributes:
      inputs: the dtypes of the arrays that are read block by block.
      rows: for each input, how many elements of the leaf share one of its elements.
      loads: for each input, the condition for reading it; `None` means always.
      scalars: the dtypes of the values that are the same for all blocks.
      ops: the operations, in order.
      roots: the values to store or reduce, one for each result.
    """

    inputs: tuple[str, ...]
    rows: tuple[int, ...]
    loads: tuple[Predicate | None, ...]
    scalars: tuple[str, ...]
    ops: tuple[Op, ...]
    roots: tuple[Root, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of its rows, in decreasing order; empty if all values are elementwise."""
        rows = {*self.rows, *(op.row for op in self.ops)}
        return tuple(sorted(rows - {1}, reverse=True))

    @property
    def longest_row(self) -> int:
        """The length of its longest rows; 1 if it has none."""
        return self.lengths[0] if self.lengths else 1

    @cached_property
    def stored(self) -> tuple[Root, ...]:
        """The roots that are stored."""
        return tuple(root for root in self.roots if root.reduction is None)

    @cached_property
    def reductions(self) -> tuple[str, ...]:
        """The reduction of each root that is a statistic."""
        return tuple(root.reduction for root in self.roots if root.reduction is not None)

    def row(self, ref: Ref) -> int | None:
        """Return how many elements of the leaf share one of a value; `None` for scalars."""
        match ref:
            case Input():
                return self.rows[ref.index]
            case Result():
                return self.ops[ref.index].row
            case _:
                return None

    def bytes(self, size: int) -> tuple[int, int]:
        """Return the bytes that a leaf of `size` elements moves, and those that some steps skip."""
        moved = [*zip(self.inputs, self.rows, self.loads, strict=True)]
        moved += [(root.dtype, root.row, root.needed) for root in self.stored]
        each = [(size // row * np.dtype(dtype).itemsize, needed) for dtype, row, needed in moved]
        return sum(n for n, _ in each), sum(n for n, needed in each if needed is not None)


@dataclass(frozen=True)
class Program:
    """The code of one leaf, and the nodes that it reads and computes.

    Attributes:
      body: the code.
      size: number of elements of the leaf per device.
      inputs, scalars: the nodes of the body's inputs and scalars.
      results: the nodes of its roots.
    """

    body: Body
    size: int
    inputs: tuple[Node, ...]
    scalars: tuple[Node, ...]
    results: tuple[Node, ...]

    @property
    def stored(self) -> list[Node]:
        """The results that are leaves."""
        return [n for n in self.results if n.kind is not Kind.REDUCED]

    @property
    def reduced(self) -> list[Node]:
        """The results that are statistics."""
        return [n for n in self.results if n.kind is Kind.REDUCED]

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes read and written, and how many of them some steps skip."""
        return self.body.bytes(self.size)


def make(
    results: Sequence[Node],
    size: int,
    targets: Mapping[Node, Node],
    given: Collection[Node] = (),
    *,
    whole: int,
) -> Program:
    """Return the program that computes `results` from arguments and from earlier results.

    Args:
      results: values of one component. The statistics that they depend on are already known.
      size: number of elements per device.
      targets: for some results, the argument whose memory the result reuses.
      given: values that are read from memory instead of computed.
      whole: number of elements of the leaf on all devices.
    """
    code = _Code(given, whole)
    roots = tuple(code.root(result, targets.get(result)) for result in results)
    body = _body(
        tuple([dtype_name(node.dtype) for node in code.inputs]),
        tuple([whole // node.size for node in code.inputs]),
        tuple([dtype_name(node.dtype) for node in code.scalars]),
        tuple(code.ops),
        roots,
    )
    return Program(body, size, tuple(code.inputs), tuple(code.scalars), tuple(results))


@lru_cache(BODY_CACHE_SIZE)
def _body(
    inputs: tuple[str, ...],
    rows: tuple[int, ...],
    scalars: tuple[str, ...],
    ops: tuple[Op, ...],
    roots: tuple[Root, ...],
) -> Body:
    return Body(inputs, rows, _needed_inputs(len(inputs), ops, roots), scalars, ops, roots)


class _Code:
    """The code of a program while it is written."""

    def __init__(self, given: Collection[Node], whole: int) -> None:
        self.inputs: list[Node] = []
        self.scalars: list[Node] = []
        self.ops: list[Op] = []
        self._given = given
        self._whole = whole
        self._refs: dict[Node, Ref] = {}

    def root(self, result: Node, old: Node | None) -> Root:
        """Return the root of a result, which reuses the memory of `old`."""
        reduced = result.kind is Kind.REDUCED
        value, needed = (result.args[0] if reduced else result), None
        if old is not None and _keeps(value, old):
            which = self.ref(value.args[0])
            if isinstance(which, Scalar):  # it is a number if the chain's code decides
                kept = int(value.args[2] is old)  # the value of the predicate that selects `old`
                needed = Predicate(which, value=not kept)
                value = value.args[2 - kept]
        in_place = None if old is None else self.ref(old)
        assert in_place is None or isinstance(in_place, Input)
        return Root(
            self.ref(value),
            needed,
            None if in_place is None else in_place.index,
            dtype_name(result.dtype),
            REDUCTIONS[result.operation] if reduced else None,
            self._whole // (result.args[0] if reduced else result).size,
        )

    def ref(self, node: Node) -> Ref:
        """Return a reference to the value of a node; add the code that computes it."""
        ref = self._refs.get(node)
        if ref is None:
            ref = self._refs[node] = self._new_ref(node)
        return ref

    def _new_ref(self, node: Node) -> Ref:
        kind = node.kind
        if kind is Kind.BROADCAST:
            return self.ref(node.args[0])
        if kind is Kind.LITERAL:
            return Number(node.params["bytes"], dtype_name(node.dtype))
        if kind is Kind.ELEMENTWISE and node not in self._given:
            if node.size == node.args[0].size and node.operation in SAME_ORDER:
                return self.ref(node.args[0])
            assert node.primitive is not None
            operands = tuple([self.ref(a) for a in node.args])
            # A kernel works on the elements of one device.
            params = node.params | {"sharding": None} if "sharding" in node.params else node.params
            if node.operation in ROW_REDUCTIONS or node.primitive is lax.broadcast_in_dim_p:
                params = {}  # those are of the whole array; `Op.row` has what a block needs
            row = self._whole // node.size
            self.ops.append(Op(node.primitive, tuple(sorted(params.items())), operands, row))
            return Result(len(self.ops) - 1)
        if node.on_leaf:
            self.inputs.append(node)
            return Input(len(self.inputs) - 1)
        self.scalars.append(node)
        return Scalar(len(self.scalars) - 1)


def _keeps(value: Node, old: Node) -> bool:
    """Return whether `value` is a select by a scalar between `old` and a new value."""
    return (
        value.primitive is lax.select_n_p
        and len(value.args) == 3
        and value.args[0].kind in (Kind.BROADCAST, Kind.XLA, Kind.INPUT)
        and not value.args[0].on_leaf
        and (value.args[1] is old) != (value.args[2] is old)
    )


def _needed_inputs(
    inputs: int, ops: Sequence[Op], roots: Sequence[Root]
) -> tuple[Predicate | None, ...]:
    """Return the condition for reading each input; `None` means always."""
    never = object()
    needs: dict[Ref, Any] = {}

    def need(ref: Ref, when: Predicate | None) -> None:
        needs[ref] = when if needs.get(ref, never) in (never, when) else None

    for root in roots:
        need(root.value, root.needed)
    for i in reversed(range(len(ops))):
        which, *rest = ops[i].operands
        when = needs.get(Result(i))
        selects = ops[i].primitive is lax.select_n_p and len(rest) == 2
        if selects and isinstance(which, Scalar) and when is None:
            need(rest[0], Predicate(which, value=False))
            need(rest[1], Predicate(which, value=True))
        else:
            for operand in (which, *rest):
                need(operand, when)
    return tuple(needs.get(Input(i)) for i in range(inputs))
