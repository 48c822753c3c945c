"""A call that keeps one known warning of its lowering to itself.

Pallas' Triton backend warns of its deprecation each time a kernel is lowered, which happens deep
inside the user's own `jit`. The warning is ours to act on, not his, and a filter for the process is
not ours to set: so the call becomes a primitive, whose lowering catches it where it is raised.
"""

import warnings
from collections.abc import Callable, Sequence

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

_MESSAGE = "The Pallas Triton backend is deprecated"

_call_p = Primitive("quiet_call")
_call_p.multiple_results = True


def call(function: Callable[..., Sequence[jax.Array]], *operands: jax.Array) -> list[jax.Array]:
    """`function(*operands)`, for a function of arrays to a list of them; only under `jit`."""
    return _call_p.bind(*operands, function=function)


@_call_p.def_abstract_eval
def _shapes(*operands, function):
    return [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(function, *operands)]


def _lower(ctx, *operands, function):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _MESSAGE, DeprecationWarning)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_call_p, _lower)
