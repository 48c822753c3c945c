"""Bits of floats: pseudorandom bits, and float32 as a bfloat16 part and a correction.

Both are integer arithmetic, so all compilers and devices compute the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# An odd multiplier whose multiples fill 32 bits evenly: 2^32 divided by the golden ratio.
_GOLDEN = np.uint32(0x9E3779B9)
_HIGH = np.int32(-65536)  # the upper 16 bits: those of a bfloat16
_HALF = np.int32(0x8000)


def random_bits(*sources: jax.Array, step: jax.Array) -> jax.Array:
    """Return pseudorandom bits that depend only on the bits of the sources and the step.

    In one step, equal elements get equal bits. In the next step, they get different bits. So the
    result needs no key, and is the same on every mesh, in every program and after a resume.

    Args:
      *sources: arrays of real floats in one shape, such as a gradient.
      step: number of the step, a scalar.

    Returns:
      uint32 of the shape of the sources.
    """
    bits = _mix(step.astype(jnp.uint32) * _GOLDEN)
    for source in sources:
        raw = lax.bitcast_convert_type(source.astype(jnp.float32), jnp.uint32)
        bits = _mix(raw ^ bits)
    return bits


def _mix(x: jax.Array) -> jax.Array:
    """Hash 32 bits: two rounds of xor-shift and multiplication, so each bit affects all others."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dither(bits: jax.Array) -> jax.Array:
    """Return numbers in [0, 1) from random bits."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-24)


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 up or down to a bfloat16 value, with the right mean; return float32."""
    raw = lax.bitcast_convert_type(x, jnp.int32)
    up_or_down = (raw + (bits >> 16).astype(jnp.int32)) & _HIGH
    return jnp.where(x == x, lax.bitcast_convert_type(up_or_down, jnp.float32), x)


def split(x: jax.Array, bits: int, random: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Split float32 into the nearest bfloat16 value and a correction.

    A value halfway between two is rounded away from 0, so that the correction fits 16 bits. NaN has
    a correction of 0.

    Args:
      x: float32.
      bits: 32 for the exact correction (int16), or 24 for its upper half (int8).
      random: random bits for each element, which round the upper half up or down; `None` rounds to
        the nearest.

    Returns:
      The bfloat16 value, as float32, and the correction.
    """
    raw = lax.bitcast_convert_type(x, jnp.int32)
    high = (raw + _HALF) & _HIGH
    low = raw - high
    if bits == 24:
        offset = 128 if random is None else (random >> 24).astype(jnp.int32)
        low = jnp.minimum((low + offset) >> 8, 127)
    known = x == x
    high = jnp.where(known, lax.bitcast_convert_type(high, jnp.float32), jnp.float32(jnp.nan))
    return high, jnp.where(known, low, 0).astype(jnp.int16 if bits == 32 else jnp.int8)


def join(high: jax.Array, low: jax.Array) -> jax.Array:
    """Return the float32 values from the two results of `split`.

    A parameter that was set to 0 in between is 0, whatever its correction was.
    """
    raw, correction = _bits_of(high), low.astype(jnp.int32)
    is_zero = (raw & np.int32(0x7FFFFFFF)) == 0  # of the bits: as floats, denormals can be 0, too
    correction = jnp.where(is_zero & (correction < 0), 0, correction)
    return lax.bitcast_convert_type(
        raw + (correction if low.dtype == jnp.int16 else correction << 8), jnp.float32
    )


def _bits_of(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
