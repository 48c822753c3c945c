"""The architecture of a network, read from its computation: depth and connections."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ext import _module_tree
from optax_ext._tracing import Uses, earliest, find_uses


class Placed(NamedTuple):
    """The place of one parameter in the network.

    Attributes:
      path: its keys joined by "/".
      connections: number of its connections; `None` if it has none of its own, like a bias.
      depth: number of operations with parameters on the longest path from the inputs to it.
      note: empty if all this is read from the computation, otherwise what is not, and why.
    """

    path: str
    connections: int | float | None
    depth: int | float
    note: str


@dataclass(frozen=True)
class Architecture(Mapping[str, Placed]):
    """The places of all parameters, by path. It is hashable and prints as a table.

    Attributes:
      parameters: the places, in the order of `jax.tree.leaves(params)`.
      max_depth: the largest depth; that of a stack of layers is the depth of its last layer.
    """

    parameters: tuple[Placed, ...]
    max_depth: int

    @cached_property
    def _by_path(self) -> dict[str, Placed]:
        return {placed.path: placed for placed in self.parameters}

    def __getitem__(self, path: str) -> Placed:
        """Return the parameter's place. Flax linen's first key, "params/", may be left out."""
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
        """Return a header and one line per parameter."""
        width = max(len("path"), *(len(placed.path) for placed in self.parameters))
        lines = [f"{'path':<{width}}  connections  depth  note"]
        for path, count, depth, note in self.parameters:
            connections = "-" if count is None else f"{count:.10g}"
            lines.append(
                f"{path:<{width}}  {connections:>11}  {round(depth, 3):>5}  {note}".rstrip()
            )
        return "\n".join(lines)


def architecture(
    apply_fn: Callable[..., Any], params: optax.Params, *example_inputs: Any
) -> Architecture:
    """Return the depth and the connections of every parameter, read from the computation.

    `caadam`, `scale_by_connections` and `connection_table` take the result; without it they read
    names and shapes. The computation is traced, not run. `jax.jit`, `jax.checkpoint`, loops,
    branches and custom derivatives are looked into.

    *Depth.* An operation o sums products of data and weights (a dense layer, a convolution,
    attention's projections, `einsum`) or looks up rows of weights (an embedding). It is one level
    deeper than its deepest operand x if no operation on the way to it has used its weights w. All
    other results are as deep as their deepest operand. The inputs have level 0.

    So the depth d is the longest path from the inputs to the first use of w, and a recurrent
    network is as deep after a thousand steps as after one. What is added to the result of an
    operation or multiplied with it, as a bias or a normalization, has the depth of the operation.

    *Connections.* A kernel has as many connections as elements: in × out for a dense layer,
    window × in/groups × out for a convolution, vocabulary × features for an embedding.

    *Stacked layers.* If `lax.scan` takes the layers of a stack one after the other, the connections
    are those of one layer, and the depth is the mean over the layers. The body is read only until
    all levels in it grow by the same numbers in two steps; they are assumed to go on like that, so
    the time does not depend on the length. A stack that is sliced in another way, as `stack[i]`, or
    is flipped or joined with others before, is read by its shape: all layers count as one, at the
    depth of the first use, and its `note` says "sliced".

    *Prepared weights.* Weights may be cast, masked, normalized or multiplied with each other on the
    way to an operation. Its kernels are the leaves with the most axes longer than 1; the others,
    such as the norms of weight normalization, have its depth. If data select or scale weights, as
    in `where(mask, w1, w2)` or `w * f(x)` with data `mask` and `x`, the result counts as data, and
    the weights count as used elementwise.

    *Notes.* What the computation doesn't tell is read from shapes and the module tree. A leaf that
    is used only elementwise counts its elements if more than one of its axes is longer than 1,
    unless its shape is that of the output of a kernel in its module. A leaf that is not used has
    the depth of its module, or of the module before, and counts its elements if its shape is that
    of a kernel and its module has no other. Operands of functions that can't be looked into
    (`pl.pallas_call`) are kernels if more than one of their axes is longer than 1.

    Args:
      apply_fn: a function of the parameters and the inputs, such as a Flax linen module's `apply`.
        Batch statistics must not be among the inputs, as they would count as data: let the function
        close over them.
      params: the parameters, or their shapes (`jax.eval_shape`): with Flax linen `variables` or
        `variables["params"]`, whichever `apply_fn` takes; with nnx `nnx.state(model, nnx.Param)`.
      *example_inputs: arrays, or their shapes. Anything else, such as `True`, is passed as it is.
        Keywords are given by `functools.partial(apply_fn, train=False)`.

    Returns:
      Depth and connections by path. It prints as a table.

    Raises:
      ValueError: `params` has no arrays or has other things than arrays, `apply_fn` fails with
        these arguments, it never combines parameters with inputs, or two leaves have one path.

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
        for (path, array), uses in zip(arrays, find_uses(jaxpr, len(arrays)), strict=True)
    }
    if not any(leaf.levels for leaf in leaves.values()):
        raise ValueError(
            "apply_fn must compute with its arguments, got one that brings no array of params"
            f" together with {_described(example_inputs)}"
        )
    placed: dict[str, Placed] = {}
    module_depth = 0
    modules = _module_tree.modules(leaves)
    for module in sorted(modules, key=_module_tree.natural):
        inside = [leaves[path] for path in modules[module]]
        levels = (leaf.levels[0] for leaf in inside if leaf.levels)
        module_depth = min(levels, default=module_depth)  # if nothing is used, the one before
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
    all_uses: Uses

    @cached_property
    def is_in_operation(self) -> bool:
        """True if an operation sums over it or looks it up."""
        return any(use.in_operation for use in self.all_uses)

    @cached_property
    def uses(self) -> Uses:
        """The uses in operations, or all uses if there are none."""
        wanted = self.is_in_operation
        return {use: levels for use, levels in self.all_uses.items() if use.in_operation == wanted}

    @cached_property
    def levels(self) -> list[int]:
        """The levels of the first uses of its layers, each level once; empty if it isn't used."""
        return np.unique(reduce(earliest, self.uses.values())).tolist() if self.uses else []

    def placed(self, module: list["_Leaf"], module_depth: int) -> Placed:
        """Return its place, by its shape and its module where the computation doesn't tell."""
        is_kernel = self.is_in_operation or self.is_kernel_by_shape(module)
        elements = math.prod(self.shape) if is_kernel else None
        if not self.levels:
            return Placed(self.path, elements, module_depth, "by shape and path: not used")
        depth = _shorter(sum(self.levels) / len(self.levels))
        if elements is None:
            return Placed(self.path, None, depth, "")
        reasons = sorted({use.obstacle for use in self.uses if use.obstacle})
        reasons += [] if self.is_in_operation else ["used elementwise"]
        note = f"by shape: {', '.join(reasons)}" if reasons else ""
        return Placed(self.path, _shorter(elements / len(self.levels)), depth, note)

    def is_kernel_by_shape(self, module: list["_Leaf"]) -> bool:
        """Return whether it counts though no operation sums over it or looks it up."""
        kernels = [leaf.shape for leaf in module if leaf.is_in_operation]
        if self.levels:
            is_bias = any(_module_tree.is_bias_of(self.shape, kernel) for kernel in kernels)
            return not is_bias and all(use.long_axes > 1 for use in self.uses)
        by_shape = _module_tree.kernels_by_shape([leaf.shape for leaf in module])
        return not kernels and module.index(self) in by_shape


def _shorter(x: float) -> int | float:
    return int(x) if x == int(x) else x


def _arrays(params: optax.Params) -> list[tuple[str, Any]]:
    """Return path and array of every leaf."""
    arrays = [named for named in _module_tree.named_arrays(params) if named[1] is not None]
    if not arrays:
        raise ValueError(f"params must contain at least one array, got {params!r}")
    return arrays


def _trace(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """Return the jaxpr of the parameters' leaves and the inputs' arrays."""
    if not callable(apply_fn):
        raise ValueError(f"apply_fn must be a function of params and inputs, got {apply_fn!r}")
    leaves, structure = jax.tree.flatten((params, inputs))
    n_params = len(jax.tree.leaves(params))
    traced = [i for i, leaf in enumerate(leaves) if i < n_params or _module_tree.is_array(leaf)]

    def apply(*arrays: Any) -> list[Any]:
        given = dict(zip(traced, arrays, strict=True))
        filled = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, inputs = jax.tree.unflatten(structure, filled)
        return [
            leaf
            for leaf in jax.tree.leaves(apply_fn(params, *inputs))
            if _module_tree.is_array(leaf)
        ]

    try:
        return jax.make_jaxpr(apply)(*(leaves[i] for i in traced))
    except Exception as error:
        raise ValueError(
            f"apply_fn must take params and example_inputs, got {_described(inputs)}, for which it"
            f" raises {type(error).__name__}: {error}"
        ) from error


def _described(inputs: tuple[Any, ...]) -> str:
    """Return the inputs with their shapes, by name."""

    def one(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if _module_tree.is_array(leaf) else repr(leaf)

    descriptions = [
        f"example_inputs[{i}]{jax.tree_util.keystr(keys)} = {one(leaf)}"
        for i, value in enumerate(inputs)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(value)
    ]
    return ", ".join(descriptions) or "no example_inputs"
