"""The graph of a step's values, classified by what a kernel can do with them."""

import enum
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Primitive


def number_of(data: bytes, dtype: Any) -> Any:
    """Return the NumPy scalar with these bytes."""
    return np.frombuffer(data, np.dtype(dtype))[0]


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype, which NumPy would compute anew."""
    return dtype.name


class Kind(enum.Enum):
    """The role of a value in a fused step."""

    INPUT = enum.auto()  # an argument or a constant of the step
    LITERAL = enum.auto()  # a Python number
    ELEMENTWISE = enum.auto()  # elementwise, or for each row of a leaf: a block computes its part
    REDUCED = enum.auto()  # a statistic over a whole array: kernels compute it
    BROADCAST = enum.auto()  # a scalar, broadcast to the shape of an array
    XLA = enum.auto()  # everything else: XLA computes it between launches


_LEAF_KINDS = (Kind.INPUT, Kind.ELEMENTWISE, Kind.XLA)


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One value of the step.

    Attributes:
      kind: its role.
      primitive: the operation that computes it, if any.
      params: the operation's parameters; for a literal, its value.
      args: the operation's operands.
      shape, dtype: shape and dtype of the value.
      level: number of reductions on the longest path from the arguments to the value.
      index: order of creation; the arguments come first, in their order.
      output: index of the value among the operation's results.
      size: number of elements.
      on_leaf: whether the value is an array that a launch reads block by block.
    """

    kind: Kind
    primitive: Primitive | None
    params: dict[str, Any]
    args: tuple["Node", ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    level: int
    index: int
    output: int = 0
    size: int = field(init=False)
    on_leaf: bool = field(init=False)

    def __post_init__(self) -> None:
        """Compute what is read often."""
        self.size = math.prod(self.shape)
        self.on_leaf = self.size > 1 and self.kind in _LEAF_KINDS

    @property
    def operation(self) -> str:
        """Name of the primitive, or an empty string if there is none."""
        return "" if self.primitive is None else self.primitive.name

    @property
    def number(self) -> Any:
        """The value of a literal."""
        return number_of(self.params["bytes"], self.dtype)


class Operation(NamedTuple):
    """An operation on values of the step.

    Attributes:
      primitive: the primitive.
      params: its parameters.
      args: its operands.
      types: the types of its results.
    """

    primitive: Primitive
    params: dict[str, Any]
    args: Sequence[Node]
    types: Sequence[Any]


@dataclass(eq=False, repr=False)
class Graph:
    """All values of one step; equal values share a node.

    Attributes:
      inputs: the nodes of the arguments, then those of the constants.
      outputs: the results' nodes, in order.
      names: names of the inputs, for messages.
      escapes: values of leaves that an operation of XLA reads, and why no kernel runs the
        operation.
      effects: operations without a result, such as prints.
    """

    inputs: list[Node] = field(default_factory=list[Node])
    outputs: list[Node] = field(default_factory=list[Node])
    names: dict[Node, str] = field(default_factory=dict[Node, str])
    escapes: list[tuple[Node, str]] = field(default_factory=list[tuple[Node, str]])
    effects: list[Node] = field(default_factory=list[Node])
    _table: dict[Any, Node] = field(default_factory=dict[Any, Node])
    _literals: dict[Any, Node] = field(default_factory=dict[Any, Node])
    _parent: dict[Node, Node] = field(default_factory=dict[Node, Node])

    def component(self, node: Node) -> Node:
        """Return the node that represents all values elementwise connected with `node`."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def node(
        self,
        kind: Kind,
        primitive: Primitive | None,
        params: dict[str, Any],
        args: tuple[Node, ...],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        output: int = 0,
    ) -> Node:
        """Return the node of a value; create it at the first call."""
        key = (kind.value, primitive, _hashable(params), args, shape, dtype, output)
        made = self._table.get(key)
        if made is None:
            level = max([a.level for a in args], default=0) + (kind is Kind.REDUCED)
            made = Node(
                kind, primitive, params, args, shape, dtype, level, len(self._table), output
            )
            self._table[key] = made
            if kind is Kind.ELEMENTWISE:
                for arg in args:
                    if arg.on_leaf:
                        self._unite(made, arg)
        return made

    def literal(self, value: Any) -> Node:
        """Return the node of a number that is known while tracing."""
        value = np.asarray(value)
        # Bytes, because -0.0 equals 0.0, and NaN does not equal NaN.
        key = value.tobytes(), value.dtype
        if key not in self._literals:
            self._literals[key] = self.node(Kind.LITERAL, None, {"bytes": key[0]}, (), (), key[1])
        return self._literals[key]

    def input(self, aval: Any, name: str) -> Node:
        """Add the next argument or constant."""
        made = Node(Kind.INPUT, None, {}, (), tuple(aval.shape), aval.dtype, 0, len(self._table))
        self._table["input", len(self.inputs)] = made
        self.inputs.append(made)
        self.names[made] = name
        return made

    def results(self, kind: Kind, op: Operation) -> list[Node]:
        """Return the nodes of an operation's results."""
        args = tuple(op.args)
        return [
            self.node(kind, op.primitive, op.params, args, t.shape, t.dtype, i)
            for i, t in enumerate(op.types)
        ]

    def effect(self, op: Operation) -> None:
        """Add an operation without a result."""
        args, no_dtype = tuple(op.args), np.dtype(bool)
        self.effects.append(Node(Kind.XLA, op.primitive, op.params, args, (), no_dtype, 0, -1))

    def reachable(self) -> list[Node]:
        """Return all values on which a result depends, in the order of their creation."""
        seen: set[Node] = set()
        pending = list(self.outputs)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(node.args)
        return sorted(seen, key=lambda n: n.index)

    def _unite(self, a: Node, b: Node) -> None:
        a, b = self.component(a), self.component(b)
        if a is not b:
            older, newer = (a, b) if a.index < b.index else (b, a)
            self._parent[newer] = older


_SHARDING_PARAMS = ("sharding", "out_sharding")


def _hashable(params: dict[str, Any]) -> Any:
    """Return a key that is equal for equal parameters.

    Shardings are ignored, because they don't matter inside one device's step.
    """
    if not params:
        return ()
    key = tuple([item for item in sorted(params.items()) if item[0] not in _SHARDING_PARAMS])
    try:
        hash(key)
    except TypeError:
        return id(params)
    return key
