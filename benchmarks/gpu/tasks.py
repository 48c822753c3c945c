"""The cases to measure, their order, and the messages of the process that measures them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import CHAIN, REFERENCE, WAYS
from benchmarks.leaf_sets import RAGGED, Leaves

# The name, in place of kernels, of the baselines' steps.
PYTORCH = "PyTorch"

NUMERICS, COPY = "numerics", "copy"

# XLA's errors may contain whole programs.
ERROR_CHARACTERS = 300

# First a network of many leaves, which has a target; then a set that compiles at once; then sets of
# other sizes.
SETS_BY_WORTH = ("ResNet-50", "one of 4096 × 4096", "GPT-2 124M", "1000 of 64 KB", "ViT-B/16")
# On sets that compile slowly, these are measured first: they have the fewest and the most moments.
MAIN = (REFERENCE, "fame")
# On this set, only these are measured. The others would take as long as all other sets together.
ONLY_MAIN = frozenset(["1000 of 64 KB"])
IN_FULL_FIRST = frozenset(SETS_BY_WORTH[:2])


@dataclass(frozen=True)
class Case:
    """A row of the results.

    Attributes:
      leaf_set: the set of leaves; `NUMERICS` for a comparison without times; or `COPY`.
      optimizer: the name of a contender or of a baseline in PyTorch; or `COPY`.
      kernels: the name of the kernels that run the step.
      graphs: whether XLA may launch kernels by CUDA graphs, which it calls command buffers.
    """

    leaf_set: str
    optimizer: str
    kernels: str
    graphs: bool = True

    def __str__(self) -> str:
        """Return the name of the row."""
        graphs = "" if self.graphs else ", no graphs"
        return f"{self.leaf_set} / {self.optimizer} / {self.kernels}{graphs}"


@dataclass(frozen=True)
class Task:
    """Cases that are measured together: one optimizer, or all baselines in PyTorch, on one set."""

    cases: tuple[Case, ...]

    @property
    def leaf_set(self) -> str:
        """The set of leaves of all cases."""
        return self.cases[0].leaf_set

    @property
    def optimizer(self) -> str:
        """The optimizer of all cases, unless they are baselines in PyTorch."""
        return self.cases[0].optimizer

    def only(self, wanted: Collection[Case]) -> "Task":
        """Return the task with the wanted cases only."""
        return Task(tuple(case for case in self.cases if case in wanted))


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
      tasks: the tasks in order.
      sets: the leaves of every set.
      kernels: the backend of `fuse` for every name of kernels.
      ragged: the leaves for the comparison of numerics.
      repeats: the number of turns that count.
      seconds_per_call: the least time of a call of a loop, at the bandwidth of an H200.
      copied: the number of elements of the array whose copy is timed.
    """

    tasks: tuple[Task, ...]
    sets: Mapping[str, Leaves]
    kernels: Mapping[str, str] = field(default_factory=lambda: dict(WAYS))
    ragged: Leaves = field(default_factory=lambda: dict(RAGGED))
    repeats: int = 5
    seconds_per_call: float = 0.005
    copied: int = 2**28


@dataclass(frozen=True)
class Began:
    """The message that a case has begun; if no further message comes, this case has failed."""

    case: Case


@dataclass(frozen=True)
class Alive:
    """The message that the process is still at work."""


@dataclass(frozen=True)
class Found:
    """The message with a case's numbers, or its error."""

    case: Case
    row: Mapping[str, Any]


Message = Began | Alive | Found


def failure(reason: object) -> dict[str, Any]:
    """Return a row with the reason why a case has no numbers."""
    kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
    text = " ".join(f"{kind}{reason}".split())
    return {"passed": False, "error": text[:ERROR_CHARACTERS]}


def by_worth(
    sets: Sequence[str], optimizers: Sequence[str], peers: Sequence[str], kernels: Sequence[str]
) -> Iterator[Task]:
    """Yield all tasks, ordered by the value of their results for the time that they take."""
    fused = [name for name in kernels if name != CHAIN]
    for optimizer in optimizers:
        yield Task(tuple(Case(NUMERICS, optimizer, name) for name in fused))
    yield Task((Case(COPY, COPY, CHAIN),))
    known = [name for name in SETS_BY_WORTH if name in sets]
    ordered = [*known, *(name for name in sets if name not in known)]
    for first in (True, False):
        for leaf_set in ordered:
            for optimizer in optimizers:
                soon = optimizer in MAIN or leaf_set in IN_FULL_FIRST
                if soon == first and (soon or leaf_set not in ONLY_MAIN):
                    yield _times(leaf_set, optimizer, kernels)
            if first and peers:
                yield Task(tuple(Case(leaf_set, peer, PYTORCH, graphs=False) for peer in peers))


def _times(leaf_set: str, optimizer: str, kernels: Sequence[str]) -> Task:
    return Task(
        tuple(
            Case(leaf_set, optimizer, name, graphs) for name in kernels for graphs in (True, False)
        )
    )
