"""Networks for tests of their architecture: shapes of parameters, and what is read from them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_ext

KEY = jax.random.key(0)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(**sizes):
    """Return a module for each name, with a kernel of these sizes."""
    return {name: {"kernel": shape(*size)} for name, size in sizes.items()}


def places(architecture, params):
    """Return connections and depth of every module that has any."""
    table = optax_ext.connection_table(params, scaling="depth", architecture=architecture)
    return {row.path: (row.connections, row.depth) for row in table if row.depth is not None}


def notes(architecture):
    """Return all notes that aren't empty."""
    return {path: placed.note for path, placed in architecture.items() if placed.note}


def read(apply, params, *inputs):
    """Return the places in a network that is read without a note."""
    architecture = optax_ext.architecture(apply, params, *inputs)
    assert not notes(architecture)
    return places(architecture, params)


def depths(apply, params, *inputs):
    """Return the depths in a network that is read without a note."""
    return {path: depth for path, (_, depth) in read(apply, params, *inputs).items()}


def linen_parts(module, *inputs):
    """Return the function of the parameters, and their shapes; it closes over other variables."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    params = shapes.pop("params")
    others = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return lambda params, *xs: module.apply({"params": params, **others}, *xs), params


def nnx_parts(build):
    model = build(nnx.Rngs(0))
    graph, params, others = nnx.split(model, nnx.Param, ...)
    return lambda params, *xs: nnx.merge(graph, params, others, copy=True)(*xs), params
