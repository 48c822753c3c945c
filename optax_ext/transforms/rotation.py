"""Chunks of a leaf that take turns, so that only one k-th of the leaf is stored at a time.

One axis of a leaf is cut into equal blocks, and each block into groups of a few entries. The groups
of every block are distributed over the k chunks in turn. This has two advantages. If the shards of
a mesh of devices begin and end between blocks, each device has its part of a chunk in its own
shard. And if a group is as high as a tile of a TPU's memory, a chunk is read and written tile by
tile, without a copy of the leaf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Entries of a group. Groups of short axes have fewer, groups of vectors have one.
_TILE = 8
# A block has at least this number times k groups. Its last round may lack up to k - 1 groups. In a
# matrix this is a small share, and in a vector it doesn't matter.
_ROUNDS, _ROUNDS_OF_VECTORS = 6, 3


class _Cut(NamedTuple):
    """The way in which a leaf is cut.

    Attributes:
      axis: the longest axis except the last, which is contiguous in memory. If the others are
        short, it is the longest of all.
      blocks: number of blocks, a power of two, like the number of devices along most axes of a
        mesh.
      groups: number of groups in a block.
      size: number of entries in a group.
      rounds: number of groups of a block that a chunk stores; the last of them may be padding.
    """

    axis: int
    blocks: int
    groups: int
    size: int
    rounds: int


def chunk(x: jax.Array, j: Any, k: int) -> jax.Array:
    """Return chunk `j` of `k` along one axis, with zeros where the last round lacks a group."""
    cut, x = _cut(x.shape, k), jnp.atleast_1d(x)
    axis = cut.axis + 1
    groups = _split(_in_reach(x, cut), cut.axis, cut.blocks, cut.groups, cut.size)
    lacking = [(0, cut.rounds * k - cut.groups if i == axis else 0, 0) for i in range(groups.ndim)]
    dealt = _split(lax.pad(groups, jnp.zeros((), x.dtype), lacking), axis, cut.rounds, k)
    mine = lax.dynamic_index_in_dim(dealt, j, axis + 1, keepdims=False)
    return _merged(mine, cut.axis)


def spread(held: jax.Array, like: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return two arrays of the leaf's shape: a chunk's entries, and the index of the owning chunk.

    Each entry of the chunk is repeated at the k places that it could come from. All of this
    is elementwise. To write the chunk into its place would copy the leaf.
    """
    cut, whole = _cut(like.shape, k), jnp.atleast_1d(like)
    rounds = _split(_in_reach(held, cut), cut.axis, cut.blocks, cut.rounds, cut.size)
    groups = lax.slice_in_dim(jnp.repeat(rounds, k, cut.axis + 1), 0, cut.groups, axis=cut.axis + 1)
    everywhere = placed_like(_merged(groups, cut.axis), whole)
    sharding = jax.typeof(whole).sharding
    place = lax.broadcasted_iota(jnp.int32, whole.shape, cut.axis, out_sharding=sharding)
    owner = place // cut.size % max(cut.groups, 1) % k
    return everywhere.reshape(like.shape), owner.reshape(like.shape)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return `x` with the sharding of `like`, as far as the axes of the mesh are explicit."""
    ours, theirs = jax.typeof(x).sharding, jax.typeof(like).sharding
    return x if ours.spec == theirs.spec else jax.sharding.reshard(x, theirs)


def _cut(shape: tuple[int, ...], k: int) -> _Cut:
    """Return the cut of a shape; a 0-d leaf is cut like a vector with one entry."""
    shape, least, tile = shape or (1,), _ROUNDS * k, _TILE
    axis = max(range(len(shape) - 1), key=shape.__getitem__, default=0)
    if len(shape) == 1 or shape[axis] < least:
        axis, least, tile = shape.index(max(shape)), _ROUNDS_OF_VECTORS * k, 1
    size = _power_of_two(shape[axis], least, tile)
    blocks = _power_of_two(shape[axis] // size, least, shape[axis])
    groups = shape[axis] // size // blocks
    return _Cut(axis, blocks, groups, size, -(-groups // k))


def _power_of_two(n: int, least: int, most: int) -> int:
    """Return the largest power of two that divides `n` and is at most `most` and `n / least`."""
    power = 1
    while n % (2 * power) == 0 and n >= 2 * power * least and 2 * power <= most:
        power *= 2
    return power


def _split(x: jax.Array, axis: int, *sizes: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """Return `x` with blocks, groups and entries as one axis again."""
    blocks, groups, size = x.shape[axis : axis + 3]
    return x.reshape(*x.shape[:axis], blocks * groups * size, *x.shape[axis + 3 :])


def _in_reach(x: jax.Array, cut: _Cut) -> jax.Array:
    """Gather `x` along its cut axis if, by its type, a device has only a part of a block."""
    sharding, whole = jax.typeof(x).sharding, x.shape[cut.axis]
    devices = whole // max(sharding.shard_shape(x.shape)[cut.axis], 1)
    if cut.blocks % max(devices, 1) == 0:
        return x
    spec = (None if i == cut.axis else axes for i, axes in enumerate(sharding.spec))
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
