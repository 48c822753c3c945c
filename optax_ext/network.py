"""The architecture of a network, read from its computation: depth and connections."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext import _modules, _paths
from optax_ext._tracing.parts import Unknown
from optax_ext._tracing.run import Use, uses_of_parameters


class Placed(NamedTuple):
    """The place of one parameter.

    Attributes:
      path: its keys joined by "/".
      connections: number of its connections; `None` for what goes along with others (a bias).
      depth: number of operations with parameters that come before.
      note: empty if the computation tells all this, else what it doesn't tell, and why.
    """

    path: str
    connections: int | float | None
    depth: int | float
    note: str


@dataclass(frozen=True)
class Architecture(Mapping[str, Placed]):
    """The places of all parameters, by path; hashable, and prints as a table.

    Attributes:
      parameters: the places, in the order of `jax.tree.leaves(params)`.
      max_depth: the depth of the last weights, of a stack of layers those of the last layer.
    """

    parameters: tuple[Placed, ...]
    max_depth: int

    @cached_property
    def _by_path(self) -> dict[str, Placed]:
        return {placed.path: placed for placed in self.parameters}

    def __getitem__(self, path: str) -> Placed:
        """Return the parameter's place; "params/", Flax linen's first key, may be left out."""
        found = self._by_path.get(path) or self._by_path.get(f"params/{path}")
        if found is None:
            raise KeyError(path)
        return found

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths, in order."""
        return iter(self._by_path)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.parameters)

    def __str__(self) -> str:
        """One line per parameter, under a header."""
        width = max(len("path"), *(len(placed.path) for placed in self.parameters))
        lines = [f"{'path':<{width}}  connections  depth  note"]
        for path, count, depth, note in self.parameters:
            connections = "-" if count is None else f"{count:.10g}"
            lines.append(f"{path:<{width}}  {connections:>11}  {depth:>5.4g}  {note}".rstrip())
        return "\n".join(lines)


def architecture(
    apply_fn: Callable[..., Any], params: optax.Params, *example_inputs: Any
) -> Architecture:
    r"""Read the depth and the connections of every parameter from the traced computation.

    For `caadam`, `scale_by_connections` and `connection_table`, which read names and shapes
    without it. Nothing is computed; `jax.jit`, `jax.checkpoint`, loops, branches and custom
    derivatives are looked into.

    An *operation* is what sums products of data and weights (a dense layer, a convolution,
    attention's projections, `einsum`) or looks up rows of them (an embedding). With
    :math:`\ell(x) = 0` for the inputs and :math:`\ell` the maximum over the operands for all else,

    .. math:: d(w) = \min_{o \ni w} \max_{x \in o} \ell(x), \qquad
      \ell(o) = \max_{x \in o} \ell(x) + \begin{cases} 1 & w \text{ is new on the way to } o \\
      0 & \text{else} \end{cases}

    so depth d is the longest path from the inputs to the first use of w, and weights count once on
    a path: recurrent networks are as deep in one step as in a thousand. What is not an operation
    but joins its result, a bias, a normalization or a table of positions that is added, stands
    beside it, at d.

    Connections c of a kernel are its elements: in × out for a dense layer, window × in/groups ×
    out for a convolution, vocabulary × features for an embedding. When the parts of a leaf are
    used one after the other, as the layers of `scan` are, c is that of one part, and d the mean of
    theirs, at which the scale by depth is the geometric mean of what the layers would have alone.
    Slices are told apart by where they cut, also by indices that a loop counts, and weights that
    are stacked, concatenated or repeated before are each where their own slice is. If an index
    can't be known, as in a loop that waits for data, the `note` says so, and every place of the
    computation, each iteration of `scan` too, is taken to cut another part. Not followed are
    weights that are written into an array (`.at[i].set`), or merged with others by `reshape`,
    before they are sliced.

    Weights may be prepared (cast, masked, normalized, multiplied) on the way to an operation. Its
    kernels are the largest leaf that the operand is made of, and all factors of a matrix product;
    others, such as the norms of weight normalization, have the operation's depth. So a query that
    is computed of parameters alone counts where it meets data.

    Weights that data choose or modulate, as `where(mask, w1, w2)`, `lax.cond(mask, w1, w2)` or `w *
    f(x)` with data `mask` and `x`, are used elementwise there and are data from then on: a product
    with them is no operation, so that what follows is less deep by it.

    What can't be told is read from the module tree, and the leaf's `note` says so. A leaf that is
    used elementwise (added, or modulated by data) counts its elements if more than one of its axes
    is longer than 1, unless it is shaped as the output of a kernel in its module. One that isn't
    used counts them if its module has no kernel that is, at the depth of the module before.
    Operands of foreign code (`pl.pallas_call`) are weights if they have more than one axis.

    Args:
      apply_fn: a function of the parameters and the inputs, such as a Flax linen module's `apply`.
        Only what it takes as arguments can be told apart: close over batch statistics rather than
        give them as inputs.
      params: the parameters, or their shapes (`jax.eval_shape`): with Flax linen `variables` or
        `variables["params"]`, whichever `apply_fn` takes, with nnx `nnx.state(model, nnx.Param)`.
      *example_inputs: arrays, or their shapes; what is neither, such as `True`, is passed as it is.
        Keywords are given by `functools.partial(apply_fn, train=False)`.

    Returns:
      Depth and connections by path; print it to read them.

    Raises:
      ValueError: `params` holds no arrays or other things than arrays, `apply_fn` fails with these
        arguments, nothing that it computes brings parameters and inputs together, or two leaves
        have one path.

    >>> import jax, jax.numpy as jnp
    >>> def residual(params, x):
    ...     x = x @ params["in"]["kernel"]
    ...     x = x + jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    ...     return x @ params["out"]["kernel"] + params["out"]["bias"]
    >>> params = {
    ...     "in": {"kernel": jnp.ones((3, 4))},
    ...     "up": {"kernel": jnp.ones((4, 8))},
    ...     "down": {"kernel": jnp.ones((8, 4))},
    ...     "out": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    ... }
    >>> print(architecture(residual, params, jax.ShapeDtypeStruct((3,), jnp.float32)))
    path         connections  depth  note
    down/kernel           32      2
    in/kernel             12      0
    out/bias               -      3
    out/kernel             8      3
    up/kernel             32      1
    """
    arrays = _arrays(params)
    jaxpr = _trace(apply_fn, params, example_inputs)
    leaves = {
        path: _Leaf(path, jnp.shape(array), uses)
        for (path, array), uses in zip(arrays, uses_of_parameters(jaxpr, len(arrays)), strict=True)
    }
    if not any(leaf.uses for leaf in leaves.values()):
        raise ValueError(
            "apply_fn must compute with its arguments, got one that brings no array of params"
            f" together with {_described(example_inputs)}"
        )
    placed: dict[str, Placed] = {}
    module_depth = 0
    modules = _paths.modules(leaves)
    for module in sorted(modules, key=_paths.natural):
        inside = [leaves[path] for path in modules[module]]
        levels = (leaf.levels[0] for leaf in inside if leaf.uses)
        module_depth = min(levels, default=module_depth)  # where nothing is used, the one before
        placed |= {leaf.path: leaf.placed(inside, module_depth) for leaf in inside}
    return Architecture(
        tuple(placed[path] for path in leaves),
        max_depth=max(level for leaf in leaves.values() for level in leaf.levels),
    )


@dataclass(frozen=True)
class _Leaf:
    """One parameter and what the computation does with it."""

    path: str
    shape: tuple[int, ...]
    uses: set[Use]

    @cached_property
    def operations(self) -> set[Use]:
        """Its uses as weights of operations."""
        return {use for use in self.uses if use.operation}

    @cached_property
    def levels(self) -> list[int]:
        """The level of the first use of each of its parts, each level once."""
        first: dict[tuple[Any, ...], int] = {}
        for use in self.operations or self.uses:
            first[use.key] = min(use.level, first.get(use.key, use.level))
        # A slice of what is used as a whole is no part of its own.
        whole = {key for key in first if not any(key[:n] in first for n in range(len(key)))}
        return sorted({first[key] for key in whole})

    def placed(self, module: list["_Leaf"], module_depth: int) -> Placed:
        """Return its place, by its shape and its module where the computation doesn't tell."""
        connections, depth, note = None, module_depth, ""
        if self.uses:
            depth = _shorter(sum(self.levels) / len(self.levels))
        if self.operations:
            connections = math.prod(self.shape)
            opaque = sorted({use.operation for use in self.operations if use.opaque})
            note = f"by shape: in {', '.join(opaque)}" if opaque else ""
        elif self.is_kernel_by_shape(module):
            connections = math.prod(self.shape)
            note = "by shape: used elementwise"
        if any(isinstance(cut, Unknown) for use in self.uses for cut in use.key):
            note = "; ".join(filter(None, [note, "by place: sliced at an index not known"]))
        if not self.uses:
            note = "by shape and path: not used"
        if connections is not None:
            connections = _shorter(connections / max(len(self.levels), 1))
        return Placed(self.path, connections, depth, note)

    def is_kernel_by_shape(self, module: list["_Leaf"]) -> bool:
        """Return whether it counts though no operation sums over it or looks it up."""
        kernels = [leaf.shape for leaf in module if leaf.operations]
        if self.uses:
            is_bias = any(_modules.is_bias_of(self.shape, kernel) for kernel in kernels)
            return not is_bias and all(use.long_axes > 1 for use in self.uses)
        by_shape = _modules.kernels_by_shape([leaf.shape for leaf in module])
        return not kernels and module.index(self) in by_shape


def _shorter(x: float) -> int | float:
    return int(x) if x == int(x) else x


def _arrays(params: optax.Params) -> list[tuple[str, Any]]:
    """Return path and array of every leaf."""
    arrays = [named for named in _paths.named_arrays(params) if named[1] is not None]
    if not arrays:
        raise ValueError(f"params must hold at least one array, got {params!r}")
    return arrays


def _trace(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """Return the jaxpr of the parameters' leaves and the inputs' arrays."""
    if not callable(apply_fn):
        raise ValueError(f"apply_fn must be a function of params and inputs, got {apply_fn!r}")
    leaves, structure = jax.tree.flatten((params, inputs))
    n_params = len(jax.tree.leaves(params))
    traced = [i for i, leaf in enumerate(leaves) if i < n_params or _paths.is_array(leaf)]

    def apply(*arrays: Any) -> list[Any]:
        given = dict(zip(traced, arrays, strict=True))
        filled = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, inputs = jax.tree.unflatten(structure, filled)
        return [
            leaf for leaf in jax.tree.leaves(apply_fn(params, *inputs)) if _paths.is_array(leaf)
        ]

    _check_number(apply_fn, inputs)
    try:
        return jax.make_jaxpr(apply)(*(leaves[i] for i in traced))
    except Exception as error:
        raise ValueError(
            f"apply_fn must take params and example_inputs, got {_described(inputs)}, for which it"
            f" raises {type(error).__name__}: {error}"
        ) from error


def _check_number(apply_fn: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(apply_fn)
    except (TypeError, ValueError):  # some callables have none; the trace will tell
        return
    try:
        signature.bind(None, *inputs)
    except TypeError as error:
        raise ValueError(
            f"example_inputs must be what apply_fn takes after params, got {len(inputs)}: {error}"
            " (keywords are given by functools.partial(apply_fn, ...))"
        ) from error


def _described(inputs: tuple[Any, ...]) -> str:
    """Return the inputs with their shapes, by name."""

    def one(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if _paths.is_array(leaf) else repr(leaf)

    said = [
        f"example_inputs[{i}]{jax.tree_util.keystr(keys)} = {one(leaf)}"
        for i, value in enumerate(inputs)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(value)
    ]
    return ", ".join(said) or "no example_inputs"
