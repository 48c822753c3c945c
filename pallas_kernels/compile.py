"""`Compiled`: a step that is traced, placed and planned; `fuse` runs it, `explain` prints it.

A `Compiled` depends on structure, types and shardings of the step's arguments, and contains none of
their arrays. So later calls reuse it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from pallas_kernels.arguments import (
    check_gradients,
    check_parameters,
    check_structures,
    check_updates,
    notes_on_integer_parameters,
)
from pallas_kernels.backends import BACKENDS
from pallas_kernels.graph import Graph, Kind, Node
from pallas_kernels.placement import Placement, infer_placement
from pallas_kernels.plan import Plan, plan
from pallas_kernels.shardings import of_value
from pallas_kernels.trace import Traced, is_array, jaxpr_of, paths, read, type_of

# Traces, and plans, that one step keeps: enough for several groups of parameters, or options.
_KEPT = 32


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """A step that is ready to run.

    Attributes:
      traced: the step.
      placement: the shardings of its leaves.
      plan: what to launch.
      backend: the name of the backend.
      fallback_reasons: a line with name and reason for each leaf that needs XLA.
    """

    traced: Traced
    placement: Placement
    plan: Plan
    backend: str
    fallback_reasons: tuple[str, ...]

    def __repr__(self) -> str:
        """Return a short text: a jaxpr that is printed contains it."""
        launches = sum(len(phase.launches) for phase in self.plan.phases)
        return f"<step by {self.backend} in {launches} launches>"

    @property
    def runs_chain(self) -> bool:
        """True if the chain must run instead: see `Placement.explicit`."""
        return bool(self.fallback_reasons) and self.placement.explicit

    @property
    def closes_over_tracer(self) -> bool:
        """True if the step closes over a tracer, so that later calls must not reuse it."""
        return any(isinstance(x, Tracer) for x in self.traced.constants)


class Compiler:
    """Compiles a function of trees of arrays, and keeps the results.

    Attributes:
      function: the function. Its leading results may reuse the memory of its leading arguments.
    """

    def __init__(self, function: Callable[..., Any], in_place: int) -> None:
        """Create a compiler with an empty cache.

        Args:
          function: the function.
          in_place: the number of leading arguments whose memory the results may reuse.
        """
        self.function = function
        self._in_place = in_place
        self._on_arrays = functools.lru_cache(_KEPT)(self._make_on_arrays)
        self._read = functools.lru_cache(_KEPT)(read)
        self._plan = functools.lru_cache(_KEPT)(_plan)

    def __call__(
        self,
        arguments: tuple[Any, ...],
        backend: str,
        shardings_by_path: Mapping[str, NamedSharding],
    ) -> tuple[Compiled, list[Any]]:
        """Compile the function for a backend; return the arrays among its arguments, too.

        Args:
          arguments: trees of arrays, tracers or shapes, and of other values.
          backend: one of `BACKENDS`.
          shardings_by_path: shardings by the paths of the arguments' leaves. Other leaves have the
            shardings of their values.
        """
        closed, result, names, values = self.trace(arguments)
        traced = self._read(closed, jax.tree.structure(result), names)
        count = self._written(arguments, result)
        shardings = tuple(
            shardings_by_path.get(name) or of_value(x)
            for name, x in zip(names, values, strict=True)
        )
        compiled = self._plan(traced, shardings, count, backend)
        if compiled.closes_over_tracer:
            for cache in (self._on_arrays, self._read, self._plan):
                cache.cache_clear()
        return compiled, values

    def trace(self, arguments: tuple[Any, ...]) -> tuple[Any, Any, tuple[str, ...], list[Any]]:
        """Return the function's jaxpr, the shapes of its result, and paths and arrays of arguments.

        Equal calls trace once, except those with arguments that are not hashed by value, such as
        functions.
        """
        static, values = split(arguments)
        make = self._on_arrays if static.is_plain else self._make_on_arrays
        function, names = make(static)
        closed, result = jaxpr_of(function, [type_of(x) for x in values])
        return closed, result, names, values

    def _make_on_arrays(self, static: "Static") -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return a function of the arrays alone, and their paths."""

        def on_arrays(*arrays: Any) -> Any:
            return self.function(*static.fill(arrays))

        every = paths(static.fill(itertools.repeat(0)))
        return on_arrays, tuple(itertools.compress(every, static.is_given))

    def _written(self, arguments: tuple[Any, ...], result: Any) -> int:
        """Return the number of leading results that may reuse the memory of arguments."""
        written = jax.tree.leaves(arguments[: self._in_place])
        count = len(jax.tree.leaves(result[: self._in_place]))
        return count if count == len(written) and all(map(is_array, written)) else 0


@dataclass(frozen=True)
class Static:
    """The contents of arguments besides arrays.

    Attributes:
      structure: the structure of their tree.
      is_given: for each leaf, whether it is an array.
      options: the other leaves, with their types, because `True` equals 1.
    """

    structure: Any
    is_given: tuple[bool, ...]
    options: tuple[tuple[type, Any], ...]

    @property
    def is_plain(self) -> bool:
        """Whether equal values mean equal steps; with a function among the options they do not."""
        try:
            hash(self.structure)
        except TypeError:
            return False
        return all(isinstance(x, bool | int | float | complex | str) for _, x in self.options)

    def fill(self, arrays: Iterable[Any]) -> Any:
        """Return the arguments that contain these arrays."""
        given, options = iter(arrays), iter(self.options)
        leaves = [next(given) if is_given else next(options)[1] for is_given in self.is_given]
        return jax.tree.unflatten(self.structure, leaves)


def split(arguments: Any) -> tuple[Static, list[Any]]:
    """Return what arguments contain besides arrays, and the arrays."""
    leaves, structure = jax.tree.flatten(arguments)
    options = tuple((type(x), x) for x in leaves if not is_array(x))
    is_given = tuple(map(is_array, leaves))
    return Static(structure, is_given, options), [x for x in leaves if is_array(x)]


def whole_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return one function that computes the updates and applies them."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, grads: Any, extra_args: dict[str, Any]) -> Any:
        check_parameters(params)
        check_gradients(params, grads)
        try:
            updates, new_state = tx.update(grads, state, params, **extra_args)
            check_updates(params, updates)
            return optax.apply_updates(params, updates), new_state
        except Exception as error:
            check_structures(tx, params, state, grads)
            for line in notes_on_integer_parameters(params):
                error.add_note(line)
            raise

    return step


def _plan(
    traced: Traced, shardings: tuple[NamedSharding | None, ...], in_place: int, backend: str
) -> Compiled:
    constants = tuple(of_value(x) for x in traced.constants)
    placement = infer_placement(traced.graph, shardings + constants)
    planned = plan(traced.graph, in_place, BACKENDS[backend].target, placement)
    reasons = tuple(_fallback_reasons(traced.graph, planned))
    return Compiled(traced, placement, planned, backend, reasons)


def _fallback_reasons(graph: Graph, planned: Plan) -> list[str]:
    """Return the lines of `Compiled.fallback_reasons`.

    XLA computes such a leaf itself, or an array that the leaf's kernel reads.
    """
    names: dict[Node, str] = {}
    for node in graph.inputs:
        if node.on_leaf:
            names.setdefault(graph.component(node), graph.names[node])
    reasons = {c: reason for c, reason in planned.reasons.items() if c in names}
    for phase in planned.phases:
        for program in phase.programs:
            for node in program.inputs:
                if node.kind is Kind.XLA and graph.component(node) in names:
                    why = f"{_origin(node)} is not elementwise"
                    reasons.setdefault(graph.component(node), why)
    return [f"{names[component]}: {reason}" for component, reason in reasons.items()]


def _origin(node: Node) -> str:
    """Return the name of the operation that first made the array, such as random bits."""
    while sources := [a for a in node.args if a.size > 1 and a.primitive and a.on_leaf]:
        node = sources[0]
    return node.operation
