"""Cases run for a few steps, uncompiled unless asked: on small trees that is what takes longer."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from support.cases import Case


def build(case: Case, **overrides: Any) -> optax.GradientTransformationExtraArgs:
    """The case, synchronizing often enough for a few steps to see it happen."""
    often = {"sync_period": 2} if case.method == "novak" else {}
    return case.build(**often | overrides)


def step(
    optimizer: optax.GradientTransformation, params: Any, state: Any, gradient: Any
) -> tuple[Any, Any]:
    """Parameters and state after one gradient; where it is missing, a parameter stays."""
    updates, state = optimizer.update(gradient, state, params)
    return jax.tree.map(_moved, params, updates, is_leaf=lambda x: x is None), state


def _moved(p, u):
    return p if u is None else optax.apply_updates(p, u)


def history(
    optimizer: optax.GradientTransformation, params: Any, grads: Iterable[Any], *, jit: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Parameters and state after each of the gradients."""
    advance = partial(step, optimizer)
    advance = jax.jit(advance) if jit else advance
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for gradient in grads:
        params, state = advance(params, state, jax.tree.map(jnp.asarray, gradient))
        yield params, state


def run(
    optimizer: optax.GradientTransformation, params: Any, grads: Iterable[Any], *, jit: bool = False
) -> Any:
    """The parameters after the last of the gradients."""
    *_, (after, _) = history(optimizer, params, grads, jit=jit)
    return after
