"""The graph of a step's values, classified by what a kernel can do with them.

Tracing runs the step on the shapes of its arguments and reads the jaxpr. Calls are inlined,
branches with arrays become selects, and every value becomes one `Node`. This module does not depend
on a backend or an optimizer.
"""

import enum
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal, Primitive, jaxpr_as_fun

from pallas_kernels.ops import ELEMENTWISE, REDUCTIONS, SAME_ORDER


class Kind(enum.Enum):
    """The role of a value in a fused step."""

    INPUT = enum.auto()  # an argument or a constant of the step
    LITERAL = enum.auto()  # a Python number
    ELEMENTWISE = enum.auto()  # the result of an elementwise operation: kernels compute it
    REDUCED = enum.auto()  # a statistic over a whole array: kernels compute it
    BROADCAST = enum.auto()  # a scalar, broadcast to the shape of an array
    XLA = enum.auto()  # everything else: XLA computes it between launches


@dataclass(eq=False, slots=True)
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
    """

    kind: Kind
    primitive: Primitive | None
    params: dict[str, Any]
    args: tuple["Node", ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    level: int
    index: int
    output: int = 0

    @property
    def operation(self) -> str:
        """Name of the primitive, or an empty string if there is none."""
        return "" if self.primitive is None else self.primitive.name

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of all elements in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def on_leaf(self) -> bool:
        """Whether the value is an array that a launch reads block by block."""
        return self.size > 1 and self.kind in (Kind.INPUT, Kind.ELEMENTWISE, Kind.XLA)


@dataclass
class Graph:
    """All values of one step; equal values share a node.

    Attributes:
      inputs: the arguments' nodes, in order.
      outputs: the results' nodes, in order.
      names: names of the inputs, for messages.
      escapes: values of leaves that an operation of XLA reads, and why no kernel runs the
        operation.
      effects: operations without a result, such as prints.
    """

    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)
    escapes: list[tuple[Node, str]] = field(default_factory=list)
    effects: list[Node] = field(default_factory=list)
    _table: dict[Any, Node] = field(default_factory=dict)
    _parent: dict[Node, Node] = field(default_factory=dict)

    def component(self, node: Node) -> Node:
        """Return the node that represents all values elementwise connected with `node`."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def _unite(self, a: Node, b: Node) -> None:
        a, b = self.component(a), self.component(b)
        if a is not b:
            older, newer = sorted((a, b), key=lambda n: n.index)
            self._parent[newer] = older

    def node(self, kind, primitive, params, args, shape, dtype, output=0) -> Node:
        """Return the node of a value; create it at the first call."""
        key = (kind, primitive, _hashable(params), args, tuple(shape), str(dtype), output)
        if key not in self._table:
            level = max((a.level for a in args), default=0) + (kind is Kind.REDUCED)
            made = Node(kind, primitive, params, args, tuple(shape), dtype, level, len(self._table))
            made.output = output
            self._table[key] = made
            if kind is Kind.ELEMENTWISE:
                for arg in args:
                    if arg.on_leaf:
                        self._unite(made, arg)
        return self._table[key]

    def literal(self, value: Any) -> Node:
        """Return the node of a number that is known while tracing."""
        value = np.asarray(value)
        return self.node(Kind.LITERAL, None, {"value": value.item()}, (), (), value.dtype)

    def input(self, aval: Any, name: str) -> Node:
        """Add the next argument."""
        made = Node(Kind.INPUT, None, {}, (), tuple(aval.shape), aval.dtype, 0, len(self._table))
        self._table[("input", len(self.inputs))] = made
        self.inputs.append(made)
        self.names[made] = name
        return made

    def apply(self, primitive, params, args: Sequence[Node], avals: Sequence[Any]) -> list[Node]:
        """Return the results of one operation."""
        args, aval = tuple(args), avals[0]
        size = math.prod(aval.shape)
        if primitive.name in _WHERE_AND_WHEN:
            return list(args)
        on_leaf = [a for a in args if a.on_leaf]
        if not on_leaf:
            return self._apply_to_scalars(primitive, params, args, avals)
        if primitive.name in SAME_ORDER and size == args[0].size:
            return [self.node(Kind.ELEMENTWISE, primitive, params, args, aval.shape, aval.dtype)]
        if primitive.name in ELEMENTWISE:
            return [self.node(Kind.ELEMENTWISE, primitive, params, args, aval.shape, aval.dtype)]
        if primitive.name in REDUCTIONS and size == 1 and args[0].size > 1:
            if _is_exact_in_float32(args[0].dtype):
                return [self._reduce(primitive, params, args[0], aval)]
            return self._opaque(primitive, params, args, avals)
        if primitive is lax.dot_general_p and _is_inner_product(params, args, size):
            return [self._cast(self._bind(jnp.sum, self._bind(lax.mul, *args)), aval)]
        return self.add_opaque(
            primitive, params, args, avals, f"{primitive.name} is not elementwise"
        )

    def add_opaque(self, primitive, params, args: Sequence[Node], avals, why: str) -> list[Node]:
        """Return the results of an operation that XLA must run, even on leaves; `why` says why."""
        self.escapes += [(arg, why) for arg in args if arg.on_leaf]
        return self._opaque(primitive, params, tuple(args), avals)

    def _apply_to_scalars(self, primitive, params, args, avals) -> list[Node]:
        aval = avals[0]
        broadcast = any(a.kind is Kind.BROADCAST for a in args)
        if not broadcast:
            if primitive is lax.broadcast_in_dim_p and math.prod(aval.shape) > 1:
                return [self._broadcast(args[0], aval)]
            return self._opaque(primitive, params, args, avals)
        if primitive.name in SAME_ORDER and math.prod(aval.shape) == args[0].size:
            return [self._broadcast(args[0].args[0], aval)]
        if primitive.name in ELEMENTWISE:  # compute one scalar, then broadcast it
            bare = tuple(a.args[0] if a.kind is Kind.BROADCAST else a for a in args)
            (scalar,) = self._opaque(
                primitive, params, bare, [jax.ShapeDtypeStruct((), aval.dtype)]
            )
            return [self._broadcast(scalar, aval)]
        return self._opaque(primitive, params, args, avals)

    def _broadcast(self, scalar: Node, aval: Any) -> Node:
        if scalar.shape:
            scalar = self._bind(jnp.squeeze, scalar)
        return self.node(Kind.BROADCAST, None, {}, (scalar,), aval.shape, aval.dtype)

    def _opaque(self, primitive, params, args, avals) -> list[Node]:
        return [
            self.node(Kind.XLA, primitive, params, args, aval.shape, aval.dtype, output)
            for output, aval in enumerate(avals)
        ]

    def _reduce(self, primitive, params, x: Node, aval, depth: int = 2) -> Node:
        """Return the node of a statistic of `x`.

        If a scalar of the same level selects inside of `x`, the select is moved outside: the result
        is a select between the statistics of both choices. An example is `optax.safe_norm` in trust
        ratios. It takes the norm of an array that another norm selects. Without the move, the two
        norms would need two passes, one after the other.
        """
        predicate = self._scalar_predicate(x, set()) if x.level > 0 and depth else None
        if predicate is not None:
            choices = [self._choose(x, predicate, i, {}) for i in (0, 1)]
            if max(choice.level for choice in choices) < x.level:
                reduced = [self._reduce(primitive, params, c, aval, depth - 1) for c in choices]
                scalar = predicate.args[0] if predicate.kind is Kind.BROADCAST else predicate
                return self._bind(lax.select_n, scalar, *reduced)
        if not x.on_leaf:
            (result,) = self._opaque(primitive, params, (x,), [aval])
            return result
        return self.node(Kind.REDUCED, primitive, params, (x,), aval.shape, aval.dtype)

    def _scalar_predicate(self, x: Node, seen: set[Node]) -> Node | None:
        if x in seen or x.kind is not Kind.ELEMENTWISE:
            return None
        seen.add(x)
        if x.primitive is lax.select_n_p and len(x.args) == 3:
            which = x.args[0]
            if not which.on_leaf and which.level == x.level:
                return which
        found = (self._scalar_predicate(a, seen) for a in x.args)
        return next((p for p in found if p is not None), None)

    def _choose(self, x: Node, predicate: Node, i: int, memo: dict[Node, Node]) -> Node:
        """Return the node of `x` for the case that `predicate` equals `i`."""
        if x.kind is not Kind.ELEMENTWISE:
            return x
        if x not in memo:
            if x.primitive is lax.select_n_p and x.args[0] is predicate:
                memo[x] = self._choose(x.args[1 + i], predicate, i, memo)
            else:
                args = [self._choose(a, predicate, i, memo) for a in x.args]
                (memo[x],) = self.apply(x.primitive, x.params, args, [x])
        return memo[x]

    def _bind(self, function: Callable[..., Any], *args: Node, static: Any = ()) -> Node:
        """Return the result of `function(*args, *static)`.

        The function is traced, because the parameters of a primitive differ between versions of
        JAX.
        """
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args)
        (result,) = self.run(_jaxpr(function, shapes, static), [], args)
        return result

    def _cast(self, x: Node, aval: Any) -> Node:
        if x.dtype == aval.dtype:
            return x
        return self._bind(lax.convert_element_type, x, static=(aval.dtype,))

    def run(self, jaxpr: Jaxpr, consts: Sequence[Node], args: Sequence[Node]) -> list[Node]:
        """Return the results of a whole jaxpr."""
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Node:
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return self.literal(np.asarray(atom.val, aval.dtype))
            return values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            avals: list[Any] = [v.aval for v in eqn.outvars]
            inner = _CALLS.get(eqn.primitive.name)
            if inner is not None:
                results = self._call(eqn.params[inner], operands)
            elif not eqn.outvars:
                args, nothing = tuple(operands), np.dtype(bool)
                self.effects.append(
                    Node(Kind.XLA, eqn.primitive, eqn.params, args, (), nothing, 0, -1)
                )
                continue
            elif any(_is_away(v.aval) for v in (*eqn.invars, *eqn.outvars)):
                why = f"{eqn.primitive.name} moves it to host memory, or from there"
                results = self.add_opaque(eqn.primitive, eqn.params, operands, avals, why)
            elif eqn.primitive is lax.cond_p and (
                any(a.on_leaf for a in operands) or any(math.prod(a.shape) > 1 for a in avals)
            ):
                results = self._branch(eqn.params["branches"], operands[0], operands[1:])
            else:
                results = self.apply(eqn.primitive, eqn.params, operands, avals)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _call(self, jaxpr: Any, args: Sequence[Node]) -> list[Node]:
        """Inline a jaxpr with or without constants: in JAX 0.12, both are of the same type."""
        constants = [self.constant(c) for c in getattr(jaxpr, "consts", ())]
        return self.run(getattr(jaxpr, "jaxpr", jaxpr), constants, args)

    def constant(self, value: Any) -> Node:
        """Return the node of an array that an inner function closes over."""
        if np.ndim(value) == 0 and not isinstance(value, Tracer):
            return self.literal(np.asarray(value))
        made = self.input(jax.typeof(value), "a constant")
        made.params["value"] = value
        return made

    def _branch(self, branches, index: Node, args: Sequence[Node]) -> list[Node]:
        """Compute all branches, and return selects among their results."""
        chosen = self._call(branches[0], args)
        for i, branch in enumerate(branches[1:], start=1):
            reached = self._bind(operator.ge, index, static=(i,))
            later = self._call(branch, args)
            chosen = [
                a if a is b else self._bind(lax.select_n, reached, a, b)
                for a, b in zip(chosen, later, strict=True)
            ]
        return chosen


@functools.cache
def _jaxpr(function: Callable[..., Any], shapes: tuple[Any, ...], static: tuple[Any, ...]) -> Jaxpr:
    return jax.make_jaxpr(lambda *args: function(*args, *static))(*shapes).jaxpr


@dataclass
class Traced:
    """A step as a graph, and as the jaxpr from which the graph was read.

    Attributes:
      graph: the values; its inputs are the constants, then the arguments.
      closed: the step's jaxpr with its constants; XLA can run it.
      result: the shapes of the step's result, as a tree.
    """

    graph: Graph
    closed: Any
    result: Any

    @property
    def constants(self) -> list[Any]:
        """Arrays that the step closes over; they can be tracers."""
        return list(self.closed.consts)

    def by_xla(self, *flat: jax.Array) -> Any:
        """Run the step by XLA alone, on constants and arguments."""
        count = len(self.constants)
        outputs = jaxpr_as_fun(self.closed.replace(consts=list(flat[:count])))(*flat[count:])
        return jax.tree.unflatten(jax.tree.structure(self.result), outputs)


def trace(step: Callable[..., Any], values: Sequence[Any], names: Sequence[str]) -> Traced:
    """Read `step(*values)` into a graph.

    Args:
      step: a function of arrays.
      values: arrays, or their shapes.
      names: names of the values, for messages.
    """
    shapes = [_type(x) for x in values]
    closed, result = jax.make_jaxpr(step, return_shape=True)(*shapes)
    graph = Graph()
    constants = [graph.input(jax.typeof(c), "a constant") for c in closed.consts]
    arguments = [graph.input(x, name) for x, name in zip(shapes, names, strict=True)]
    graph.outputs = graph.run(closed.jaxpr, constants, arguments)
    return Traced(graph, closed, result)


def is_array(x: Any) -> bool:
    """Return whether `x` is an array, a tracer or a shape, not a Python number or another leaf."""
    return hasattr(x, "dtype") and hasattr(x, "shape")


def paths(tree: Any) -> list[str]:
    """Return the path of each leaf, for messages and to look up shardings."""
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]


def types(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the types of a result, like `jax.eval_shape`, but including memory spaces."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), map(_type, jaxpr.out_avals))


def _type(x: Any) -> Any:
    """Return the type of `x` (shape, dtype, weak type and memory space) without its sharding."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
    if not _is_away(jax.typeof(x) if isinstance(x, jax.Array) else x):
        return shape
    return jax.make_jaxpr(lambda x: jax.device_put(x, jax.memory.Space.Host))(shape).out_avals[0]


def _is_away(type_: Any) -> bool:
    """Return whether an array of this type is in host memory, which kernels can't access."""
    return getattr(type_, "memory_space", None) == jax.memory.Space.Host


# Operations that keep the values. They only set where values are stored, or when they are computed.
_WHERE_AND_WHEN = frozenset(("mesh_cast", "optimization_barrier", "reshard", "sharding_constraint"))


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


def _is_exact_in_float32(dtype: Any) -> bool:
    """Return whether partial statistics may be float32.

    They may not for float64, nor for integers, since counts can exceed 2^24.
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4
    return narrow or jnp.issubdtype(dtype, jnp.bool_)


def _is_inner_product(params, args, size) -> bool:
    (left, right), (batch, _) = params["dimension_numbers"]
    same = tuple(left) == tuple(right) and args[0].shape == args[1].shape
    return size == 1 and same and not batch and args[0].on_leaf and args[1].on_leaf


def _hashable(params: dict[str, Any]) -> Any:
    """Return a key that is equal for equal parameters.

    Shardings are ignored, because they don't matter inside one device's step.
    """
    items: Iterable[tuple[str, Any]] = sorted(params.items())
    key = tuple((k, v) for k, v in items if k not in ("sharding", "out_sharding"))
    try:
        hash(key)
    except TypeError:
        return id(params)
    return key
