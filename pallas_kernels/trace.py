"""The trace of a step on the types of its arguments, and its graph, read from the jaxpr.

Calls are inlined, and branches with arrays become selects. This module does not depend on a backend
or an optimizer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun

from pallas_kernels import rewrites
from pallas_kernels.graph import Graph, Kind, Node, Operation
from pallas_kernels.ops import ELEMENTWISE, REDUCTIONS, ROW_REDUCTIONS, SAME_ORDER

# At most this many nested selects are moved out of one reduction.
_MOVED_SELECTS = 2
_HOST = jax.memory.Space.Host


@dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """A step as a graph, and as the jaxpr from which the graph was read.

    Attributes:
      graph: the values; its inputs are the arguments, then the constants.
      closed: the step's jaxpr with its constants; XLA can run it.
      structure: the structure of the step's result.
      constants: arrays that the step closes over; they can be tracers.
    """

    graph: Graph
    closed: Any
    structure: Any
    constants: tuple[Any, ...]

    def by_xla(self, *flat: jax.Array) -> list[jax.Array]:
        """Compute the step's results by XLA alone, from its arguments and constants."""
        count = len(self.closed.in_avals)
        consts = list(flat[count : count + len(self.closed.consts)])
        return jaxpr_as_fun(self.closed.replace(consts=consts))(*flat[:count])


def jaxpr_of(step: Callable[..., Any], types: Sequence[Any]) -> tuple[Any, Any]:
    """Return the jaxpr of `step`, and the shapes of its result as a tree.

    JAX returns the same jaxpr again for the same function, equal types and equal settings.
    """
    return jax.make_jaxpr(step, return_shape=True)(*types)


def read(closed: Any, structure: Any, names: Sequence[str]) -> Traced:
    """Read the jaxpr of a step into a graph.

    Args:
      closed: the jaxpr.
      structure: the structure of the step's result.
      names: names of the arguments, for messages.
    """
    reader = _Reader()
    graph = reader.graph
    arguments = [graph.input(x, name) for x, name in zip(closed.in_avals, names, strict=True)]
    constants = [reader.array(x) for x in closed.consts]
    graph.outputs = reader.run(closed.jaxpr, constants, arguments)
    return Traced(graph, closed, structure, tuple(reader.constants))


class _Reader:
    """A reader of jaxprs, which adds their values to a graph.

    Attributes:
      graph: the graph.
      constants: the arrays among the inputs that the step closes over.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.constants: list[Any] = []

    def run(self, jaxpr: Jaxpr, consts: Sequence[Node], args: Sequence[Node]) -> list[Node]:
        """Return the results of a whole jaxpr."""
        values: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Node:
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return self.graph.literal(np.asarray(atom.val, aval.dtype))
            return values[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[Node]) -> list[Node]:
        primitive = eqn.primitive
        inner = _CALLS.get(primitive.name)
        if inner is not None:
            return self.call(eqn.params[inner], args)
        op = Operation(primitive, eqn.params, args, [v.aval for v in eqn.outvars])
        if not op.types:
            self.graph.effect(op)
            return []
        for atom in (*eqn.invars, *eqn.outvars):
            if _is_in_host_memory(atom.aval):
                return self._escape(op, f"{primitive.name} moves it to or from host memory")
        if primitive is lax.cond_p and (
            any(a.on_leaf for a in args) or any(t.size > 1 for t in op.types)
        ):
            if eqn.effects or not all(map(_is_cheap, eqn.params["branches"])):
                return self._escape(op, "cond has branches with effects or work for XLA")
            index, *rest = args
            branches = [functools.partial(self.call, b, rest) for b in eqn.params["branches"]]
            return rewrites.select_branches(self, index, branches)
        return self.apply(op)

    def call(self, jaxpr: Any, args: Sequence[Node]) -> list[Node]:
        """Inline a jaxpr with or without constants: in JAX 0.12, both are of the same type."""
        constants = [self.constant(c) for c in getattr(jaxpr, "consts", ())]
        return self.run(getattr(jaxpr, "jaxpr", jaxpr), constants, args)

    def constant(self, value: Any) -> Node:
        """Return the node of a value that an inner function closes over."""
        is_key = jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended)
        if np.ndim(value) == 0 and not isinstance(value, Tracer) and not is_key:
            return self.graph.literal(value)
        return self.array(value)

    def array(self, value: Any) -> Node:
        """Return the node of an array that the step closes over."""
        self.constants.append(value)
        return self.graph.input(jax.typeof(value), "a constant")

    def apply(self, op: Operation) -> list[Node]:
        """Return the results of one operation."""
        name, first, result = op.primitive.name, op.args[0] if op.args else None, op.types[0]
        if name in _NO_ARITHMETIC:
            return list(op.args)
        if first is None or not any(a.on_leaf for a in op.args):
            return self._apply_to_scalars(op)
        elementwise = name in ELEMENTWISE and not _changes_width(op)
        if elementwise or (name in SAME_ORDER and result.size == first.size):
            return self.graph.results(Kind.ELEMENTWISE, op)
        if _reduces_rows(op) or _spreads_over_rows(op):
            return self.graph.results(Kind.ELEMENTWISE, op)
        if name in REDUCTIONS and result.size == 1 and first.size > 1:
            if _can_reduce_in_float32(first.dtype):
                return [self._reduce(op)]
            return self.graph.results(Kind.XLA, op)
        if op.primitive is lax.dot_general_p:
            product = rewrites.inner_product(self, op)
            if product is not None:
                return [product]
        return self._escape(op, f"{name} is not elementwise")

    def bind(self, function: Callable[..., Any], *args: Node, static: tuple[Any, ...] = ()) -> Node:
        """Return the result of `function(*args, *static)`.

        The function is traced, because the parameters of a primitive differ between versions of
        JAX.
        """
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args)
        (result,) = self.run(_jaxpr(function, shapes, static), [], args)
        return result

    def _apply_to_scalars(self, op: Operation) -> list[Node]:
        result = op.types[0]
        if not any(a.kind is Kind.BROADCAST for a in op.args):
            if (literal := self._converted_literal(op)) is not None:
                return [literal]
            if op.primitive is lax.broadcast_in_dim_p and result.size > 1:
                return [self._broadcast(op.args[0], result)]
        elif op.primitive.name in SAME_ORDER and result.size == op.args[0].size:
            return [self._broadcast(op.args[0].args[0], result)]
        elif op.primitive.name in ELEMENTWISE:  # compute one scalar, then broadcast it
            bare = [a.args[0] if a.kind is Kind.BROADCAST else a for a in op.args]
            type_ = jax.ShapeDtypeStruct((), result.dtype)
            (scalar,) = self.graph.results(Kind.XLA, op._replace(args=bare, types=[type_]))
            return [self._broadcast(scalar, result)]
        return self.graph.results(Kind.XLA, op)

    def _converted_literal(self, op: Operation) -> Node | None:
        """Return a literal of another dtype, which a kernel can contain, if it is exact."""
        if op.primitive is not lax.convert_element_type_p or op.args[0].kind is not Kind.LITERAL:
            return None
        number = op.args[0].number
        with np.errstate(all="ignore"):
            converted = number.astype(op.types[0].dtype)
            is_exact = np.array_equal(converted.astype(number.dtype), number, equal_nan=True)
        return self.graph.literal(converted) if is_exact else None

    def _broadcast(self, scalar: Node, type_: Any) -> Node:
        if scalar.shape:
            scalar = self.bind(jnp.squeeze, scalar)
        return self.graph.node(Kind.BROADCAST, None, {}, (scalar,), type_.shape, type_.dtype)

    def _escape(self, op: Operation, why: str) -> list[Node]:
        """Return the results of an operation that XLA must run, even on leaves."""
        self.graph.escapes += [(arg, why) for arg in op.args if arg.on_leaf]
        return self.graph.results(Kind.XLA, op)

    def _reduce(self, op: Operation, depth: int = _MOVED_SELECTS) -> Node:
        """Return the node of a statistic."""
        (x,) = op.args
        if depth:
            chosen = rewrites.statistics_of_choices(
                self, x, lambda choice: self._reduce(op._replace(args=[choice]), depth - 1)
            )
            if chosen is not None:
                return chosen
        (result,) = self.graph.results(Kind.REDUCED if x.on_leaf else Kind.XLA, op)
        return result


@functools.cache
def _jaxpr(function: Callable[..., Any], shapes: tuple[Any, ...], static: tuple[Any, ...]) -> Jaxpr:
    return jax.make_jaxpr(lambda *args: function(*args, *static))(*shapes).jaxpr


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
    return jax.tree.unflatten(jax.tree.structure(shapes), map(type_of, jaxpr.out_avals))


def type_of(x: Any) -> Any:
    """Return the type of `x` (shape, dtype, weak type and memory space) without its sharding."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
    if not _is_in_host_memory(jax.typeof(x) if isinstance(x, jax.Array) else x):
        return shape
    return jax.make_jaxpr(lambda x: jax.device_put(x, _HOST))(shape).out_avals[0]


def _is_in_host_memory(type_: Any) -> bool:
    """Return whether an array of this type is in host memory, which kernels can't access."""
    return getattr(type_, "memory_space", None) is _HOST


# Operations that keep the values, and only set where they are stored or when they are computed.
_NO_ARITHMETIC = frozenset(("mesh_cast", "optimization_barrier", "reshard", "sharding_constraint"))


# Operations that make an array of a scalar.
_CREATED = frozenset(("broadcast_in_dim", "iota"))


_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
}


def _changes_width(op: Operation) -> bool:
    """Return whether the operation is a bitcast that changes the number of elements."""
    bitcast = op.primitive is lax.bitcast_convert_type_p
    return bitcast and op.args[0].dtype.itemsize != op.types[0].dtype.itemsize


def _is_cheap(jaxpr: Any) -> bool:
    """Return whether a branch contains only what kernels compute, so that it may always run."""

    def is_cheap(eqn: Any) -> bool:
        name = eqn.primitive.name
        if eqn.primitive is lax.cond_p:
            return all(map(_is_cheap, eqn.params["branches"]))
        if name in _CALLS:
            return _is_cheap(eqn.params[_CALLS[name]])
        computed = ELEMENTWISE | SAME_ORDER | REDUCTIONS.keys() | _NO_ARITHMETIC | _CREATED
        return name in computed or all(v.aval.size <= 1 for v in (*eqn.invars, *eqn.outvars))

    return all(map(is_cheap, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _reduces_rows(op: Operation) -> bool:
    """Return whether the operation reduces the last axes to more than one value."""
    x, result = op.args[0], op.types[0]
    if op.primitive.name not in ROW_REDUCTIONS or result.size <= 1 or x.size == result.size:
        return False
    axes = tuple(sorted(op.params["axes"]))
    last = tuple(range(len(x.shape) - len(axes), len(x.shape)))
    return axes == last and _can_reduce_in_float32(x.dtype)


def _spreads_over_rows(op: Operation) -> bool:
    """Return whether the operation repeats each element along new last axes."""
    x, result = op.args[0], op.types[0]
    if op.primitive is not lax.broadcast_in_dim_p or not x.on_leaf:
        return False
    kept = op.params["broadcast_dimensions"]
    long = [(axis, size) for axis, size in zip(kept, x.shape, strict=True) if size > 1]
    wide = [(axis, size) for axis, size in enumerate(result.shape) if size > 1]
    return wide[: len(long)] == long


def _can_reduce_in_float32(dtype: Any) -> bool:
    """Return whether partial statistics may be float32.

    They may not for float64, nor for integers, since counts can exceed 2^24.
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4
    return narrow or jnp.issubdtype(dtype, jnp.bool_)
