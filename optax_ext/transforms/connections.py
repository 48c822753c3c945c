"""Connection-aware rates: one fixed scale per tensor, from the shape of the network.

CaAdam (2410.24216) gives a larger rate to tensors that have fewer connections than the median, and
a smaller rate to tensors that have more. Or it scales by depth. In the authors' formulas each
tensor counts alone, so a bias, which has no connections, is far below every kernel. Here the
tensors that count together are a unit. By default, a unit is a kernel with the bias and the scale
of its module.
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
from optax_ext._connection_units import Connection, Overrides, find_units
from optax_ext._numerics import scalar_dtype, scale_each
from optax_ext.architecture import Architecture


def additive(s: ArrayLike, x: NDArray[Any]) -> Any:
    """Return the scale 1 + s x: 1 - s for the most connected unit, 1 + s for the least."""
    return 1 + s * x


def multiplicative(s: ArrayLike, x: NDArray[Any]) -> Any:
    """Return the scale s^|x|, which is s for the least *and* the most connected unit."""
    return s ** abs(x)


def signed(s: ArrayLike, x: NDArray[Any]) -> Any:
    """Return the scale s^x, from 1/s for the most connected unit to s for the least."""
    return s**x


def by_depth(s: ArrayLike, x: NDArray[Any]) -> Any:
    """Return the scale (1 + s)^x, which is larger for early units."""
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
    """Return how far each count is from the median: smallest 1, median 0, largest -1.

    ::

        x = (median - c) / (median - smallest)   for c ≤ median
        x = (median - c) / (largest - median)    for larger c

    Median and extremes are those of the counts above 0. So a count of 0 has x > 1. If a side of the
    median has zero width, as both sides have in a uniform network, x is 0 on that side.
    """
    connected = c[c > 0]
    if not connected.size:
        return np.zeros_like(c)
    median = np.median(connected)
    width = np.where(c <= median, median - connected.min(), connected.max() - median)
    return np.divide(median - c, width, out=np.zeros_like(c), where=width > 0)


def relative_depths(d: NDArray[Any], max_depth: float) -> NDArray[Any]:
    """Return the share of the network after a unit.

    ::

        x = (D - (1 + d)) / D   for the depths d = 0 … D - 1
    """
    levels = 1 + d.max(initial=max_depth)
    return (levels - (1 + d)) / levels


class ConnectionTable(tuple[Connection, ...]):
    """The units of a parameter tree, in order. It prints as a table."""

    __slots__ = ()

    @property
    def mean_scale(self) -> float:
        """The mean of the scales, weighted by the number of parameters.

        Compare any gain of connection-aware rates with Adam at this multiple of the rate.
        """
        total = sum(row.size for row in self)
        return float(sum(row.size * row.scale for row in self)) / total if total else 1.0

    def __str__(self) -> str:
        """Return a header, one line per unit, and a note if nothing is scaled."""
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
        `jax.tree.leaves(params)`, where `None` counts as a leaf.
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
    """Scale each tensor by a constant that depends on its place in the network.

    The update of a tensor is multiplied by S, which is computed at `init` from paths and shapes::

        "additive"         S = 1 + s x
        "multiplicative"   S = s^|x|     as released: s for the least and the most connected unit
        "signed"           S = s^x       as a comment in the released code promises
        "depth"            S = (1 + s)^x

    For "depth", x is the share of the network that comes after the unit. For the others, x is 1 for
    the unit with the fewest connections, 0 for the median, and -1 for the unit with the most. The
    number c of connections of a unit is the number of elements of its kernel: in × out for a dense
    layer, window × in/groups × out for a convolution. Its depth d is its index. With an
    `architecture`, both are read from the network's computation.

    *Units.* A module is the group of leaves that share a path up to its last "/" or ".". By default
    a module is a unit. If a module has several kernels, as a flat tree has, each kernel is a unit.
    Each vector then belongs to the unit of a kernel whose output has the vector's size. The output
    is a kernel's last axis, or its first axis if that fits more vectors. If several kernels fit,
    the vector belongs to the kernel with the most similar name, as b1 to w1, and then to the
    nearest kernel before it. With an `architecture`, the nearest depth decides first. A vector that
    fits no kernel has S = 1 and is left out of the statistics, like a module without a kernel.

    *Kernels.* With an `architecture`, the computation decides which leaves are kernels. Without
    one, the shapes decide. A kernel has more than one axis longer than 1. So (1, 1, 1, 16) is a
    vector, although it has four axes. Layers with one input or output, such as (1, 16), (64, 1) or
    (1, 1, 64, 1), are an exception. They are kernels if the module stores its vectors with one
    axis, or has no other leaf with as many axes. A leaf next to a kernel is its bias if the leaf's
    axes are some of the kernel's axes and include its output: (2, 4) next to (8, 2, 4). Shapes
    can't identify stacked layers, or a vector such as (8, 1) that is alone in its module, as in
    Equinox' `WeightNorm`. These need an `architecture`.

    Args:
      scaling: "additive", "multiplicative", "signed" or "depth".
      strength: s; in [0, 1] for "additive" (default .95), (0, inf) for "multiplicative" and
        "signed" (default 5), [0, inf) for "depth" (default 1). S is computed at `init`, and stored
        in the state, so a later value has no effect.
      units: "module" forms units as above and orders them by path, with conv2 before conv10.
        "leaf" makes every leaf a unit, in tree order. A leaf with at most one axis then has c = 0
        and x > 1. These are the authors' formulas as written.
      overrides: for the path of a unit, any of its "connections", "depth" and "scale". The path is
        that of the module, or that of the kernel if the module has several.
      architecture: the result of `optax_ext.architecture`, whose `max_depth` is used too; `None`
        reads names and shapes. Median and extremes are those of the parameters at `init`.

    Raises:
      ValueError: an argument is out of its range, or (at `init`) `params` contains other things
        than arrays of floats, an overridden path does not exist, or the architecture lacks a
        parameter.

    Warns:
      UserWarning: at `init`, fewer than two units have connections, so nothing is scaled.

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
        # The first scale is for `None` leaves.
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
    """Return a table of the scales that `scale_by_connections` computes, to read before training.

    Args:
      params: the parameters, or their shapes (`jax.eval_shape`).
      scaling: as in `scale_by_connections`, like all arguments below.
      strength: a Python number.
      units: "module" or "leaf".
      overrides: values for single units.
      architecture: the result of `optax_ext.architecture`, or `None`.

    Raises:
      ValueError: in the same cases as `scale_by_connections`.

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
    """Return S of every unit: its override, else 1 if the unit doesn't count, else the formula."""
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
    """Return the units that have connections; fewer than two can't differ in their scale."""
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
