"""Steps outside of `jit`: compiled once for equal structures, types and shardings."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from pallas_kernels.compile import Static, split
from pallas_kernels.shardings import of_value
from pallas_kernels.trace import paths

# Compiled programs that one step keeps: enough for several groups of parameters, or options.
_PROGRAMS = 32


class ClosesOverTracerError(Exception):
    """The step closes over a tracer, so later calls must not reuse the compiled program."""


def compile_once(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Make `execute(arguments, shardings_by_path)` compile at the first of several equal calls.

    Arrays are inputs of the compiled program. There is one program for each combination of the
    rest: structure, types, shardings, booleans and strings. A program is not kept if an
    argument is a tracer (under `jit` and other transformations), a Python number (its value may
    decide what the chain does) or another object, such as a function. It is not kept either if
    it closes over a tracer.

    Args:
      execute: a function that runs a step. It takes a tree of arguments, and the shardings of some
        of its leaves by their paths. With `cached=True`, it must raise a `ClosesOverTracerError` if
        the step closes over a tracer.
    """

    @functools.lru_cache(_PROGRAMS)
    def program(
        static: Static,
        shardings: tuple[NamedSharding | None, ...],
        shardings_by_path: frozenset[tuple[str, NamedSharding]],
    ) -> Callable[..., Any]:
        def on_arrays(*arrays: jax.Array) -> Any:
            arguments = static.fill(arrays)
            names = itertools.compress(paths(arguments), static.is_given)
            known = dict(zip(names, shardings, strict=True)) | dict(shardings_by_path)
            return execute(arguments, known, cached=True)

        return jax.jit(on_arrays)

    def run(arguments: Any, shardings_by_path: Mapping[str, NamedSharding]) -> Any:
        static, arrays = split(arguments)
        numbers = any(not isinstance(x, bool | str) for _, x in static.options)
        if numbers or not static.is_plain or any(isinstance(x, Tracer) for x in arrays):
            return execute(arguments, shardings_by_path)
        shardings = tuple(map(_sharding, arrays))
        try:
            return program(static, shardings, frozenset(shardings_by_path.items()))(*arrays)
        except ClosesOverTracerError:
            return execute(arguments, shardings_by_path)

    return run


def _sharding(x: Any) -> NamedSharding | None:
    """Return the array's sharding, unless a tracer of the array has it in its type."""
    sharding = of_value(x)
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    return sharding
