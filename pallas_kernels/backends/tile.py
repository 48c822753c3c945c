"""The blocks of Mosaic's kernels: their shapes, registers, loads and stores.

Mosaic accesses either a vector with all threads of a warpgroup, or a single element. Without rows,
a block is a strided vector, which Mosaic reduces only as a whole. With rows, a block has an axis
for each length of a row, and its registers are laid out in tiles. The threads of one warp have
whole rows, so a reduction takes shuffles and no memory.

If several threads load the same element, each of them stores its result. Mosaic lets all threads
wait before a store, so none of them loads a result.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backends.evaluate import holds
from pallas_kernels.layout import WARPS, Leaf
from pallas_kernels.program import Predicate

_WARP = 32  # threads of a warp
LANES = WARPS * _WARP  # threads of a warpgroup
_VECTOR = 4  # elements that a thread accesses at once, at most

_BEFORE_0_11 = jax.__version_info__ < (0, 11)
_PLGPU_STORE = getattr(plgpu, "store", None)


def shape_in_memory(leaf: Leaf, row: int) -> tuple[int, ...]:
    """Return the shape of an array with one element for each `row` elements of the leaf."""
    return (leaf.size // leaf.body.longest_row, *_axes(leaf.body.lengths, row))


def load(part: Any, layout: Any) -> jax.Array:
    """Load a vector."""
    whole = {"idx": ()} if _BEFORE_0_11 else {}
    return plgpu.load(part, **whole, layout=layout, optimized=False)


def reduce_to(axes: int, x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce the last axes, one at a time, until this number is left."""
    while x.ndim > axes:
        x = reduce(x, axis=-1)
    return x


@dataclass(frozen=True)
class Tile:
    """The shapes of a block's values: an `evaluate.BlockShape`.

    A block is one of the longest rows, or several. A block of one row is shared by all warps, which
    compute the same.

    Attributes:
      width: the width of the block.
      lengths: the lengths of its rows, in decreasing order.
    """

    width: int
    lengths: tuple[int, ...]

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of a value; that of a single element is empty."""
        return (*([] if self._rows == 1 else [self._rows]), *_axes(self.lengths, row))

    def spread(self, x: jax.Array, row: int) -> jax.Array:
        """Repeat the elements of `x` along the axes that it lacks."""
        return self._cast(lax.broadcast_in_dim(self._cast(x), self.shape(row), range(x.ndim)))

    def reduce(self, x: jax.Array, row: int, reduce: Callable[..., jax.Array]) -> jax.Array:
        """Reduce the axes that a value with `row` lacks, one at a time."""
        return reduce_to(len(self.shape(row)), self._cast(x), reduce)

    def load_if(
        self, needed: Predicate | None, scalars: Sequence[jax.Array], ref: Any, at: Any, row: int
    ) -> jax.Array:
        """Load the block's part of an array, or return zeros without a load if not needed.

        Args:
          needed: the condition; `None` means always.
          scalars: the scalars that conditions refer to.
          ref: the array.
          at: the index of the block's first element in its leaf.
          row: how many elements of the leaf share one of the array.
        """
        shape, index = self.shape(row), self._index(at)

        def zeros() -> jax.Array:
            return self._cast(jnp.zeros(shape, ref.dtype))

        def loaded() -> jax.Array:
            return load(ref.at[index], self._layout(len(shape))) if shape else ref[index]

        return loaded() if needed is None else lax.cond(holds(needed, scalars), loaded, zeros)

    def store(self, ref: Any, at: jax.Array, value: jax.Array) -> None:
        """Store the block's part of an array."""
        index = self._index(at)
        if self.lengths:  # a constant has no layout, and may be too small for Mosaic's default
            value = self._cast(value)
        if not value.shape or _PLGPU_STORE is None:
            ref[index] = value
        else:
            _PLGPU_STORE(ref.at[index], value, optimized=False)

    def kept_apart(self, blocks: list[jax.Array]) -> list[jax.Array]:
        """Keep the loads of one leaf separate from those of other leaves.

        Otherwise LLVM merges the loads of all leaves into one. It does not know the alignment of
        the merged pointer, so it accesses vectors element by element.
        """
        # The barrier works on whole registers of 32 bits, not on booleans.
        whole = [
            i
            for i, x in enumerate(blocks)
            if x.size > LANES and x.shape == self.shape(1) and x.dtype != bool
            if x.dtype.itemsize * self._vector >= 4
        ]
        passed = lax.optimization_barrier([blocks[i] for i in whole])
        apart = dict(zip(whole, passed, strict=True))
        return [apart.get(i, x) for i, x in enumerate(blocks)]

    @property
    def _longest(self) -> int:
        return max(self.lengths, default=1)

    @property
    def _rows(self) -> int:
        return self.width // self._longest

    @property
    def _vector(self) -> int:
        """Elements that a thread accesses at once; they lie in one row, even the shortest."""
        threads = _WARP if self._rows == 1 else LANES
        return min(_VECTOR, *self.lengths[-1:], max(1, self.width // threads))

    def _index(self, at: jax.Array) -> Any:
        """Return the index of the block in an array of its leaf."""
        first = at if self._longest == 1 else lax.div(at, jnp.int32(self._longest))
        return first if self._rows == 1 else pl.ds(first, self._rows)

    def _cast(self, x: jax.Array) -> jax.Array:
        """Give `x` the layout of an array that was loaded."""
        return plgpu.layout_cast(x, self._layout(x.ndim)) if x.shape else x

    def _layout(self, axes: int) -> Any:
        """Return the layout of a value with this number of axes."""
        whole = self.shape(1)
        if not self.lengths:
            return plgpu.Layout.WG_STRIDED(whole, vec_size=self._vector)
        n, shared = len(whole), self._rows == 1
        # Each tile is cut into the next: a block, the rows of a warp, what the warp accesses at
        # once, and what a thread does.
        rows = whole if shared else (whole[0] // WARPS, *whole[1:])
        access = _consecutive(_WARP * self._vector, whole)
        tiles = (whole, rows, access, _consecutive(self._vector, whole))
        copies = plgpu.Replicated(_WARP * self._vector // math.prod(access))
        tiled = TiledLayout(
            plgpu.Tiling(tiles),
            warp_dims=(plgpu.Replicated(WARPS) if shared else -4 * n,),
            lane_dims=(copies, *range(-2 * n, -n)),
            vector_dim=-1,
            _check_canonical=False,  # the next call makes it canonical
        ).canonicalize()
        layout = plgpu.Layout.TILED(
            tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim
        )
        return layout.reduce(tuple(range(axes, n)))


def _axes(lengths: Sequence[int], row: int) -> tuple[int, ...]:
    """Return the axes inside of the longest rows of a value."""
    steps = itertools.pairwise((*lengths, 1))
    return tuple(long // short for long, short in steps if short >= row)


def _consecutive(elements: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of elements that are consecutive in an array; all are powers of two."""
    part: list[int] = []
    for size in reversed(shape):
        part.append(min(size, elements // math.prod(part)))
    return tuple(reversed(part))
