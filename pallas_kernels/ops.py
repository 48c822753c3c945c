"""The table of the primitives that kernels compute: class, and support by each backend.

A backend may lack a primitive, or compute it differently than XLA: Triton's maximum ignores NaN,
and its division does not support bfloat16. So each row says for each backend whether the primitive
is native, rewritten in terms of others (`arithmetic.py`), or missing for some dtypes. XLA computes
what is missing. A new primitive is one row.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import arithmetic

FLOATS = frozenset(("float32", "bfloat16", "float16"))
INTEGERS = frozenset(("int32", "int8", "uint8"))
# Dtypes of random bits, and of the lower halves of weights.
BITS = frozenset(("uint32", "int16"))
DTYPES = FLOATS | INTEGERS | BITS | {"bool"}
# Rows that a block can reduce: their length is a power of two, and at most this.
LONGEST_ROW = 256

_BEFORE_0_11 = jax.__version_info__ < (0, 11)


class OpClass(enum.Enum):
    """The effect of a primitive on the elements of a leaf."""

    ELEMENTWISE = "elementwise"
    SAME_ORDER = "same order"  # keeps the elements in their order in memory
    SUM = "sum"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True)
class Support:
    """The way in which a backend computes a primitive.

    Attributes:
      rewrite: a function of the same operands and parameters; `None` means that the backend has an
        equal primitive.
      missing: the dtypes of operands for which the backend does not compute it.
    """

    rewrite: Callable[..., jax.Array] | None = None
    missing: frozenset[str] = frozenset()


NATIVE = Support()


@dataclass(frozen=True)
class Row:
    """A primitive.

    Attributes:
      kind: its class.
      triton, mosaic: how each backend computes it.
    """

    kind: OpClass
    triton: Support = NATIVE
    mosaic: Support = NATIVE


def _rows(
    kind: OpClass,
    names: str,
    both: Support = NATIVE,
    *,
    triton: Support | None = None,
    mosaic: Support | None = None,
) -> dict[str, Row]:
    return {name: Row(kind, triton or both, mosaic or both) for name in names.split()}


_NO_FLOATS = Support(missing=FLOATS)
_NO_NUMBERS = Support(missing=FLOATS | INTEGERS | BITS)
# Narrow numbers are computed in 32 bits: a shift would move other bits in, and a bitcast would read
# other bits.
_NARROW = frozenset(("bfloat16", "float16", "int8", "uint8", "int16"))
_ONLY_32_BITS = Support(missing=_NARROW)

_elementwise = partial(_rows, OpClass.ELEMENTWISE)

TABLE: dict[str, Row] = {
    **_elementwise("abs add and atan2 cos eq exp exp2 ge gt le log log2 logistic lt mul ne not or"),
    **_elementwise("rsqrt sin sub tanh xor"),
    **_elementwise("add_any", Support(jnp.add)),
    **_elementwise(
        "bitcast_convert_type", _ONLY_32_BITS, mosaic=Support(arithmetic.bitcast, _NARROW)
    ),
    **_elementwise("cbrt expm1 log1p tan", mosaic=_NO_FLOATS),
    **_elementwise("ceil", mosaic=Support(arithmetic.ceil_by_round)),
    **_elementwise("clamp", Support(arithmetic.clamp)),
    **_elementwise("convert_element_type", Support(arithmetic.convert)),
    **_elementwise("copy stop_gradient", Support(arithmetic.identity)),
    **_elementwise("div", Support(missing=INTEGERS | BITS)),  # results of a division by 0 differ
    **_elementwise("erf", triton=_NO_FLOATS),
    **_elementwise("floor", mosaic=Support(arithmetic.floor_by_round)),
    **_elementwise("integer_pow", Support(arithmetic.integer_pow)),
    **_elementwise("is_finite", Support(arithmetic.is_finite)),
    **_elementwise("max", Support(arithmetic.maximum)),
    **_elementwise("min", Support(arithmetic.minimum)),
    **_elementwise("neg", Support(arithmetic.negative)),
    **_elementwise("nextafter reduce_precision", _NO_FLOATS),
    **_elementwise("pow", Support(arithmetic.power), mosaic=Support(arithmetic.power, FLOATS)),
    **_elementwise("rem", _NO_NUMBERS),
    **_elementwise("round", triton=Support(arithmetic.round_by_floor)),
    **_elementwise("select_n", Support(arithmetic.select)),
    **_elementwise("shift_left shift_right_arithmetic shift_right_logical", _ONLY_32_BITS),
    **_elementwise("sign", Support(arithmetic.sign)),
    **_elementwise("sqrt", mosaic=Support(arithmetic.sqrt_by_rsqrt) if _BEFORE_0_11 else NATIVE),
    **_elementwise("square", Support(arithmetic.square)),
    **_rows(OpClass.SAME_ORDER, "reshape squeeze expand_dims broadcast_in_dim"),
    **_rows(OpClass.SUM, "reduce_sum"),
    **_rows(OpClass.MAX, "reduce_max reduce_or"),
    **_rows(OpClass.MIN, "reduce_min reduce_and"),
}


def _names(*kinds: OpClass) -> frozenset[str]:
    return frozenset(name for name, row in TABLE.items() if row.kind in kinds)


ELEMENTWISE = _names(OpClass.ELEMENTWISE)
SAME_ORDER = _names(OpClass.SAME_ORDER)
# The reduction that each reducing primitive computes: "sum", "max" or "min".
REDUCTIONS: dict[str, str] = {
    name: TABLE[name].kind.value for name in sorted(_names(OpClass.SUM, OpClass.MAX, OpClass.MIN))
}
# Those that a block can compute of each of its rows.
ROW_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min"))


@dataclass(frozen=True)
class Target:
    """The properties of a backend that a plan depends on.

    Attributes:
      column: its column in the table.
      widths: the widths of the blocks into which leaves are cut, in decreasing order. A block of
        the last width may extend past a leaf's end.
      in_memory: dtypes of arrays that its kernels can read and write.
    """

    column: str
    widths: tuple[int, ...]
    in_memory: frozenset[str]

    def support(self, primitive: str) -> Support:
        """Return how the backend computes a primitive of the table."""
        return getattr(TABLE[primitive], self.column)

    def supports(self, primitive: str, operands: Iterable[str]) -> bool:
        """Return whether a kernel can compute the primitive for operands of these dtypes."""
        return primitive in TABLE and self.support(primitive).missing.isdisjoint(operands)


TRITON = Target("triton", (512,), in_memory=DTYPES)
# Mosaic accesses vectors or single elements, without a mask. So no block extends past a leaf's end.
MOSAIC = Target("mosaic", (512, 128, 1), in_memory=DTYPES - {"bool"})
