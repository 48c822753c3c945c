r"""Connection-aware rates: one fixed scale per tensor, from the shape of the network.

CaAdam (2410.24216) gives tensors with fewer connections than the median a larger rate and tensors
with more a smaller one, or scales by depth. What counts as one tensor matters: the authors'
formulas rank a bias, with no connections, far below every kernel. Here a unit is a kernel with the
bias and the scale of its module by default.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    r"""Return the share of the network behind: :math:`x = (D - (1 + d)) / D`, d = 0 … D - 1."""
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
        """Return one line per unit, under a header, and a last one if nothing is scaled."""
        width = max([len(row.path) for row in self] + [4])
        lines = [f"{'path':<{width}}  {'parameters':>10}  {'connections':>11}  depth  scale"]
        for row in self:
            connections = "-" if row.connections is None else f"{row.connections:g}"
            depth = "-" if row.depth is None else f"{row.depth:g}"
            lines.append(
                f"{row.path:<{width}}  {row.size:>10}  {connections:>11}"
                f"  {depth:>5}  {float(row.scale):>5.3f}"
            )
        if self and len(_connected(self)) < 2 and all(float(row.scale) == 1 for row in self):
            lines.append("Fewer than two units have connections: nothing is scaled.")
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

    The scales are computed at `init` from paths and shapes. The connections c of a unit are the
    elements of its kernel, :math:`\prod \text{shape}`: in × out for a dense layer, window ×
    in/groups × out for a convolution. Its depth d is its index. With an `architecture`, both are
    what the network's computation tells.

    *Units.* A module is the leaves that share a path up to its last "/" or ".", and a unit by
    default. Of several kernels in one module, as in a flat tree, each is a unit of its own. A
    vector then goes with the kernel whose output has its size: its last axis, or its first if that
    fits more vectors. Of several such kernels it goes with that of the most alike name, as b1 with
    w1, then with the nearest one before it; an `architecture` chooses by depth first. A vector that
    fits none keeps S = 1 and is left out of the statistics, as a module without a kernel is.

    *Kernels.* An `architecture` knows them; without one, shapes tell. A kernel has more than one
    axis longer than 1: a vector is one also as (1, 1, 1, 16), however many axes it has. The
    exception are layers with one input or output, such as (1, 16), (64, 1) or (1, 1, 64, 1). They
    count where the module stores its vectors with one axis, or holds no other leaf of as many axes.
    A leaf next to a kernel is its bias if its axes are some of the kernel's, the output's among
    them: (2, 4) beside (8, 2, 4). Shapes can't tell stacked layers, or a vector that is alone in
    its module as (8, 1), such as that of Equinox' `WeightNorm`: these need an `architecture`.

    Args:
      scaling: "additive", "multiplicative", "signed" or "depth": see the functions of these names
        (`by_depth` for the last).
      strength: s; in [0, 1] for "additive" (default .95), (0, inf) for "multiplicative" and
        "signed" (default 5), [0, inf) for "depth" (default 1).
      units: "module": as above, ordered by path, with numbers as numbers. "leaf": every leaf is a
        unit, in tree order, with c = 0 and an x beyond 1 if it has one axis or none: the authors'
        formulas as written.
      overrides: for the path of a unit, any of its "connections", "depth" and "scale". The path is
        the module's, or the kernel's where its module has several.
      architecture: what `optax_ext.architecture` read, its `max_depth` among it; `None` is names
        and shapes. Median and extremes are those of the parameters at `init`.

    Raises:
      ValueError: an argument is out of its range, or (at `init`) `params` holds other things than
        arrays of floats, an overridden path is not there, or a parameter is not in the
        architecture.

    Warns:
      UserWarning: at `init`, fewer than two units have connections, so that nothing is scaled.

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
        _warn_if_unscaled(found, scaling, architecture)
        # The first is for `None` leaves.
        scales = [1.0, *_scales(found, scaling, strength, architecture)]
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
    r"""Tells what `scale_by_connections` makes of a parameter tree, to read before training.

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
    """Return S of every unit: 1 if it doesn't count, as overridden if it is, else by formula."""
    formula, default, _ = _SCALINGS[scaling]
    counted, x = _relative(found, scaling, architecture)
    formed = formula(default if strength is None else strength, x)
    scaled = dict(zip(counted, formed, strict=True))
    return [
        scaled.get(i, 1.0) if unit.scale is None else unit.scale for i, unit in enumerate(found)
    ]


def _relative(
    found: Sequence[Connection], scaling: str, architecture: Architecture | None
) -> tuple[list[int], NDArray[Any]]:
    """Return the units that count, and the x of each."""
    measured = [unit.depth if scaling == "depth" else unit.connections for unit in found]
    counted = [i for i, value in enumerate(measured) if value is not None]
    values = np.asarray([measured[i] for i in counted], float)
    if scaling == "depth":
        max_depth = 0 if architecture is None else architecture.max_depth
        return counted, relative_depths(values, max_depth)
    return counted, relative_connections(values)


def _connected(units: Iterable[Connection]) -> list[Connection]:
    """Return those that have connections: fewer than two can't differ."""
    return [unit for unit in units if unit.connections]


def _warn_if_unscaled(
    found: Sequence[Connection], scaling: str, architecture: Architecture | None
) -> None:
    connected, (_, x) = _connected(found), _relative(found, scaling, architecture)
    overridden = any(unit.scale is not None for unit in found)
    if not found or len(connected) > 1 or x.any() or overridden:
        return
    which = f"only the unit {connected[0].path!r} has" if connected else "no unit has"
    warnings.warn(
        f"scale_by_connections: {which} connections, so nothing will be scaled. Give"
        " architecture=optax_ext.architecture(...) or units='leaf', or nest params by layer; for a"
        " single layer, use optax.adam",
        stacklevel=3,
    )


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
