"""Steps outside of `jit`: compiled once for equal structures, types and shardings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from pallas_kernels.shardings import of_value
from pallas_kernels.trace import is_array, paths

# Compiled programs that one step keeps: enough for several groups of parameters, or options.
_PROGRAMS = 32


class ClosesOverTracerError(Exception):
    """The step closes over a tracer, so later calls must not reuse the compiled program."""


def compile_once(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Make `execute(arguments, placed)` compile at the first of several equal calls.

    Arrays are inputs of the compiled program. There is one program for each combination of the
    rest: structure, types, shardings, booleans and strings. A step is not compiled here if an
    argument is a tracer (under `jit` and other transformations), a Python number (its value may
    decide what the chain does) or another object, such as a function. It is not compiled either if
    it closes over a tracer.

    Args:
      execute: a function that runs a step. It takes a tree of arguments, and the shardings of some
        of its leaves by their paths. With `kept=True`, it must raise a `ClosesOverTracerError` if
        the step closes over a tracer.
    """

    @functools.lru_cache(_PROGRAMS)
    def program(structure, options, shardings, placed) -> Callable[..., Any]:
        def on_arrays(*arrays):
            rest = iter(arrays)
            leaves = [next(rest) if option is None else option[1] for option in options]
            arguments = jax.tree.unflatten(structure, leaves)
            known = dict(zip(paths(arguments), shardings, strict=True)) | dict(placed)
            return execute(arguments, known, kept=True)

        return jax.jit(on_arrays)

    def run(arguments: Any, placed: Mapping[str, NamedSharding]) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        if not (_is_hashable(structure) and all(map(_can_be_kept, leaves))):
            return execute(arguments, placed)
        arrays = [x for x in leaves if is_array(x)]
        # Types are included, because values of different types can be equal.
        options = tuple(None if is_array(x) else (type(x), x) for x in leaves)
        shardings = tuple(map(_sharding, leaves))
        try:
            return program(structure, options, shardings, frozenset(placed.items()))(*arrays)
        except ClosesOverTracerError:
            return execute(arguments, placed)

    return run


def _can_be_kept(leaf: Any) -> bool:
    return isinstance(leaf, bool | str) or (is_array(leaf) and not isinstance(leaf, Tracer))


def _is_hashable(structure: Any) -> bool:
    try:
        hash(structure)
    except TypeError:
        return False
    return True


def _sharding(x: Any) -> NamedSharding | None:
    """Return the array's sharding, unless a tracer of the array has it in its type."""
    sharding = of_value(x) if is_array(x) else None
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    return sharding
