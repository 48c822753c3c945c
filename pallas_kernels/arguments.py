"""Checks of a step's arguments, whose errors name the leaf that is wrong."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.trace import is_array, paths


def check_parameters(params: Any) -> None:
    """Refuse `None`, and leaves that are neither arrays nor numbers."""
    if params is None:
        raise ValueError("params must be a tree of arrays, got None")
    for path, leaf in _named(params):
        if not (is_array(leaf) or isinstance(leaf, int | float | complex)):
            raise ValueError(f"{_of('params', path)} must be an array or a number, got {leaf!r}")


def check_gradients(params: Any, grads: Any) -> None:
    """Refuse gradients whose shapes differ from the parameters'.

    Batches of gradients are allowed: they have extra leading axes. Another structure is also
    allowed, because chains such as `optax.lookahead` take one.
    """
    if jax.tree.structure(grads) == jax.tree.structure(params):
        _check_shapes("grads", grads, "like the parameter", params, batch=True)


def check_updates(params: Any, updates: Any) -> None:
    """Refuse updates whose shapes differ from the parameters'.

    Adding them might broadcast, and so change the shapes of the parameters.
    """
    if jax.tree.structure(updates) == jax.tree.structure(params):
        _check_shapes("updates", updates, "like the parameter", params)


def check_structures(tx: optax.GradientTransformation, params: Any, state: Any, grads: Any) -> None:
    """Refuse a state or gradients whose structure or shapes may be why a step has failed."""
    initial = jax.eval_shape(tx.init, params)
    _check_structure("state", state, "tx.init(params)", initial)
    _check_shapes("state", state, "as in tx.init(params)", initial)
    _check_structure("grads", grads, "params", params)


def notes_on_integer_parameters(params: Any) -> list[str]:
    """Return a line for each parameter whose dtype is not floating or complex."""
    return [
        f"{_of('params', path)} is {leaf.dtype}: optax.masked keeps it out of an optimizer"
        for path, leaf in _named(params)
        if is_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _check_structure(name: str, tree: Any, model_name: str, model: Any) -> None:
    if jax.tree.structure(tree) == jax.tree.structure(model):
        return
    given, expected = paths(tree), paths(model)
    must = f"{name} must have the structure of {model_name}"
    if tree is None:
        raise ValueError(f"{must}, got None")
    if missing := [path for path in expected if path not in given]:
        raise ValueError(f"{must}, but has no {_of(name, missing[0])}")
    if unknown := [path for path in given if path not in expected]:
        raise ValueError(f"{must}, but also has {_of(name, unknown[0])}")
    structures = jax.tree.structure(tree), jax.tree.structure(model)
    raise ValueError(f"{must}, got {structures[0]} instead of {structures[1]}")


def _check_shapes(name: str, tree: Any, where: str, model: Any, *, batch: bool = False) -> None:
    for (path, x), y in zip(_named(tree), jax.tree.leaves(model), strict=True):
        shape, expected = jnp.shape(x), jnp.shape(y)
        in_front = max(len(shape) - len(expected), 0) if batch else 0
        if shape[in_front:] != expected:
            raise ValueError(f"{_of(name, path)} must have shape {expected}, {where}, got {shape}")


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    return zip(paths(tree), jax.tree.leaves(tree), strict=True)


def _of(name: str, path: str) -> str:
    return f"{name}/{path}".rstrip("/")
