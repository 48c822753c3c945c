"""The targets on an H200, and whether the results meet them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.contenders import CHAIN
from benchmarks.gpu.tasks import Case
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS, count

LARGE = 1e8
MANY_LEAVES = "ResNet-50"

Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Target:
    """A number that every fused step should reach.

    Attributes:
      text: the description of the number.
      least: the number to reach.
      measured: returns the number of a fused step from its row and all rows. It returns `None` if
        the target does not apply to the step, or if a row is missing.
    """

    text: str
    least: float
    measured: Callable[[Row, Rows], float | None]


def speed_up(row: Row, rows: Rows) -> float | None:
    """Return the time of the chain divided by that of a fused step; `None` if one is missing."""
    chain = rows.get(str(Case(row["leaf_set"], row["optimizer"], CHAIN, row["graphs"])), {})
    known = "median_ms" in row and "median_ms" in chain
    return chain["median_ms"] / row["median_ms"] if known else None


def _on_large_sets(row: Row, rows: Rows) -> float | None:
    del rows
    large = count(LEAF_SETS[row["leaf_set"]]) > LARGE
    return row.get("of_copy") if large and row["graphs"] else None


def _of_many_leaves(row: Row, rows: Rows) -> float | None:
    wanted = row["leaf_set"] == MANY_LEAVES and not row["graphs"]
    return speed_up(row, rows) if wanted else None


def _of_many_leaves_with_graphs(row: Row, rows: Rows) -> float | None:
    wanted = row["leaf_set"] == MANY_LEAVES and row["graphs"]
    return speed_up(row, rows) if wanted else None


TARGETS = (
    Target("share of a copy's bandwidth, on sets of over 1e8 parameters", 0.9, _on_large_sets),
    Target("speed relative to the chain's, everywhere", 0.97, speed_up),
    Target(f"speed relative to the chain's on {MANY_LEAVES}, without graphs", 2.0, _of_many_leaves),
    Target(
        f"speed relative to the chain's on {MANY_LEAVES}, with graphs (no target)",
        0.0,
        _of_many_leaves_with_graphs,
    ),
)


def verdict(target: Target, kernels: str, rows: Rows) -> str:
    """Describe whether all steps by these kernels reach the target, and name the worst case."""
    found = sorted(_numbers(target, kernels, rows))
    if not found:
        return "not measured"
    (worst, case), (best, _) = found[0], found[-1]
    missed = sum(number < target.least for number, _ in found)
    word = "met" if not missed else f"**missed** by {missed}"
    word = word if target.least else "measured"
    return f"{word}: {worst:.2f} to {best:.2f} in {len(found)} cases, least on {case}"


def _numbers(target: Target, kernels: str, rows: Rows) -> Iterator[tuple[float, str]]:
    for row in rows.values():
        if row["kernels"] == kernels and row["leaf_set"] in LEAF_SETS:
            number = target.measured(row, rows)
            if number is not None:
                yield number, str(Case(row["leaf_set"], row["optimizer"], kernels, row["graphs"]))
