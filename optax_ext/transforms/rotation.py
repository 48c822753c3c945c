"""Chunks of a leaf that take turns, so that only one k-th of it is held at a time.

One axis of a leaf is cut into equal blocks, a block into groups of a few entries, and the groups of
every block are dealt out to the k chunks in turn. So where a mesh of devices cuts the axis between
blocks, each device finds its share of a chunk in its own shard; and where a group is as high as a
tile of a TPU's memory, a chunk is picked and put back tile by tile, without a copy of the leaf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Entries of a group; fewer in short axes, and one in vectors.
_TILE = 8
# A block has at least as many times k groups: its last round of dealing may lack up to k - 1, which
# is little in a matrix, and in a vector doesn't matter.
_ROUNDS, _ROUNDS_OF_VECTORS = 6, 3


class _Cut(NamedTuple):
    """The cut of a leaf.

    Attributes:
      axis: the longest but the last one, along which memory runs; of all where others are short.
      blocks: their number, a power of two, as that of devices along most axes of a mesh.
      groups: in a block.
      size: entries of a group.
      rounds: groups of a block that a chunk holds; it may own one less.
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
    """Return a chunk's entries at every place they could come from, and the chunk that owns each.

    This is elementwise. Putting the chunk into its place would copy the leaf.
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
    """Return `x` with the sharding of `like`, which types have on explicit axes of a mesh only."""
    ours, theirs = jax.typeof(x).sharding, jax.typeof(like).sharding
    return x if ours.spec == theirs.spec else jax.sharding.reshard(x, theirs)


def _cut(shape: tuple[int, ...], k: int) -> _Cut:
    """Return the cut of a shape; a 0-d leaf is cut as a vector of one."""
    shape, least, tile = shape or (1,), _ROUNDS * k, _TILE
    axis = max(range(len(shape) - 1), key=shape.__getitem__, default=0)
    if len(shape) == 1 or shape[axis] < least:
        axis, least, tile = shape.index(max(shape)), _ROUNDS_OF_VECTORS * k, 1
    size = _power_of_two(shape[axis], least, tile)
    blocks = _power_of_two(shape[axis] // size, least, shape[axis])
    groups = shape[axis] // size // blocks
    return _Cut(axis, blocks, groups, size, -(-groups // k))


def _power_of_two(n: int, least: int, most: int) -> int:
    """Return the largest power of two, at most `most`, that cuts `n` into at least `least`."""
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
    """Gather `x` along its cut axis if its type says that a device holds parts of blocks."""
    sharding, whole = jax.typeof(x).sharding, x.shape[cut.axis]
    devices = whole // max(sharding.shard_shape(x.shape)[cut.axis], 1)
    if cut.blocks % max(devices, 1) == 0:
        return x
    spec = (None if i == cut.axis else axes for i, axes in enumerate(sharding.spec))
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
