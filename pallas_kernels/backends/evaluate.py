"""The arithmetic of kernels, which is the same for all backends.

Arithmetic on narrow dtypes is done in 32 bits, and the result is rounded to the narrow dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.arithmetic import maximum, minimum
from pallas_kernels.ops import REDUCTIONS, ROW_REDUCTIONS, Target
from pallas_kernels.program import Body, Input, Number, Op, Predicate, Ref, Scalar

_WIDE = {"bfloat16": "float32", "float16": "float32"} | dict.fromkeys(
    ("int8", "uint8", "int16"), "int32"
)
# A backend caches the kernels of a few steps, so that `jit` lowers each kernel only once.
KERNEL_CACHE_SIZE = 256
_MOVES = frozenset(("convert_element_type", "copy", "stop_gradient"))


class BlockShape(Protocol):
    """The shapes of a block's values.

    In all functions, `row` is how many elements of the leaf share one element of the result.
    """

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of a value."""
        ...

    def spread(self, x: jax.Array, row: int) -> jax.Array:
        """Repeat the elements of a value of longer rows."""
        ...

    def reduce(self, x: jax.Array, row: int, reduce: Callable[..., jax.Array]) -> jax.Array:
        """Reduce a value of shorter rows by `reduce(..., axis=...)`."""
        ...


def evaluate(
    body: Body,
    blocks: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    block_shape: BlockShape,
    target: Target,
) -> list[jax.Array]:
    """Return the roots' values for one block.

    Args:
      body: what to compute.
      blocks: one block of each input.
      scalars: the values of the body's scalars.
      block_shape: the shapes of the block's values.
      target: the backend whose kernel this is.
    """
    done: list[jax.Array] = []

    def value(ref: Ref, row: int) -> jax.Array:
        match ref:
            case Input():
                x = blocks[ref.index]
            case Scalar():
                x = scalars[ref.index]
            case Number():
                x = jnp.asarray(ref.value)
            case _:
                x = done[ref.index]
        own = body.row(ref)
        if own is not None and own > row:
            x = block_shape.spread(x, row)
        return jnp.broadcast_to(x, block_shape.shape(row))

    for op in body.ops:
        if op.primitive.name in ROW_REDUCTIONS:
            (x,) = op.operands
            x = value(x, body.row(x) or 1)
            reduce = REDUCE[REDUCTIONS[op.primitive.name]]
            done.append(block_shape.reduce(x.astype(jnp.float32), op.row, reduce).astype(x.dtype))
        elif op.primitive is lax.broadcast_in_dim_p:
            done.append(value(op.operands[0], op.row))
        else:
            done.append(_apply(op, [value(ref, op.row) for ref in op.operands], target))
    return [value(root.value, root.row) for root in body.roots]


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
    value = scalars[needed.scalar.index]
    return value if needed.value else jnp.logical_not(value)


def identity_of(reduction: str) -> Any:
    """Return the neutral element of a reduction."""
    return np.float32({"sum": 0.0, "max": -np.inf, "min": np.inf}[reduction])


def or_nan(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Make a reduction return NaN if an element is NaN; Triton's reductions ignore NaN."""

    def reduced(x: jax.Array, axis: int | None = None) -> jax.Array:
        missing = jnp.sum(jnp.where(x != x, jnp.ones_like(x), jnp.zeros_like(x)), axis=axis)
        return jnp.where(missing > 0, jnp.asarray(jnp.nan, x.dtype), reduce(x, axis=axis))

    return reduced


REDUCE: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum,
    "max": or_nan(jnp.max),
    "min": or_nan(jnp.min),
}
COMBINE: dict[str, Callable[..., Any]] = {"sum": jnp.add, "max": maximum, "min": minimum}
