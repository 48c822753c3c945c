"""A call that suppresses one known warning while it is lowered.

Pallas' Triton backend warns of its deprecation each time a kernel is lowered. This happens inside
the user's own `jit`, but users can't act on the warning. A library should not set a filter for the
whole process. So the call is a primitive, and only its lowering suppresses the warning.
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
    """Call `function(*operands)`, which returns a list of arrays; works only under `jit`."""
    return _call_p.bind(*operands, function=function)


@_call_p.def_abstract_eval
def _shapes(*operands, function):
    return [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(function, *operands)]


def _lower(ctx, *operands, function):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _MESSAGE, DeprecationWarning)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


mlir.register_lowering(_call_p, _lower)
