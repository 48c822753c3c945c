"""The functions of a backend's module; no other module depends on a backend."""

from collections.abc import Sequence
from typing import Protocol

import jax

from pallas_kernels.layout import Layout, PartialReduction


class Kernels(Protocol):
    """The kernels of a backend."""

    def launch(
        self, layout: Layout, operands: Sequence[jax.Array], *, interpret: bool
    ) -> Sequence[jax.Array]:
        """Run one launch; return the stored leaves as flat arrays, then the partial statistics.

        The partial statistics of all blocks are one vector, column by column. It exists only if the
        launch computes statistics.

        Args:
          layout: the layout of the launch.
          operands: the packs of scalars, then the inputs of all leaves, as flat arrays.
          interpret: whether to run in Pallas' interpreter.
        """
        ...

    def reduce_partials(
        self, work: PartialReduction, parts: Sequence[jax.Array], *, interpret: bool
    ) -> jax.Array:
        """Combine the partial statistics that the launches of a phase wrote to memory.

        Return one result for each block of `work.table`.

        Args:
          work: the statistics.
          parts: the partial statistics of each launch that has some.
          interpret: whether to run in Pallas' interpreter.
        """
        ...
