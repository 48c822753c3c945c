"""Steps outside of `jit`: compiled once for a structure, types and shardings, and kept."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from pallas_kernels.shardings import of_value
from pallas_kernels.trace import is_array, paths

# What is kept of one step: enough for several groups of parameters, or several options.
_PROGRAMS = 32
_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class ClosesOverTracerError(Exception):
    """The step closes over a tracer, so no later call may use what is compiled."""


def compile_once(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Make `execute(arguments, placed)` compile at the first of several equal calls.

    Under `jit` and other transformations of the arguments it runs as it is. As `jit` does it,
    arrays and Python's numbers are what a program takes. What it is compiled for is the rest:
    structure, types, shardings, truth values and names. A step that needs a number's value, that
    is given a function, or that closes over a tracer is not compiled.

    Args:
      execute: a function of a tree of arguments, of the shardings of some of them by their paths,
        and of whether it must refuse to close over tracers by a `ClosesOverTracerError`.
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
        # With their types, for 1 equals True.
        options = tuple(None if _is_number(x) else (type(x), x) for x in leaves)
        shardings = tuple(map(_sharding, leaves))
        try:
            return program(structure, options, shardings, frozenset(placed.items()))(*numbers)
        except (ClosesOverTracerError, *_NEEDS_A_VALUE):
            return execute(arguments, placed)

    return run


def _is_number(x: Any) -> bool:
    """Tell whether a program takes the leaf; truth values are options."""
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
    """Return the sharding, if a tracer in the array's place would not know it."""
    sharding = of_value(x) if is_array(x) else None
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    return sharding
