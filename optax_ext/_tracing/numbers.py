"""Small integers that a computation knows before it runs: indices, counters of loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Longer vectors are data rather than indices.
_MAX_SIZE = 4096


@dataclass(frozen=True)
class Number:
    """A known array of integers or truth values.

    Attributes:
      value: the array.
      loops: the loops whose counters it depends on.
    """

    value: np.ndarray[Any, Any]
    loops: frozenset[Any] = frozenset()

    def at(self, i: int, loop: Any) -> "Number":
        """Return the i-th row, in this loop."""
        return Number(self.value[i], self.loops | {loop})

    def within(self, loop: Any) -> "Number":
        """Return the same number, carried by this loop."""
        return Number(self.value, self.loops | {loop})

    def after(self, loop: Any) -> "Number":
        """Return the same number, once this loop is over."""
        return Number(self.value, self.loops - {loop})


def known(constant: Any) -> Number | None:
    """Return the number that a constant of a jaxpr is, if it is one."""
    if isinstance(constant, Tracer) or np.size(constant) > _MAX_SIZE:
        return None
    if not getattr(constant, "is_fully_addressable", True):
        return None
    return Number(np.asarray(constant)) if _is_integer(jnp.result_type(constant)) else None


def computed(eqn: Any, numbers: Sequence[Number | None]) -> Number | None:
    """Return the equation's result, if its operands are known and a rule is below."""
    rule, aval = _RULES.get(eqn.primitive.name), eqn.outvars[0].aval
    given = [number for number in numbers if number is not None]
    if rule is None or len(given) < len(numbers):
        return None
    if aval.size > _MAX_SIZE or not _is_integer(aval.dtype):
        return None
    with np.errstate(all="ignore"):  # they wrap around, as JAX's do
        value = rule(eqn.params, *(number.value for number in given))
    value = np.asarray(value).astype(aval.dtype).reshape(aval.shape)
    return Number(value, frozenset[Any]().union(*(number.loops for number in given)))


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def _elementwise(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *operands: f(*operands)


def _divide(a: Any, b: Any) -> Any:
    """Towards zero."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))


def _iota(params: Any) -> Any:
    axis, shape = params["dimension"], params["shape"]
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis]).reshape(ones), shape)


def _broadcast(params: Any, x: Any) -> Any:
    ones = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        ones[axis] = size
    return np.broadcast_to(x.reshape(ones), params["shape"])


def _dynamic_slice(params: Any, x: Any, *starts: Any) -> Any:
    for axis, (start, size) in enumerate(zip(starts, params["slice_sizes"], strict=True)):
        x = x.take(np.arange(size) + np.clip(start, 0, x.shape[axis] - size), axis)
    return x


def _slice(params: Any, x: Any) -> Any:
    strides = params["strides"] or [None] * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


_RULES: dict[str, Callable[..., Any]] = {
    "abs": _elementwise(np.abs),
    "add": _elementwise(np.add),
    "and": _elementwise(np.bitwise_and),
    "broadcast_in_dim": _broadcast,
    "clamp": _elementwise(lambda low, x, high: np.clip(x, low, high)),
    "concatenate": lambda params, *xs: np.concatenate(xs, params["dimension"]),
    "convert_element_type": _elementwise(np.asarray),
    "copy": _elementwise(np.asarray),
    "div": _elementwise(_divide),
    "dynamic_slice": _dynamic_slice,
    "eq": _elementwise(np.equal),
    "ge": _elementwise(np.greater_equal),
    "gt": _elementwise(np.greater),
    "iota": _iota,
    "le": _elementwise(np.less_equal),
    "lt": _elementwise(np.less),
    "max": _elementwise(np.maximum),
    "min": _elementwise(np.minimum),
    "mul": _elementwise(np.multiply),
    "ne": _elementwise(np.not_equal),
    "neg": _elementwise(np.negative),
    "not": _elementwise(np.bitwise_not),
    "or": _elementwise(np.bitwise_or),
    "rem": _elementwise(np.fmod),
    "reshape": _elementwise(np.asarray),
    "rev": lambda params, x: np.flip(x, params["dimensions"]),
    "select_n": _elementwise(lambda which, *cases: np.choose(which.astype(int), cases)),
    "sign": _elementwise(np.sign),
    "slice": _slice,
    "squeeze": _elementwise(np.asarray),
    "sub": _elementwise(np.subtract),
}
