"""Shardings of an optimizer's state that follow those of its parameters."""

from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_ext import _checks, _host_memory
from optax_ext.low_precision.formats import is_encoded


def state_shardings(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
    """Return shardings of the state that follow those of the parameters.

    An array of the state that belongs to a parameter is sharded like the parameter, along the axes
    where that is possible. Everything else is replicated. Arrays that the optimizer stores in the
    host's memory stay there. Nothing is computed, so the parameters can be shapes. With these
    shardings, a state that fits on no single device can be initialized on the mesh or restored from
    a checkpoint.

    Args:
      tx: an optimizer.
      params: arrays or `jax.ShapeDtypeStruct`, each with a `NamedSharding`, all on one mesh; for
        `optax.lookahead`, the pair of fast and slow parameters.

    Returns:
      A tree of `NamedSharding` like the state.

    Raises:
      ValueError: `tx` is not a transformation, a parameter has no `NamedSharding`, or the
        parameters are not all on one mesh.

    >>> import jax.numpy as jnp, optax_ext
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> sharding = NamedSharding(mesh, PartitionSpec("data"))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
    >>> tx = optax_ext.invadam(1e-3)
    >>> placed = state_shardings(tx, params)
    >>> print(tuple(optax.tree.get(placed, "mu")["w"].spec))
    ('data',)
    >>> state = jax.jit(tx.init, out_shardings=placed)({"w": jnp.ones((8, 4))})
    """
    _checks.transformation(tx=tx)
    mesh = _mesh(params)
    return optax.tree.map_params(
        tx,
        _beside,
        _host_memory.types(tx.init, params),
        params.fast if isinstance(params, optax.LookaheadParams) else params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode) or is_encoded(x),
    )


def _mesh(params: optax.Params) -> Any:
    """Return the mesh of all parameters."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    mesh = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(f"params must have a NamedSharding, got {sharding} for {name(path)}")
        if mesh is not None and sharding.mesh != mesh:
            raise ValueError(
                f"params must lie on one mesh, got {sharding.mesh} for {name(path)} and {mesh}"
                " for the parameters before it"
            )
        mesh = sharding.mesh
    if mesh is None:
        raise ValueError("params must contain at least one array")
    return mesh


def _beside(leaf: Any, param: Any) -> Any:
    """Return the parameter's sharding for `leaf`, without the axes that don't divide evenly."""
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    if is_encoded(leaf):
        return jax.tree.map(lambda x: _beside(x, param), leaf)
    mesh, spec = param.sharding.mesh, param.sharding.spec
    if len(leaf.shape) != len(param.shape):
        spec = ()
    shards = param.sharding.shard_shape(param.shape)
    kept = [
        axes if shard and ours % (theirs // shard) == 0 else None
        for axes, ours, theirs, shard in zip(spec, leaf.shape, param.shape, shards, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept), memory_kind=_host_memory.kind(leaf))
