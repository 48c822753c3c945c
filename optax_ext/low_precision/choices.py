"""The choice of a format for each leaf of a state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from optax_ext import _checks
from optax_ext.low_precision.formats import Format, FourthRoot, SignedRoot, Split
from optax_ext.low_precision.nnx_variables import is_variable
from optax_ext.transforms.cascades import CascadeOfSquaresState

Path = tuple[Any, ...]
Formats = Callable[[Path, Path, Any], Format | str | None]


class Choice(NamedTuple):
    """The choice for one leaf of a state.

    Attributes:
      path: the leaf's path, with the names of classes.
      leaf: the leaf.
      format: its format; `None` means that it stays as it is.
      reason: why it stays as it is; empty if it has a format.
    """

    path: Path
    leaf: Any
    format: Format | None
    reason: str


# Takes the leaves of a state, and the parameters; returns a choice for each leaf.
Choose = Callable[[Iterable[tuple[Path, Any]], optax.Params], Sequence[Choice]]

_FIRST_MOMENTS = frozenset(("mu", "m1", "trace", "later"))
_SECOND_MOMENTS = frozenset(("nu", "nu_max"))
_WEIGHTS = frozenset(("slow",))
# States where the divisor is a small difference of averages, so that an error of a few percent is
# fatal, or whose `nu` can be negative. FAME's momentum is a difference, too, but no divisor.
_NEEDS_FLOAT32 = (
    CascadeOfSquaresState.__name__,
    optax.ScaleByRStdDevState.__name__,
    optax.contrib.SophiaState.__name__,
)


def default_formats(*, group_size: int = 64, min_size: int = 4096) -> Formats:
    """Return the function that `quantize_state` uses by default; see there.

    Args:
      group_size: number of neighbors that share a scale.
      min_size: arrays with fewer elements stay as they are.

    Raises:
      ValueError: a number is not a positive integer.

    >>> import optax_ext
    >>> narrow = default_formats()
    >>> def formats(field, parameter, leaf):  # the fast first moment of AdEMAMix only
    ...     is_fast = any(getattr(key, "name", None) == "m1" for key in field)
    ...     return narrow(field, parameter, leaf) if is_fast else None
    >>> tx = optax.contrib.ademamix(1e-3)
    >>> print(optax_ext.quantization_report(tx, jnp.ones(4096), formats).bytes)
    37128
    """
    _checks.size(group_size=group_size, min_size=min_size)

    def formats(field: Path, parameter: Path, leaf: Any) -> Format | str | None:
        del parameter
        if leaf.size < min_size:
            return f"fewer than {min_size} elements"
        for key in field:
            if isinstance(key, optax.tree_utils.NamedTupleKey):
                if key.tuple_name in _NEEDS_FLOAT32:
                    return None
                if key.name in _FIRST_MOMENTS:
                    return SignedRoot(group_size)
                if key.name in _SECOND_MOMENTS:
                    return FourthRoot(group_size)
                if key.name in _WEIGHTS:
                    return Split()
        return None

    return formats


def chooser(formats: Formats | None, shardings: Any) -> Choose:
    """Check the arguments; return the function that chooses for each leaf."""
    if formats is not None and not callable(formats):
        raise ValueError(
            f"formats must be a function of field, parameter and leaf, got {formats!r}"
        )
    format_of = default_formats() if formats is None else formats
    sharding_of = ByPath(shardings)

    def choose_one(path: Path, parameters: ByPath, x: Any) -> tuple[Format | None, str]:
        """Return the format, or `None` and the reason."""
        if isinstance(x, tuple):
            return None, "encoded already"
        if not hasattr(x, "dtype"):
            return None, "not an array"
        if (dtype := jnp.result_type(x)) != jnp.float32:
            return None, dtype.name
        if not x.size:
            return None, "no elements"
        type_ = jax.typeof(x) if isinstance(x, jax.Array) else x
        if getattr(type_, "memory_space", None) == jax.memory.Space.Host:
            return None, "in host memory"
        chosen = format_of(*parameters.divide(path), x)
        if chosen is None or isinstance(chosen, str):
            return None, chosen or "no format for this field"
        sharding = sharding_of(path, lambda s: len(s.spec) <= x.ndim) or _explicit_sharding(type_)
        shard = x.shape if sharding is None else sharding.shard_shape(x.shape)
        misfit = chosen.misfit(x.shape, shard)
        return (None, misfit) if misfit else (chosen, "")

    def choose(leaves: Iterable[tuple[Path, Any]], params: optax.Params) -> list[Choice]:
        parameters = ByPath(params)
        return [Choice(path, x, *choose_one(path, parameters, x)) for path, x in leaves]

    return choose


def _explicit_sharding(type_: Any) -> NamedSharding | None:
    """Return the sharding that a type has along explicit axes of a mesh, if any."""
    sharding = getattr(type_, "sharding", None)
    cut = isinstance(sharding, NamedSharding) and any(axes is not None for axes in sharding.spec)
    return sharding if cut else None


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[Path, Any]]:
    """Yield each leaf's path, with the names of classes, and the leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield tuple(_with_names(tree, path)), leaf


def _with_names(node: Any, path: Path) -> Iterator[Any]:
    for key in path:
        if is_variable(node):  # has one array, and no name that a format depends on
            yield key
            node = None
        elif isinstance(key, jax.tree_util.GetAttrKey):
            yield optax.tree_utils.NamedTupleKey(type(node).__name__, key.name)
            node = getattr(node, key.name, None)
        else:
            yield key
            index: Any = getattr(key, "key", getattr(key, "idx", None))
            node = node[index] if isinstance(node, (Mapping, Sequence)) else None


class ByPath:
    """The leaves of a tree like the parameters, looked up by the end of a path in the state.

    Paths have the names of classes, so a named field of a state is not mistaken for one of the
    parameters.
    """

    def __init__(self, tree: Any) -> None:
        """Read the leaves of a tree."""
        self._leaves = dict(leaves(tree))

    def __call__(self, path: Path, accept: Callable[[Any], bool]) -> Any:
        """Return the accepted leaf with the longest path that ends `path`, or `None`."""
        found = (self._leaves.get(path[i:]) for i in range(len(path) + 1))
        return next((x for x in found if x is not None and accept(x)), None)

    def divide(self, path: Path) -> tuple[Path, Path]:
        """Return the path of a field of the state, and the path of a parameter inside of it."""
        ends = (i for i in range(len(path)) if path[i:] in self._leaves)
        end = next(ends, len(path))
        return path[:end], path[end:]
