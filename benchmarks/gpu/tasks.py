"""What is to be measured, in which order, and what the process that measures tells of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import CHAIN, REFERENCE, WAYS
from benchmarks.leaf_sets import RAGGED, Leaves

# What runs a peer's step.
PYTORCH = "PyTorch"

NUMERICS, COPY = "numerics", "copy"

# XLA's errors may hold whole programs.
ERROR_CHARACTERS = 300

# A network of many leaves that a target is set for, then what compiles in no time, then sizes.
SETS_BY_WORTH = ("ResNet-50", "one of 4096 × 4096", "GPT-2 124M", "1000 of 64 KB", "ViT-B/16")
# On sets that take long to compile these come first: the fewest moments, and the most.
MAIN = (REFERENCE, "fame")
# On this one, all others would take as long as everything else.
ONLY_MAIN = frozenset(["1000 of 64 KB"])
IN_FULL_FIRST = frozenset(SETS_BY_WORTH[:2])


@dataclass(frozen=True)
class Case:
    """A row of the results.

    Attributes:
      leaf_set: whose leaves are moved; `NUMERICS`, where nothing is timed, or `COPY`.
      optimizer: a contender, a peer, or `COPY`.
      kernels: what runs the step.
      graphs: whether XLA may launch by CUDA graphs, its command buffers.
    """

    leaf_set: str
    optimizer: str
    kernels: str
    graphs: bool = True

    def __str__(self) -> str:
        """The name of the row."""
        graphs = "" if self.graphs else ", no graphs"
        return f"{self.leaf_set} / {self.optimizer} / {self.kernels}{graphs}"


@dataclass(frozen=True)
class Task:
    """Cases that are measured together: one optimizer's, or all peers', on one set."""

    cases: tuple[Case, ...]

    @property
    def leaf_set(self) -> str:
        """Of all cases."""
        return self.cases[0].leaf_set

    @property
    def optimizer(self) -> str:
        """Of all cases, unless they are peers."""
        return self.cases[0].optimizer

    def only(self, wanted: Collection[Case]) -> "Task":
        """The task without its other cases."""
        return Task(tuple(case for case in self.cases if case in wanted))


@dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes:
      tasks: in order.
      sets: the leaves of every set.
      kernels: for every name of kernels that of `fuse`.
      ragged: the leaves that numbers are compared on.
      repeats: turns that count.
      seconds_per_call: what a call of a step in a loop takes at least, at an H200's bandwidth.
      copied: elements of the array whose copy is timed.
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
    """The process is at work on this case: it is to blame if nothing more is heard."""

    case: Case


@dataclass(frozen=True)
class Alive:
    """The process is at work."""


@dataclass(frozen=True)
class Found:
    """A case's numbers, or its error."""

    case: Case
    row: Mapping[str, Any]


Message = Began | Alive | Found


def failure(reason: object) -> dict[str, Any]:
    """A row that says why there is no other."""
    kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
    text = " ".join(f"{kind}{reason}".split())
    return {"passed": False, "error": text[:ERROR_CHARACTERS]}


def by_worth(
    sets: Sequence[str], optimizers: Sequence[str], peers: Sequence[str], kernels: Sequence[str]
) -> Iterator[Task]:
    """All tasks, those first whose results are worth most for the time that they take."""
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
