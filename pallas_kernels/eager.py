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
_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class ClosesOverTracerError(Exception):
    """The step closes over a tracer, so later calls must not reuse the compiled program."""


def compile_once(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Make `execute(arguments, placed)` compile at the first of several equal calls.

    As under `jit`, arrays and Python's numbers are inputs of the compiled program. There is one
    program for each combination of the rest: structure, types, shardings, booleans and strings.
    A step is not compiled here if an argument is a tracer (under `jit` and other transformations)
    or another object, such as a function. It is not compiled either if it needs the value of a
    number, or if it closes over a tracer.

    Args:
      execute: a function that runs a step. It takes a tree of arguments, and the shardings of some
        of its leaves by their paths. With `kept=True`, it must raise a `ClosesOverTracerError` if
        the step closes over a tracer.
    """

    @functools.lru_cache(_PROGRAMS)
    def program(structure, options, shardings, placed) -> Callable[..., Any]:
        def on_numbers(*numbers):
            rest = iter(numbers)
            leaves = [next(rest) if option is None else option[1] for option in options]
            arguments = jax.tree.unflatten(structure, leaves)
            known = dict(zip(paths(arguments), shardings, strict=True)) | dict(placed)
            return execute(arguments, known, kept=True)

        return jax.jit(on_numbers)

    def run(arguments: Any, placed: Mapping[str, NamedSharding]) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        if not (_is_hashable(structure) and all(map(_can_be_kept, leaves))):
            return execute(arguments, placed)
        numbers = [x for x in leaves if _is_number(x)]
        # Types are included, because values of different types can be equal.
        options = tuple(None if _is_number(x) else (type(x), x) for x in leaves)
        shardings = tuple(map(_sharding, leaves))
        try:
            return program(structure, options, shardings, frozenset(placed.items()))(*numbers)
        except (ClosesOverTracerError, *_NEEDS_A_VALUE):
            return execute(arguments, placed)

    return run


def _is_number(x: Any) -> bool:
    """Return whether the leaf is an input of the program; booleans are options instead."""
    return is_array(x) or (isinstance(x, int | float | complex) and not isinstance(x, bool))


def _can_be_kept(leaf: Any) -> bool:
    if isinstance(leaf, Tracer):
        return False
    return _is_number(leaf) or isinstance(leaf, bool | str)


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
