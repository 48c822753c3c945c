"""Figures of a case: bandwidth, the share of a copy's bandwidth, the ratio to adamw."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks import contenders, timing
from benchmarks.contenders import CHAIN, REFERENCE
from benchmarks.gpu.tasks import COPY, PYTORCH, Case
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS, count
from benchmarks.peers import PEERS
from benchmarks.step import make_row

DIGITS = 5


def figures(case: Case, found: Mapping[str, Any]) -> Row:
    """Return a case's row for the file: the parts of its name, the results and the figures."""
    row = {
        "leaf_set": case.leaf_set,
        "optimizer": case.optimizer,
        "kernels": case.kernels,
        "graphs": case.graphs,
        **(_timed(case, found) if "seconds" in found else found),
    }
    return {key: _short(value) for key, value in row.items()}


def _timed(case: Case, found: Mapping[str, Any]) -> Row:
    """Return the results and figures of a step that was timed."""
    times = timing.Times(tuple(found["seconds"]))
    bandwidth = found["copy_bytes_per_second"]
    if case.optimizer == COPY:
        row = {"median_ms": 1e3 * times.median, "spread_ms": 1e3 * times.spread}
        return row | {"gb_per_s": bandwidth / 1e9, "passed": found["passed"]}
    parameters = count(LEAF_SETS[case.leaf_set])
    adamw = contenders.floor(REFERENCE, case.leaf_set) * parameters
    reference = found["reference_seconds"]
    row = make_row(
        times,
        moved=bytes_moved(case) * parameters,
        parameters=parameters,
        bandwidth=bandwidth,
        reference=math.nan if reference is None else reference / adamw,
    )
    del row["times_ms"]
    return row | {"drift": found["drift"], "passed": found["passed"]}


def bytes_moved(case: Case) -> float:
    """Return the bytes per parameter that a step moves, on average over steps.

    Only fused steps skip bytes that do not change.
    """
    if case.kernels == PYTORCH:
        return contenders.floor(PEERS[case.optimizer].near, case.leaf_set)
    moved = contenders.floor(case.optimizer, case.leaf_set)
    if case.kernels == CHAIN:
        return moved
    return moved - contenders.skipped(case.optimizer, case.leaf_set)


def _short(value: Any) -> Any:
    """Round a float to its significant digits; return `None` if it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
