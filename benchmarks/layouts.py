"""Sets of leaves on meshes of devices that this machine lacks: shapes with their shardings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_ext
from benchmarks.leaf_sets import Axes, Leaves, Shape, llama


@dataclass(frozen=True)
class ShardedSet:
    """A set of leaves that is sharded across devices.

    Attributes:
      leaves: shapes, each with the mesh axes that partition its dimensions.
      along_model: returns the size of the mesh axis "model" for a number of devices. The axis
        "data" has the other factor.
    """

    leaves: tuple[tuple[Shape, Axes], ...]
    along_model: Callable[[int], int]

    def on(self, devices: Sequence[Any]) -> Leaves:
        """Return the leaves with their shardings on a mesh of these devices."""
        mesh = Mesh(
            np.array(devices).reshape(-1, self.along_model(len(devices))), ("data", "model")
        )
        return {
            f"leaf{i:04d}": jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
            )
            for i, (shape, axes) in enumerate(self.leaves)
        }


def squarest(devices: int) -> int:
    """Return the shorter side of the most square mesh of this number of devices."""
    return next(side for side in range(math.isqrt(devices), 0, -1) if devices % side == 0)


def none_along_model(devices: int) -> int:
    """Return 1, so that the axis "data" contains all devices."""
    del devices
    return 1


def shardings(params: Leaves) -> dict[str, NamedSharding] | None:
    """Return the shardings of the leaves, or `None` if they have none."""
    found = {name: x.sharding for name, x in params.items() if x.sharding is not None}
    return found or None


def state_of(tx: optax.GradientTransformation, params: Any) -> Any:
    """Return the shapes of the optimizer's state, sharded like the parameters if these are."""
    state = jax.eval_shape(tx.init, params)
    if shardings(params) is None:
        return state
    placed = optax_ext.state_shardings(tx, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        placed,
    )


def held(hold: Callable[[Any], Any], params: Leaves) -> Leaves:
    """Return the parameters in the dtypes that an optimizer's step takes."""
    types = jax.eval_shape(hold, shards(params))
    return {
        name: jax.ShapeDtypeStruct(p.shape, types[name].dtype, sharding=p.sharding)
        for name, p in params.items()
    }


def shards(tree: Any) -> Any:
    """Return the shapes of the per-device shards."""

    def shard(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(shard, tree)


def size(tree: Any) -> int:
    """Return the number of bytes of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


_LLAMA_7B = tuple(llama(4096, layers=32, mlp=11008, vocabulary=32000))
_SMALL = tuple(llama(512, layers=2, mlp=1536, vocabulary=1024))

SHARDED_SETS = {
    "LLaMA-7B": ShardedSet(_LLAMA_7B, squarest),
    "LLaMA-7B, fully sharded": ShardedSet(_LLAMA_7B, none_along_model),
    # The small sets compile in a second, for a few devices. A TPU pads no shape of any sharded set.
    "small LLaMA": ShardedSet(_SMALL, squarest),
    "small LLaMA, fully sharded": ShardedSet(_SMALL, none_along_model),
}
