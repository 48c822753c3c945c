"""The primitives that kernels compute, and how each backend computes them.

A backend may lack a primitive, or compute it differently than XLA: Triton's maximum ignores NaN,
and its division does not support bfloat16. So every backend has an `Operations`, which lists the
missing primitives and the rewritten ones. XLA computes the missing ones. Arithmetic on narrow
dtypes is done in 32 bits, and the result is rounded to the narrow dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

_ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2
    expm1 floor ge gt integer_pow is_finite le log log1p log2 logistic lt max min mul ne neg
    nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sqrt square
    stop_gradient sub tan tanh xor"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())

# Operations that keep the elements in their order in memory.
SAME_ORDER = frozenset(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"))

REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_or": "max",
    "reduce_and": "min",
}

FLOATS = frozenset(("float32", "bfloat16", "float16"))
INTEGERS = frozenset(("int32", "int8", "uint8"))
# Dtypes that kernels can compute with.
DTYPES = FLOATS | INTEGERS | {"bool"}

_WIDE = {"bfloat16": "float32", "float16": "float32", "int8": "int32", "uint8": "int32"}
_MOVES = frozenset(("convert_element_type", "copy", "stop_gradient"))


@dataclass(frozen=True)
class Operations:
    """The operations that a backend's kernels can compute.

    Attributes:
      missing: for each missing primitive, the dtypes of operands for which it is missing.
      rewritten: for each rewritten primitive, a function of its operands and parameters.
      in_memory: dtypes of arrays that kernels can read and write.
    """

    missing: Mapping[str, frozenset[str]]
    rewritten: Mapping[str, Callable[..., jax.Array]]
    in_memory: frozenset[str] = DTYPES

    def supports(self, primitive: str, operands: Sequence[str]) -> bool:
        """Return whether a kernel can compute the primitive for operands of these dtypes."""
        known = primitive in ELEMENTWISE or primitive in SAME_ORDER
        return known and self.missing.get(primitive, frozenset()).isdisjoint(operands)

    def apply(
        self, primitive: Primitive, operands: Sequence[jax.Array], params: Mapping[str, Any]
    ) -> jax.Array:
        """Compute the primitive inside of a kernel."""
        function = {**REWRITTEN, **self.rewritten}.get(primitive.name, primitive.bind)
        if primitive.name in _MOVES or not any(x.dtype.name in _WIDE for x in operands):
            return function(*operands, **params)
        result = function(*(x.astype(_WIDE.get(x.dtype.name, x.dtype)) for x in operands), **params)
        # A truth value may stand among the operands of a select, and an integer exponent in `pow`.
        narrow = operands[1 if primitive.name == "select_n" else 0].dtype
        return result if result.dtype == bool else result.astype(narrow)


def maximum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the larger number, or NaN if one of them is NaN."""
    return _extreme(x, y, lax.max, lax.bitwise_or)


def minimum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the smaller number, or NaN if one of them is NaN."""
    return _extreme(x, y, lax.min, lax.bitwise_and)


def _extreme(x, y, of_numbers, of_bools) -> jax.Array:
    if x.dtype == bool:
        return of_bools(x, y)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return of_numbers(x, y)
    # Triton's maximum and minimum return the operand that is not NaN.
    return jnp.where(x != x, x, jnp.where(y != y, y, of_numbers(x, y)))


def _clamp(low: jax.Array, x: jax.Array, high: jax.Array) -> jax.Array:
    return minimum(maximum(low, x), high)


def _convert(x: jax.Array, *, new_dtype: Any, **params: Any) -> jax.Array:
    if new_dtype == x.dtype:
        return x
    if jnp.issubdtype(new_dtype, jnp.bool_):
        return x != 0
    if x.dtype == bool:
        return jnp.where(x, 1, 0).astype(new_dtype)
    return lax.convert_element_type_p.bind(x, new_dtype=new_dtype, **params)


def _integer_pow(x: jax.Array, *, y: int) -> jax.Array:
    """Compute `lax.integer_pow` by squaring, as XLA does."""
    power, result = x, None
    for bit in reversed(f"{abs(y):b}"):
        if bit == "1":
            result = power if result is None else result * power
        power = power * power
    result = jnp.ones_like(x) if y == 0 or result is None else result
    return 1 / result if y < 0 else result


def _negative(x: jax.Array) -> jax.Array:
    """Compute `lax.neg`; Triton computes 0 - x, which has the wrong sign at 0."""
    return x * -1


def _pow(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.pow(x, y.astype(x.dtype))


def _select(which: jax.Array, *cases: jax.Array) -> jax.Array:
    """Compute `lax.select_n`; its index may be a boolean if there are two cases."""
    if which.dtype == bool:
        return lax.select_n(which, *cases)
    chosen = cases[0]
    for i, case in enumerate(cases[1:], start=1):
        chosen = jnp.where(which >= i, case, chosen)
    return chosen


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, x)).astype(x.dtype)


def round_by_floor(x: jax.Array, *, rounding_method: Any) -> jax.Array:
    """Compute `lax.round` for backends that have only `lax.floor`; 0 keeps its sign."""
    size = jnp.abs(x)
    down = jnp.floor(size)
    rest = size - down
    up = rest >= 0.5
    if rounding_method is lax.RoundingMethod.TO_NEAREST_EVEN:
        is_even = jnp.floor(down * 0.5) * 2 == down
        up &= ~(is_even & (rest == 0.5))
    whole = jnp.where(up, down + 1, down)
    return jnp.where(x == 0, x, jnp.where(x < 0, whole * -1, whole))


def floor_by_round(x: jax.Array) -> jax.Array:
    """Compute `lax.floor` for backends that have only `lax.round`."""
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(whole > x, whole - 1, whole)


def ceil_by_round(x: jax.Array) -> jax.Array:
    """Compute `lax.ceil` for backends that have only `lax.round`."""
    return _negative(floor_by_round(_negative(x)))


# Rewritten for all backends, because at least one lacks the primitive or computes it differently.
REWRITTEN: Mapping[str, Callable[..., jax.Array]] = {
    "add_any": jnp.add,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": lambda x: x,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "max": maximum,
    "min": minimum,
    "neg": _negative,
    "pow": _pow,
    "select_n": _select,
    "sign": _sign,
    "square": lambda x: x * x,
    "stop_gradient": lambda x: x,
}
