"""The choice of a format for each leaf of a state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from optax_ext import _checks
from optax_ext.low_precision.formats import Format, FourthRoot, SignedRoot, Split
from optax_ext.transforms.cascades import CascadeOfSquaresState

Path = tuple[Any, ...]
Formats = Callable[[Path, Any], Format | None]
# A function that returns the format of a leaf, or the reason why it stays as it is. It takes the
# leaf's path, its path with names of classes, and the leaf.
Choose = Callable[[Path, Path, Any], Format | str]

_FIRST_MOMENTS = frozenset(("mu", "m1", "trace", "later"))
_SECOND_MOMENTS = frozenset(("nu", "nu_max"))
_WEIGHTS = frozenset(("slow",))
# States whose averages are subtracted from each other, so that an error of a few percent is fatal,
# or whose `nu` can be negative.
_NEEDS_FLOAT32 = (
    CascadeOfSquaresState.__name__,
    optax.ScaleByRStdDevState.__name__,
    optax.contrib.SophiaState.__name__,
)


def default_formats(group_size: int = 64) -> Formats:
    """Return the function that `quantize_state` uses by default; see there.

    Args:
      group_size: number of neighbors that share a scale.

    Raises:
      ValueError: `group_size` is not a positive integer.

    >>> import optax_ext
    >>> narrow = default_formats()
    >>> def formats(path, leaf):  # the fast first moment of AdEMAMix only
    ...     return narrow(path, leaf) if "m1" in str(path) else None
    >>> tx = optax.contrib.ademamix(1e-3)
    >>> print(optax_ext.quantization_report(tx, jnp.ones(4096), formats).bytes)
    37128
    """
    _checks.size(group_size=group_size)

    def formats(path: Path, leaf: Any) -> Format | None:
        del leaf
        # The outermost name decides: the inner ones can be names of parameters.
        for key in path:
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


def chooser(formats: Formats | None, group_size: int, min_size: int, shardings: Any) -> Choose:
    """Check the arguments; return the function that chooses for each leaf."""
    _checks.size(min_size=min_size)
    by_default = default_formats(group_size)
    if formats is not None and not callable(formats):
        raise ValueError(f"formats must be a function of path and leaf, got {formats!r}")
    format_of = by_default if formats is None else formats
    sharding_of = ByPath(shardings)

    def choose(path: Path, named: Path, x: Any) -> Format | str:
        if isinstance(x, tuple):
            return "encoded already"
        if (dtype := jnp.result_type(x)) != jnp.float32:
            return dtype.name
        if x.size < min_size:
            return f"fewer than {min_size} elements"
        type_ = jax.typeof(x) if isinstance(x, jax.Array) else x
        if getattr(type_, "memory_space", None) == jax.memory.Space.Host:
            return "in host memory"
        chosen = format_of(named, x)
        if chosen is None:
            return "no format for this field"
        sharding = sharding_of(path, lambda s: len(s.spec) <= x.ndim) or _explicit_sharding(type_)
        shard = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return chosen.misfit(x.shape, shard) or chosen

    return choose


def _explicit_sharding(type_: Any) -> NamedSharding | None:
    """Return the sharding that a type has along explicit axes of a mesh, if any."""
    sharding = getattr(type_, "sharding", None)
    cut = isinstance(sharding, NamedSharding) and any(axes is not None for axes in sharding.spec)
    return sharding if cut else None


def leaves(
    state: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Path, Path, Any]]:
    """Yield each leaf's path, its path with the names of `NamedTuple` classes, and the leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf):
        yield path, tuple(_named(state, path)), leaf


def _named(node: Any, path: Path) -> Iterator[Any]:
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            yield optax.tree_utils.NamedTupleKey(type(node).__name__, key.name)
            node = getattr(node, key.name, None)
        else:
            yield key
            index: Any = getattr(key, "key", getattr(key, "idx", None))
            node = node[index] if isinstance(node, (Mapping, Sequence)) else None


class ByPath:
    """The leaves of a tree like the parameters, looked up by the end of a path in the state."""

    def __init__(self, tree: Any) -> None:
        """Read the leaves of a tree."""
        self._leaves = dict(jax.tree_util.tree_leaves_with_path(tree))

    def __call__(self, path: Path, accept: Callable[[Any], bool]) -> Any:
        """Return the accepted leaf with the longest path that ends `path`, or `None`."""
        found = (self._leaves.get(path[i:]) for i in range(len(path) + 1))
        return next((x for x in found if x is not None and accept(x)), None)
