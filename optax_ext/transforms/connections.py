r"""Connection-aware rates: one fixed scale per tensor, from the shape of the network.

CaAdam (2410.24216) gives tensors with fewer connections than the median a larger rate and tensors
with more a smaller one, or scales by depth. What counts as one tensor matters: the authors'
formulas rank a bias, with no connections, far below every kernel. Here a unit is a module by
default, and its bias goes along with its kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from optax_ext import _checks
from optax_ext._numerics import scalar_dtype, scale_each
from optax_ext._units import Connection, Overrides, find_units
from optax_ext.network import Architecture


def additive(s: ArrayLike, x: NDArray[Any]) -> Any:
    r""":math:`S = 1 + s x`: from 1 - s for the most connected unit to 1 + s for the least."""
    return 1 + s * x


def multiplicative(s: ArrayLike, x: NDArray[Any]) -> Any:
    r""":math:`S = s^{|x|}`: s for the least *and* for the most connected unit, as released."""
    return s ** abs(x)


def signed(s: ArrayLike, x: NDArray[Any]) -> Any:
    r""":math:`S = s^x`: from 1/s to s, as the released code's comment promises."""
    return s**x


def by_depth(s: ArrayLike, x: NDArray[Any]) -> Any:
    r""":math:`S = (1 + s)^x`, x what share of the network comes after: larger for early units."""
    return (1 + s) ** x


class _Scaling(NamedTuple):
    formula: Callable[[ArrayLike, NDArray[Any]], Any]
    strength: float
    check: Callable[..., None]


_SCALINGS = {
    "additive": _Scaling(additive, 0.95, _checks.fraction),
    "multiplicative": _Scaling(multiplicative, 5.0, _checks.positive),
    "signed": _Scaling(signed, 5.0, _checks.positive),
    "depth": _Scaling(by_depth, 1.0, _checks.non_negative),
}


def relative_connections(c: NDArray[Any]) -> NDArray[Any]:
    r"""How far each count is from the median: 1 at the smallest, 0 at it, -1 at the largest.

    .. math:: x = \frac{\tilde c - c}{\tilde c - c_{min}} \text{ for } c \le \tilde c,
      \qquad x = -\frac{c - \tilde c}{c_{max} - \tilde c} \text{ else}

    Median and extremes are those of the counts above 0: a count of 0 has an x beyond 1. A side of
    no width, such as both sides of a uniform network, is 0 throughout.
    """
    connected = c[c > 0]
    if not connected.size:
        return np.zeros_like(c)
    median = np.median(connected)
    width = np.where(c <= median, median - connected.min(), connected.max() - median)
    return np.divide(median - c, width, out=np.zeros_like(c), where=width > 0)


def relative_depths(d: NDArray[Any], max_depth: float) -> NDArray[Any]:
    r"""What share of the network comes after: :math:`x = (D - (1 + d)) / D`, d = 0 … D - 1."""
    levels = 1 + d.max(initial=max_depth)
    return (levels - (1 + d)) / levels


class ConnectionTable(tuple[Connection, ...]):
    """The units of a parameter tree, in order; prints as a table."""

    __slots__ = ()

    @property
    def mean_scale(self) -> float:
        """The mean of the scales, weighted by parameters.

        The control for any gain of connection-aware rates is Adam at this multiple of the rate.
        """
        total = sum(row.size for row in self)
        return float(sum(row.size * row.scale for row in self)) / total if total else 1.0

    def __str__(self) -> str:
        """One line per unit, under a header."""
        width = max([len(row.path) for row in self] + [4])
        lines = [f"{'path':<{width}}  {'parameters':>10}  {'connections':>11}  depth  scale"]
        for row in self:
            connections = "-" if row.connections is None else f"{row.connections:g}"
            depth = "-" if row.depth is None else f"{row.depth:g}"
            lines.append(
                f"{row.path:<{width}}  {row.size:>10}  {connections:>11}"
                f"  {depth:>5}  {float(row.scale):>5.3f}"
            )
        return "\n".join(lines)


class ScaleByConnectionsState(NamedTuple):
    """State of `scale_by_connections`.

    Attributes:
      connection_scale: the factor S on each tensor, a vector in the order of
        `jax.tree.leaves(params)`.
    """

    connection_scale: jax.Array


def scale_by_connections(
    *,
    scaling: str,
    strength: ArrayLike | None = None,
    units: str = "module",
    overrides: Overrides | None = None,
    architecture: Architecture | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each tensor by a constant that its place in the network decides.

    .. math:: u \leftarrow S u

    The scales are computed at `init` from paths and shapes. A unit's connections c are the sizes
    of its kernels, :math:`\prod \text{shape}` of leaves with more than one axis: in × out for a
    dense layer, window × in/groups × out for a convolution. Its depth d is its index. With an
    `architecture`, both are what the network's computation tells: d is that of its first kernel.

    Args:
      scaling: "additive", "multiplicative", "signed" or "depth": see the functions of these names
        (`by_depth` for the last).
      strength: s; in [0, 1] for "additive" (default .95), (0, inf) for "multiplicative" and
        "signed" (default 5), [0, inf) for "depth" (default 1).
      units: "module": the leaves that share a parent path are one unit; units are ordered by path,
        with numbers as numbers, and those without a kernel (a normalization) keep S = 1 and are
        left out of the statistics. "leaf": every leaf is a unit, in tree order, with c = 0 and
        an x beyond 1 if it has one axis or none: the authors' formulas as written.
      overrides: for the path of a unit, any of its "connections", "depth" and "scale".
      architecture: what `optax_ext.architecture` read, its `max_depth` among it; `None` is names
        and shapes. Median and extremes are those of the parameters at `init`.

    Raises:
      ValueError: an argument is out of its range, or (at `init`) an overridden path is not there,
        or a parameter is not in the architecture.

    >>> import jax.numpy as jnp
    >>> params = {name: {"kernel": jnp.ones((n, 2)), "bias": jnp.ones(2)}
    ...           for name, n in (("in", 2), ("mid", 4), ("out", 8))}
    >>> tx = scale_by_connections(scaling="additive", strength=0.5)
    >>> print(tx.init(params).connection_scale)
    [1.5 1.5 1.  1.  0.5 0.5]
    """
    _check(scaling, strength, units, overrides, architecture)

    def init(params: optax.Params) -> ScaleByConnectionsState:
        found, unit_of_leaf = find_units(params, units, overrides or {}, architecture)
        scales = [
            1.0,
            *_scales(found, scaling, strength, architecture),
        ]  # the first is for `None` leaves
        dtype = scalar_dtype(params)
        vector = [jnp.asarray(scales[unit + 1], dtype) for unit in unit_of_leaf]
        return ScaleByConnectionsState(jnp.stack(vector) if vector else jnp.ones((0,), dtype))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return scale_each(state.connection_scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def connection_table(
    params: optax.Params,
    *,
    scaling: str,
    strength: float | None = None,
    units: str = "module",
    overrides: Overrides | None = None,
    architecture: Architecture | None = None,
) -> ConnectionTable:
    r"""What `scale_by_connections` makes of a parameter tree, to read before training.

    Args:
      params: the parameters, or their shapes (`jax.eval_shape`).
      scaling: as in `scale_by_connections`, like all that follow.
      strength: a Python number.
      units: "module" or "leaf".
      overrides: values for single units.
      architecture: what `optax_ext.architecture` read, or `None`.

    Raises:
      ValueError: as `scale_by_connections`.

    >>> import jax.numpy as jnp
    >>> params = {name: {"kernel": jnp.ones((n, 2)), "bias": jnp.ones(2)}
    ...           for name, n in (("in", 2), ("mid", 4), ("out", 8))}
    >>> table = connection_table(params, scaling="depth")
    >>> print(table)
    path  parameters  connections  depth  scale
    in             6            4      0  1.587
    mid           10            8      1  1.260
    out           18           16      2  1.000
    >>> print(f"{table.mean_scale:.3f}")
    1.180
    """
    _check(scaling, strength, units, overrides, architecture)
    found, _ = find_units(params, units, overrides or {}, architecture)
    scales = _scales(found, scaling, strength, architecture)
    rows = zip(found, scales, strict=True)
    return ConnectionTable(unit._replace(scale=scale) for unit, scale in rows)


def _scales(
    found: list[Connection],
    scaling: str,
    strength: ArrayLike | None,
    architecture: Architecture | None,
) -> list[Any]:
    """S of every unit: by formula where it counts, 1 where it doesn't, as overridden if it is."""
    formula, default, _ = _SCALINGS[scaling]
    measured = [unit.depth if scaling == "depth" else unit.connections for unit in found]
    counted = [i for i, value in enumerate(measured) if value is not None]
    values = np.asarray([measured[i] for i in counted], float)
    if scaling == "depth":
        x = relative_depths(values, 0 if architecture is None else architecture.max_depth)
    else:
        x = relative_connections(values)
    formed = formula(default if strength is None else strength, x)
    scaled = dict(zip(counted, formed, strict=True))
    return [
        scaled.get(i, 1.0) if unit.scale is None else unit.scale for i, unit in enumerate(found)
    ]


def _check(scaling, strength, units, overrides, architecture) -> None:
    _checks.one_of(tuple(_SCALINGS), scaling=scaling)
    if strength is not None:
        _SCALINGS[scaling].check(strength=strength)
    _checks.one_of(("module", "leaf"), units=units)
    if not isinstance(architecture, Architecture | None):
        raise ValueError(
            "architecture must be None or what optax_ext.architecture returns, got"
            f" {architecture!r}"
        )
    if not isinstance(overrides, Mapping | None):
        raise ValueError(f"overrides must be None or a mapping by path, got {overrides!r}")
    for path, values in (overrides or {}).items():
        if not isinstance(values, Mapping):
            raise ValueError(f"overrides[{path!r}] must be a mapping, got {values!r}")
        for key, value in values.items():
            name = f"overrides[{path!r}]"
            _checks.one_of(("connections", "depth", "scale"), **{f"key of {name}": key})
            _checks.non_negative(**{f"{name}[{key!r}]": value})
