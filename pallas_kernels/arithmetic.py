"""Primitives in terms of others, for backends that lack them or differ from XLA."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def maximum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the larger number, or NaN if one of them is NaN."""
    if x.dtype == bool:
        return lax.bitwise_or(x, y)
    return _nan_or(lax.max(x, y), x, y)


def minimum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the smaller number, or NaN if one of them is NaN."""
    if x.dtype == bool:
        return lax.bitwise_and(x, y)
    return _nan_or(lax.min(x, y), x, y)


def _nan_or(result: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return NaN if an operand is NaN; Triton's maximum and minimum ignore it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return result
    return jnp.where(x != x, x, jnp.where(y != y, y, result))


def clamp(low: jax.Array, x: jax.Array, high: jax.Array) -> jax.Array:
    """Compute `lax.clamp`."""
    return minimum(maximum(low, x), high)


def bitcast(x: jax.Array, *, new_dtype: Any) -> jax.Array:
    """Compute `lax.bitcast_convert_type`; Mosaic's result is signed as its operand is."""
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.issubdtype(new_dtype, jnp.integer):
        return convert(x, new_dtype=new_dtype, weak_type=False, sharding=None)
    return lax.bitcast_convert_type(x, new_dtype)


def convert(x: jax.Array, *, new_dtype: Any, **params: Any) -> jax.Array:
    """Compute `lax.convert_element_type`."""
    if new_dtype == x.dtype:
        return x
    if jnp.issubdtype(new_dtype, jnp.bool_):
        return x != 0
    if x.dtype == bool:
        return jnp.where(x, 1, 0).astype(new_dtype)
    return lax.convert_element_type_p.bind(x, new_dtype=new_dtype, **params)


def identity(x: jax.Array) -> jax.Array:
    """Return `x`."""
    return x


def integer_pow(x: jax.Array, *, y: int) -> jax.Array:
    """Compute `lax.integer_pow` by squaring, as XLA does."""
    power, result = x, None
    for bit in reversed(f"{abs(y):b}"):
        if bit == "1":
            result = power if result is None else result * power
        power = power * power
    result = jnp.ones_like(x) if result is None else result
    return 1 / result if y < 0 else result


def is_finite(x: jax.Array) -> jax.Array:
    """Compute `lax.is_finite`."""
    return jnp.abs(x) < jnp.inf


def negative(x: jax.Array) -> jax.Array:
    """Compute `lax.neg`; Triton computes 0 - x, which has the wrong sign at 0."""
    return x * -1


def power(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute `lax.pow`."""
    return lax.pow(x, y.astype(x.dtype))


def select(which: jax.Array, *cases: jax.Array) -> jax.Array:
    """Compute `lax.select_n`; its index may be a boolean if there are two cases."""
    if which.dtype == bool:
        return lax.select_n(which, *cases)
    chosen = cases[0]
    for i, case in enumerate(cases[1:], start=1):
        chosen = jnp.where(which >= i, case, chosen)
    return chosen


def sign(x: jax.Array) -> jax.Array:
    """Compute `lax.sign`."""
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, x)).astype(x.dtype)


def sqrt_by_rsqrt(x: jax.Array, **_: Any) -> jax.Array:
    """Compute `lax.sqrt` for backends that have only `lax.rsqrt`."""
    return jnp.where((x == 0) | (x == jnp.inf), x, x * lax.rsqrt(x))


def square(x: jax.Array) -> jax.Array:
    """Compute `lax.square`."""
    return x * x


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
    return negative(floor_by_round(negative(x)))
