"""Rewrites that save passes over leaves, or let a kernel compute an operation."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.graph import Kind, Node, Operation


class Builder(Protocol):
    """The part of a jaxpr's reader that rewrites use."""

    def apply(self, op: Operation) -> list[Node]:
        """Return the results of one operation."""
        ...

    def bind(self, function: Callable[..., Any], *args: Node, static: tuple[Any, ...] = ()) -> Node:
        """Return the result of `function(*args, *static)`."""
        ...


def inner_product(build: Builder, op: Operation) -> Node | None:
    """Return the inner product of two leaves of equal shape as a sum of products, or `None`."""
    (left, right), (result,) = op.args, op.types
    (left_axes, right_axes), (batch, _) = op.params["dimension_numbers"]
    whole = result.shape == () and left.shape == right.shape and not batch
    if not whole or tuple(left_axes) != tuple(right_axes) or not (left.on_leaf and right.on_leaf):
        return None
    # XLA, too, multiplies and adds narrow floats in float32.
    wide = jnp.promote_types(result.dtype, jnp.float32)
    if not jnp.issubdtype(result.dtype, jnp.floating):
        wide = result.dtype
    left, right = (_converted(build, x, wide) for x in (left, right))
    return _converted(build, build.bind(jnp.sum, build.bind(lax.mul, left, right)), result.dtype)


def _converted(build: Builder, x: Node, dtype: DTypeLike) -> Node:
    if x.dtype == dtype:
        return x
    return build.bind(lax.convert_element_type, x, static=(dtype,))


def select_branches(
    build: Builder, index: Node, branches: Sequence[Callable[[], list[Node]]]
) -> list[Node]:
    """Return selects among the results of all branches of a conditional."""
    chosen = branches[0]()
    for i, branch in enumerate(branches[1:], start=1):
        reached = build.bind(operator.ge, index, static=(i,))
        chosen = [
            a if a is b else build.bind(lax.select_n, reached, a, b)
            for a, b in zip(chosen, branch(), strict=True)
        ]
    return chosen


def statistics_of_choices(build: Builder, x: Node, reduce: Callable[[Node], Node]) -> Node | None:
    """Move a select by a scalar outside of a reduction of `x`, if that saves a level.

    The result is a select between the statistics of both choices. An example is `optax.safe_norm`
    in trust ratios. It takes the norm of an array that another norm selects. Without the move, the
    two norms would need two passes, one after the other.

    Args:
      build: the reader.
      x: the operand of the reduction.
      reduce: a function that returns the statistic of a choice.
    """
    predicate = _scalar_predicate(x, set()) if x.level > 0 else None
    if predicate is None:
        return None
    choices = [_choose(build, x, predicate, i, {}) for i in (0, 1)]
    if max(choice.level for choice in choices) == x.level:
        return None
    scalar = predicate.args[0] if predicate.kind is Kind.BROADCAST else predicate
    return build.bind(lax.select_n, scalar, *map(reduce, choices))


def _scalar_predicate(x: Node, seen: set[Node]) -> Node | None:
    """Return the scalar of the level of `x` that selects inside of it."""
    if x in seen or x.kind is not Kind.ELEMENTWISE:
        return None
    seen.add(x)
    if x.primitive is lax.select_n_p and len(x.args) == 3:
        which = x.args[0]
        if not which.on_leaf and which.level == x.level:
            return which
    found = (_scalar_predicate(a, seen) for a in x.args)
    return next((p for p in found if p is not None), None)


def _choose(build: Builder, x: Node, predicate: Node, i: int, memo: dict[Node, Node]) -> Node:
    """Return the node of `x` for the case that `predicate` equals `i`."""
    if x.kind is not Kind.ELEMENTWISE:
        return x
    if x not in memo:
        if x.primitive is lax.select_n_p and x.args[0] is predicate:
            memo[x] = _choose(build, x.args[1 + i], predicate, i, memo)
        else:
            assert x.primitive is not None
            args = [_choose(build, a, predicate, i, memo) for a in x.args]
            (memo[x],) = build.apply(Operation(x.primitive, x.params, args, [x]))
    return memo[x]
