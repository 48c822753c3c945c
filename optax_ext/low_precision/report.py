"""A report on the memory of a quantized state."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ext import _checks, _host_memory
from optax_ext.low_precision.choices import Formats, Path, chooser, leaves
from optax_ext.low_precision.formats import Format
from optax_ext.low_precision.quantized_state import is_whole


@dataclass(frozen=True)
class LeafReport:
    """The storage of one array of the state.

    Attributes:
      path: its path in the state.
      shape: its shape.
      format: its format; `None` means that it stays as it is.
      reason: why it stays as it is; empty if it is encoded.
      bytes: bytes that it takes.
      bytes_before: bytes that it took without encoding.
    """

    path: str
    shape: tuple[int, ...]
    format: Format | None
    reason: str
    bytes: int
    bytes_before: int

    def __str__(self) -> str:
        """Return path, shape, bytes, and the format or the reason."""
        size = f"{self.bytes_before} -> {self.bytes} bytes"
        return f"{self.path}  {list(self.shape)}  {size}  {self.format or self.reason}"


@dataclass(frozen=True)
class QuantizationReport:
    """The storage of a state.

    Attributes:
      leaves: a report on each array.
    """

    leaves: tuple[LeafReport, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole state without encoding."""
        return sum(leaf.bytes_before for leaf in self.leaves)

    def __str__(self) -> str:
        """Return a line for each array, and the totals."""
        totals = f"{self.bytes_before} -> {self.bytes} bytes"
        return "\n".join([*map(str, self.leaves), totals])


def quantization_report(
    tx: optax.GradientTransformation,
    params: optax.Params,
    formats: Formats | None = None,
    *,
    shardings: Any = None,
) -> QuantizationReport:
    """Report how `quantize_state(tx, ...)` stores each array of the state; compute nothing.

    Args:
      tx: the optimizer, before `quantize_state` wraps it.
      params: its parameters, or their shapes. With nnx, `nnx.state(model, nnx.Param)`.
      formats: see `quantize_state`.
      shardings: see `quantize_state`.

    Raises:
      ValueError: as for `quantize_state`.

    >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    >>> print(quantization_report(optax.lion(1e-3), params))
    0/count  []  4 -> 4 bytes  int32
    0/mu/bias  [64]  256 -> 256 bytes  fewer than 4096 elements
    0/mu/kernel  [64, 64]  16384 -> 4352 bytes  SignedRoot(group_size=64)
    16644 -> 4612 bytes
    """
    _checks.transformation(tx=tx)
    choose = chooser(formats, shardings)
    state = _host_memory.types(tx.init, params)
    return QuantizationReport(
        tuple(
            LeafReport(
                path=_name(path),
                shape=getattr(x, "shape", ()),
                format=format_,
                reason=reason,
                bytes=_bytes(x if format_ is None else jax.eval_shape(format_.encode, x)),
                bytes_before=_bytes(x),
            )
            for path, x, format_, reason in choose(leaves(state, is_whole), params)
        )
    )


def _name(path: Path) -> str:
    keys = (jax.tree_util.GetAttrKey(k.name) if hasattr(k, "name") else k for k in path)
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def _bytes(tree: Any) -> int:
    return sum(x.size * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))
