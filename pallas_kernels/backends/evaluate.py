"""The arithmetic of kernels, which is the same for all backends.

Arithmetic on narrow dtypes is done in 32 bits, and the result is rounded to the narrow dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arithmetic import maximum, minimum
from pallas_kernels.ops import Target
from pallas_kernels.program import Body, Input, Number, Op, Predicate, Ref, Scalar

_WIDE = {"bfloat16": "float32", "float16": "float32", "int8": "int32", "uint8": "int32"}
_MOVES = frozenset(("convert_element_type", "copy", "stop_gradient"))


def evaluate(
    body: Body,
    blocks: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    shape: tuple[int, ...],
    target: Target,
) -> list[jax.Array]:
    """Return the roots' values for one block.

    Args:
      body: what to compute.
      blocks: one block of each input, of shape `shape`.
      scalars: the values of the body's scalars.
      shape: the shape of a block; `()` for a single element.
      target: the backend whose kernel this is.
    """
    done: list[jax.Array] = []

    def value(ref: Ref) -> jax.Array:
        match ref:
            case Input(i):
                x = blocks[i]
            case Scalar(i):
                x = scalars[i]
            case Number():
                x = jnp.asarray(ref.value)
            case _:
                x = done[ref.index]
        return jnp.broadcast_to(x, shape)

    for op in body.ops:
        operands = [value(ref) for ref in op.operands]
        done.append(_apply(op, operands, target))
    return [value(root.value) for root in body.roots]


def _apply(op: Op, operands: Sequence[jax.Array], target: Target) -> jax.Array:
    name, params = op.primitive.name, dict(op.params)
    function: Callable[..., Any] = target.support(name).rewrite or op.primitive.bind
    if name in _MOVES or not any(x.dtype.name in _WIDE for x in operands):
        return function(*operands, **params)
    result = function(*(x.astype(_WIDE.get(x.dtype.name, x.dtype)) for x in operands), **params)
    # The first operand of a select is its index. The exponent of `pow` may be an integer.
    narrow = operands[1 if name == "select_n" else 0].dtype
    return result if result.dtype == bool else result.astype(narrow)


def holds(needed: Predicate, scalars: Sequence[jax.Array]) -> jax.Array:
    """Return whether a condition is met."""
    assert isinstance(needed.scalar, Scalar)
    value = scalars[needed.scalar.index]
    return value if needed.value else jnp.logical_not(value)


def identity_of(reduction: str) -> Any:
    """Return the neutral element of a reduction."""
    return np.float32({"sum": 0.0, "max": -np.inf, "min": np.inf}[reduction])


def or_nan(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Make a reduction return NaN if an element is NaN; Triton's reductions ignore NaN."""

    def reduced(x: jax.Array) -> jax.Array:
        missing = jnp.sum(jnp.where(x != x, jnp.ones_like(x), jnp.zeros_like(x)))
        return jnp.where(missing > 0, jnp.asarray(jnp.nan, x.dtype), reduce(x))

    return reduced


REDUCE: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum,
    "max": or_nan(jnp.max),
    "min": or_nan(jnp.min),
}
COMBINE: dict[str, Callable[..., Any]] = {"sum": jnp.add, "max": maximum, "min": minimum}
