"""Formats that store an array of an optimizer's state in few bits.

A format is a small value. Its `encode` returns a node (a `NamedTuple` of arrays) that takes the
array's place in the state. The node decodes itself, and encodes the array's next value.

Two formats have groups: 64 neighbors along the last axis share a float32 scale. With y, the
absolute value divided by the largest one of the group, they store sign(x) √y in int8, or the fourth
root of y in uint8.

What is not offered, and why (errors are those of Adam's update after gradients fell, relative to
float32; `examples/evidence/low_precision.py` prints them):

- *Linear codes.* Small second moments become 0, and the update explodes.
- *Rounding a second moment to the nearest code.* A code is at least 1.6 % of the value, but a step
  of b2 = .999 is .1 %, so the average freezes: the error is .31 in place of .10. Random
  rounding moves the fourth root by the right amount on average.
- *Scales in float16 or bfloat16.* They freeze in the same way, because a step of decay at .999 is
  less than half of their last digit. And the smallest float16 is 6e-8.
- *Slow weights of lookahead in int8.* The parameters restart from them, so their error stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from optax_ext import _checks
from optax_ext.low_precision.bits import dither, join, round_stochastically, split

# Scales are kept in this range, so that neither they nor the square of the largest code, divided by
# them, overflow.
_SMALLEST_SCALE, _LARGEST_SCALE = np.float32(1e-33), np.float32(3.4e38)
_LARGEST_ROOT = np.float32(1.8e19)  # its square is finite, too
_SIGNED_NAN, _SIGNED_MAX = -128, 127
# A square that overflowed must stay infinite, as a divisor of a finite first moment. One code is
# enough for NaN, too: the first moment has it from the same gradient.
_UNSIGNED_INFINITY, _UNSIGNED_MAX = 255, 254


@runtime_checkable
class Encoded(Protocol):
    """The node that stores an array.

    Attributes:
      is_dithered: whether `encode` needs random bits.
    """

    is_dithered: bool

    def decode(self) -> jax.Array:
        """Return the stored array, in float32."""
        ...

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> "Encoded":
        """Return the node of a new value of the array, in the same format.

        Args:
          x: real floats, in the shape of the array.
          bits: random bits for each element, uint32; `None` rounds to the nearest code.
        """
        ...


class Format(Protocol):
    """A format: any hashable value with these methods."""

    def misfit(self, shape: Sequence[int], shard: Sequence[int]) -> str | None:
        """Return why the format can't store an array, or `None` if it can.

        Args:
          shape: the shape of the array.
          shard: its shape per device.
        """
        ...

    def encode(self, x: jax.Array) -> Encoded:
        """Return the node of an array of real floats."""
        ...


class SignedRootCodes(NamedTuple):
    """An array in the format `SignedRoot`.

    Attributes:
      codes: int8, in the shape of the array; -128 is NaN.
      scales: float32, one for each group.
    """

    codes: jax.Array
    scales: jax.Array

    is_dithered = False

    def decode(self) -> jax.Array:
        """Return the stored array, in float32."""
        codes = _in_groups(self.codes, self.scales.shape)
        root = codes * np.float32(1 / _SIGNED_MAX)
        x = root * jnp.abs(root) * self.scales[..., None]
        return jnp.where(codes == _SIGNED_NAN, jnp.nan, x).reshape(self.codes.shape)

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> "SignedRootCodes":
        """Return the node of a new value of the array; codes are rounded to the nearest."""
        del bits
        return _signed_root(x, self.scales.shape)


class FourthRootCodes(NamedTuple):
    """An array of numbers >= 0 in the format `FourthRoot`.

    Attributes:
      codes: uint8, in the shape of the array; 255 is infinity, and stands for NaN, too.
      scales: float32, one for each group: the root of its largest element.
    """

    codes: jax.Array
    scales: jax.Array

    is_dithered = True

    def decode(self) -> jax.Array:
        """Return the stored array, in float32."""
        codes = _in_groups(self.codes, self.scales.shape)
        fourth_root = codes * np.float32(1 / _UNSIGNED_MAX)
        root = fourth_root * fourth_root * self.scales[..., None]
        x = jnp.where(codes == _UNSIGNED_INFINITY, jnp.inf, root * root)
        return x.reshape(self.codes.shape)

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> "FourthRootCodes":
        """Return the node of a new value of the array."""
        return _fourth_root(x, self.scales.shape, bits)


class BFloat16Codes(NamedTuple):
    """An array in the format `BFloat16`.

    Attributes:
      rounded: bfloat16, in the shape of the array.
    """

    rounded: jax.Array

    is_dithered = True

    def decode(self) -> jax.Array:
        """Return the stored array, in float32."""
        return self.rounded.astype(jnp.float32)

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> "BFloat16Codes":
        """Return the node of a new value of the array."""
        x = x.astype(jnp.float32)
        rounded = x if bits is None else round_stochastically(x, bits)
        return BFloat16Codes(rounded.astype(jnp.bfloat16))


class SplitCodes(NamedTuple):
    """An array in the format `Split`.

    Attributes:
      high: the nearest bfloat16 value, in the shape of the array.
      low: the correction, int8 or int16, in the shape of the array.
    """

    high: jax.Array
    low: jax.Array

    is_dithered = True

    def decode(self) -> jax.Array:
        """Return the stored array, in float32."""
        return join(self.high, self.low)

    def encode(self, x: jax.Array, bits: jax.Array | None = None) -> "SplitCodes":
        """Return the node of a new value of the array."""
        return _split(x, 32 if self.low.dtype == jnp.int16 else 24, bits)


@dataclass(frozen=True)
class _Grouped:
    """A format with a scale for each group.

    Attributes:
      group_size: number of neighbors along the last axis that share a scale.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        _checks.size(group_size=self.group_size)

    def misfit(self, shape: Sequence[int], shard: Sequence[int]) -> str | None:
        """Return why the format can't store an array, or `None` if it can.

        If the last axis is no multiple of the group, groups run over the flattened array. But then
        they would cross the shards of a sharded array.
        """
        last, size = (shape[-1] if shape else 1), math.prod(shape)
        if last % self.group_size == 0:
            if (part := shard[-1] if shard else 1) % self.group_size:
                return f"a shard's last axis, {part}, is no multiple of {self.group_size}"
        elif size % self.group_size:
            return f"its size, {size}, is no multiple of {self.group_size}"
        elif tuple(shard) != tuple(shape):
            return f"its last axis, {last}, is no multiple of {self.group_size}, and it is sharded"
        return None

    def _scales_shape(self, x: jax.Array) -> tuple[int, ...]:
        """Return the shape of the scales."""
        size = self.group_size
        if why := self.misfit(x.shape, x.shape):
            raise ValueError(f"group_size must divide the array, got {x.shape}: {why}")
        along_last = x.shape and x.shape[-1] % size == 0
        return (*x.shape[:-1], x.shape[-1] // size) if along_last else (x.size // size,)


@dataclass(frozen=True)
class SignedRoot(_Grouped):
    """The signed root in int8, for first moments; see the module's docstring.

    It rounds to the nearest code: an average of b1 = .9 moves by more than a code in a step. Slower
    averages are not tested. Do not use it for averages whose difference is small compared to them.
    """

    def encode(self, x: jax.Array) -> SignedRootCodes:
        """Return the node of an array of real floats."""
        return _signed_root(x, self._scales_shape(x))


@dataclass(frozen=True)
class FourthRoot(_Grouped):
    """The fourth root in uint8, for second moments; see the module's docstring.

    It is dithered: a code is rounded up or down at random, so that slow averages don't freeze.
    """

    def encode(self, x: jax.Array) -> FourthRootCodes:
        """Return the node of an array of numbers >= 0."""
        return _fourth_root(x, self._scales_shape(x))


class _Ungrouped:
    """A format without groups, which fits every array."""

    def misfit(self, shape: Sequence[int], shard: Sequence[int]) -> str | None:
        """Return `None`."""
        del shape, shard


@dataclass(frozen=True)
class BFloat16(_Ungrouped):
    """bfloat16, rounded up or down at random, for averages that must not freeze."""

    def encode(self, x: jax.Array) -> BFloat16Codes:
        """Return the node of an array of real floats."""
        return BFloat16Codes(x.astype(jnp.bfloat16))


@dataclass(frozen=True)
class Split(_Ungrouped):
    """bfloat16 with a correction, for weights.

    Attributes:
      bits: 24 (correction in int8, dithered, relative error below 2^-15) or 32 (in int16, exact).
    """

    bits: int = 24

    def __post_init__(self) -> None:
        """Check the number of bits."""
        check_bits(self.bits)

    def encode(self, x: jax.Array) -> SplitCodes:
        """Return the node of an array of real floats."""
        return _split(x, self.bits)


def check_bits(bits: Any) -> None:
    """Require a number of bits that weights can be split into."""
    if isinstance(bits, bool) or bits not in (24, 32):
        raise ValueError(f"bits must be 24 or 32, got {bits!r}")


def is_encoded(x: Any) -> bool:
    """Return whether `x` is the node of an encoded array."""
    return isinstance(x, tuple) and isinstance(x, Encoded)


def _signed_root(x: jax.Array, scales_shape: tuple[int, ...]) -> SignedRootCodes:
    groups = _in_groups(x, scales_shape)
    size = jnp.abs(groups)
    scales = _scales(size, _LARGEST_SCALE)
    root = jnp.sqrt(size * (np.float32(_SIGNED_MAX**2) / scales)[..., None])
    code = jnp.minimum(jnp.floor(root + 0.5), _SIGNED_MAX)
    code = jnp.where(groups < 0, -code, code)
    code = jnp.where(groups == groups, code, _SIGNED_NAN)
    return SignedRootCodes(_to_integers(code, jnp.int8).reshape(x.shape), scales)


def _fourth_root(
    x: jax.Array, scales_shape: tuple[int, ...], bits: jax.Array | None = None
) -> FourthRootCodes:
    root = jnp.sqrt(jnp.maximum(_in_groups(x, scales_shape), 0))
    scales = _scales(root, _LARGEST_ROOT)
    fourth_root = jnp.sqrt(root * (np.float32(_UNSIGNED_MAX**2) / scales)[..., None])
    offset = np.float32(0.5) if bits is None else dither(bits).reshape(root.shape)
    # A positive number never becomes 0: as a divisor, it would make the update explode.
    code = jnp.maximum(jnp.floor(fourth_root + offset), jnp.where(root > 0, 1.0, 0.0))
    code = jnp.where(code < jnp.inf, jnp.minimum(code, _UNSIGNED_MAX), _UNSIGNED_INFINITY)
    return FourthRootCodes(_to_integers(code, jnp.uint8).reshape(x.shape), scales)


def _split(x: jax.Array, width: int, bits: jax.Array | None = None) -> SplitCodes:
    high, low = split(x.astype(jnp.float32), width, bits)
    return SplitCodes(high.astype(jnp.bfloat16), low)


def _in_groups(x: jax.Array, scales_shape: tuple[int, ...]) -> jax.Array:
    """Return `x` as float32, with a last axis for the elements of a group."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.int32)
    return x.astype(jnp.float32).reshape(*scales_shape, x.size // math.prod(scales_shape))


def _scales(size: jax.Array, largest: np.float32) -> jax.Array:
    """Return the largest finite value of each group."""
    found = jnp.max(jnp.where(size < jnp.inf, size, 0), axis=-1)
    return jnp.clip(found, _SMALLEST_SCALE, largest)


def _to_integers(code: jax.Array, dtype: Any) -> jax.Array:
    return code.astype(jnp.int32).astype(dtype)
