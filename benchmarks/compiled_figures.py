"""The figures of a compiled step that must not grow, and their comparison with recorded figures.

A row contains the figures of an optimizer on one set of leaves, for each backend: "xla", "triton"
and "mosaic". Each backend has three figures, and three more if several devices share the leaves;
all are per device. Compile times are not compared, because they depend on the machine.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.optimizers import BACKENDS
from benchmarks.results import Row
from benchmarks.shapes import Leaves, count


class Figure(NamedTuple):
    """A number that is counted in a compiled step.

    Attributes:
      key: its key in a row.
      meaning: its name in messages.
      digits: its format in messages.
      slack: returns the difference between versions of XLA that is allowed on a set of leaves.
    """

    key: str
    meaning: str
    digits: str
    slack: Callable[[Leaves], float]


# JAX 0.10.2 and 0.12.0 differ in scalars and in partial results of norms. The difference is at most
# 1 kernel and 8 bytes, and 700 bytes of memory for each leaf. An extra kernel for each leaf, or an
# extra copy of a leaf, exceeds the slack.
KERNELS = Figure("kernels", "kernels", "d", lambda leaves: 1)
BYTES = Figure("bytes", "bytes/parameter", ".4f", lambda leaves: 64 * len(leaves) / count(leaves))
TEMPORARY = Figure(
    "temporary",
    "temporary memory/parameters",
    ".4%",
    lambda leaves: 1024 * len(leaves) / (4 * count(leaves)),
)
# Figures of sharded steps. The slack for memory allows versions to pad a leaf differently.
MEMORY = Figure("memory", "bytes of memory per device", ",d", lambda leaves: 1024 * len(leaves))
COLLECTIVES = Figure("collectives", "collectives", "d", lambda leaves: 0)
COMMUNICATION = Figure("communication", "bytes of communication per device", ",d", lambda leaves: 0)

FIGURES = (KERNELS, BYTES, TEMPORARY, MEMORY, COLLECTIVES, COMMUNICATION)


class Change(NamedTuple):
    """A figure that differs from the recorded one."""

    backend: str
    figure: Figure
    recorded: float
    measured: float

    @property
    def worse(self) -> bool:
        """Return whether the figure is above the recorded one."""
        return self.measured > self.recorded

    def __str__(self) -> str:
        recorded, measured = (format(x, self.figure.digits) for x in (self.recorded, self.measured))
        return f"{self.backend}, {self.figure.meaning}: recorded {recorded}, measured {measured}"


def changes(recorded: Row, measured: Row, leaves: Leaves) -> Iterator[Change]:
    """Yield the figures that differ between two rows by more than the slack.

    Args:
      recorded: the recorded row; empty if there is none.
      measured: the measured row of the same case.
      leaves: the per-device shapes of the set of leaves.
    """
    for backend in (x for x in BACKENDS if x in recorded and x in measured):
        for figure in (x for x in FIGURES if x.key in recorded[backend]):
            before, after = recorded[backend][figure.key], measured[backend][figure.key]
            if abs(after - before) > figure.slack(leaves):
                yield Change(backend, figure, before, after)
