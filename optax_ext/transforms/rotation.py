"""Chunks of a leaf that take turns, so that only one k-th of it is held at a time.

The largest axis of a leaf is cut into equal blocks, and each block into k parts; a chunk is one
part of every block. So where a mesh of devices cuts the axis between blocks, each device finds its
share of the chunk in its own shard.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A block holds at least as many times k entries; its last part may lack up to k - 1 of them.
_FILL = 8


class _Cut(NamedTuple):
    """How a leaf is cut.

    Attributes:
      axis: that is cut.
      blocks: a power of two, as the numbers of devices are along the axes of most meshes.
      size: of a block.
      length: of a part; parts are equally long, so that the number of one can be traced, and the
        last ones may own less than they hold, or nothing.
    """

    axis: int
    blocks: int
    size: int
    length: int


def chunk(x: jax.Array, j: Any, k: int) -> jax.Array:
    """Chunk `j` of `k`: as `x`, but for one axis; what is lacking is filled with a block's last."""
    cut, x = _cut(x.shape, k), jnp.atleast_1d(x)
    part = j * cut.length + jnp.arange(cut.length, dtype=jnp.int32)
    return _pick(x, part, cut, cut.size)


def spread(held: jax.Array, like: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """A chunk's entries at every place they could come from, and the chunk that owns each place.

    Elementwise, where putting the chunk into its place would copy the leaf.
    """
    cut, whole = _cut(like.shape, k), jnp.atleast_1d(like)
    length = max(cut.length, 1)
    part = jnp.arange(cut.size, dtype=jnp.int32) % length
    everywhere = placed_like(_pick(held, part, cut, cut.length), whole)
    sharding = jax.typeof(whole).sharding
    place = jax.lax.broadcasted_iota(jnp.int32, whole.shape, cut.axis, out_sharding=sharding)
    owner = place % max(cut.size, 1) // length
    return everywhere.reshape(like.shape), owner.reshape(like.shape)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` where `like` lies, which is in its type on explicit axes of a mesh only."""
    ours, theirs = jax.typeof(x).sharding, jax.typeof(like).sharding
    return x if ours.spec == theirs.spec else jax.sharding.reshard(x, theirs)


def _cut(shape: tuple[int, ...], k: int) -> _Cut:
    """A 0-d leaf is cut as a vector of one."""
    shape = shape or (1,)
    axis = max(range(len(shape)), key=shape.__getitem__)
    blocks, size = 1, shape[axis]
    while size and size % 2 == 0 and size // 2 >= _FILL * k:
        blocks, size = 2 * blocks, size // 2
    return _Cut(axis, blocks, size, -(-size // k))


def _pick(x: jax.Array, entries: jax.Array, cut: _Cut, size: int) -> jax.Array:
    """Some entries of every block, which are of the given size here."""
    before, after = x.shape[: cut.axis], x.shape[cut.axis + 1 :]
    blocks = _in_reach(x, cut).reshape(*before, cut.blocks, size, *after)
    picked = jnp.take(blocks, entries, axis=cut.axis + 1, mode="clip")
    return picked.reshape(*before, cut.blocks * entries.size, *after)


def _in_reach(x: jax.Array, cut: _Cut) -> jax.Array:
    """`x`, gathered along its cut axis if its type says that a device holds parts of blocks."""
    sharding, whole = jax.typeof(x).sharding, x.shape[cut.axis]
    devices = whole // max(sharding.shard_shape(x.shape)[cut.axis], 1)
    if cut.blocks % max(devices, 1) == 0:
        return x
    spec = (None if i == cut.axis else axes for i, axes in enumerate(sharding.spec))
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
