"""The figures of a compiled step that must not grow, and how they are compared with recorded ones.

A row holds an optimizer's figures on one set of leaves: for each way to compile it ("chain",
"triton", "mosaic") three figures, for many devices three more, and the seconds that it took, which
machines differ in. Of many devices they are one's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.contenders import WAYS
from benchmarks.latest import Row
from benchmarks.leaf_sets import Leaves, count


@dataclass(frozen=True)
class Figure:
    """A number of a compiled step.

    Attributes:
      key: of it in a row.
      meaning: what it counts.
      digits: how it is printed, as a format.
      slack: by how much XLA's versions may differ, on a set of leaves.
    """

    key: str
    meaning: str
    digits: str
    slack: Callable[[Leaves], float]


# In scalars and partial results of norms, JAX 0.10.2 and 0.12.0 differ by up to 1 kernel, 8 bytes
# and, for each leaf, 700 bytes of memory. A kernel for each leaf is more, and so is a leaf's copy.
KERNELS = Figure("kernels", "kernels", "d", lambda leaves: 1)
BYTES = Figure("bytes", "bytes/parameter", ".4f", lambda leaves: 64 * len(leaves) / count(leaves))
TEMPORARY = Figure(
    "temporary",
    "temporary memory/parameters",
    ".4%",
    lambda leaves: 1024 * len(leaves) / (4 * count(leaves)),
)
# Of many devices. Layouts that pad a leaf differently are no difference between versions.
HELD = Figure("held", "bytes held", ",d", lambda leaves: 1024 * len(leaves))
COLLECTIVES = Figure("collectives", "collectives", "d", lambda leaves: 0)
TOLD = Figure("told", "bytes told", ",d", lambda leaves: 0)

FIGURES = (KERNELS, BYTES, TEMPORARY, HELD, COLLECTIVES, TOLD)


@dataclass(frozen=True)
class Change:
    """A figure that is not the recorded one."""

    way: str
    figure: Figure
    recorded: float
    measured: float

    @property
    def worse(self) -> bool:
        """More of anything is."""
        return self.measured > self.recorded

    def __str__(self) -> str:
        recorded, measured = (format(x, self.figure.digits) for x in (self.recorded, self.measured))
        return f"{self.way}, {self.figure.meaning}: recorded {recorded}, measured {measured}"


def changes(recorded: Row, measured: Row, leaves: Leaves) -> Iterator[Change]:
    """What differs between two rows by more than versions of XLA do.

    Args:
      recorded: a row; empty if there is none.
      measured: another, of the same case.
      leaves: what one device holds of the set of leaves.
    """
    for way in (way for way in WAYS if way in recorded and way in measured):
        for figure in (x for x in FIGURES if x.key in recorded[way]):
            before, after = recorded[way][figure.key], measured[way][figure.key]
            if abs(after - before) > figure.slack(leaves):
                yield Change(way, figure, before, after)
