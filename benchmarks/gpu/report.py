"""The results for a reader: targets, numerics, times, and what failed or is missing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks import history
from benchmarks.contenders import CHAIN, CONTENDERS, WAYS
from benchmarks.gpu.targets import TARGETS, speed_up, verdict
from benchmarks.gpu.tasks import NUMERICS, PYTORCH, Case
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS, in_words

FUSED = tuple(name for name in WAYS if name != CHAIN)

NOTES = """\
- ms: median of a step, ± the interquartile range of its turns. Steps run in a loop inside of one
  program, parameters and state donated, all kernels by turns in one process. A set's arrays are
  larger than four of the GPU's last caches.
- Three numbers in a cell: the chain by XLA → the fused step by Triton's kernels / by Mosaic's.
- speed-up: the chain's time by that of the fused step.
- of copy: bytes that the step must move, by its time, relative to a copy in place that took turns
  with it. Slow weights count in every step for the chain, in every fifth for fused steps.
- × adamw: time for a byte, relative to the chain of optax.adamw, with graphs, in the same turns.
- Graphs are XLA's command buffers, which it makes of five launches or more.
- PyTorch's steps are launched from Python, ten between drains."""


def report(
    rows: Mapping[str, Row], circumstances: history.Circumstances, missing: Iterable[Case]
) -> str:
    """All of it, in Markdown."""
    versions = ", ".join(map(" ".join, circumstances.versions.items()))
    timed = (leaf_set for leaf_set in LEAF_SETS if any(_of(rows, leaf_set)))
    parts = [
        f"# A step on a GPU: {circumstances.device}",
        f"{circumstances.date}, commit {circumstances.commit or 'unknown'}, {versions}",
        summary(rows, missing),
        NOTES,
        *(_set(rows, leaf_set) for leaf_set in timed),
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Mapping[str, Row], missing: Iterable[Case]) -> str:
    """What matters first: targets, numerics, the copy, failures, and what was not measured."""
    parts = [
        _section("Targets", _targets(rows)),
        _section("Numerics: largest differences", _numerics(rows)),
        _section("Failed", _failed(rows)),
        _section("Not measured", _missing(missing)),
    ]
    return "\n\n".join(filter(None, parts))


def failed(rows: Mapping[str, Row]) -> dict[str, str]:
    """Cases whose numbers are wrong, or that gave none, with the reason."""
    return {
        case: row.get("error") or "its numbers are too far from the chain's or from float64"
        for case, row in rows.items()
        if not row["passed"]
    }


def _targets(rows: Mapping[str, Row]) -> list[str]:
    body = (
        [target.text, f"{target.least or '–'}", *(verdict(target, name, rows) for name in FUSED)]
        for target in TARGETS
    )
    return _table(["of all methods", "at least", *FUSED], body)


def _numerics(rows: Mapping[str, Row]) -> list[str]:
    body = []
    for optimizer in _optimizers(_of(rows, NUMERICS)):
        fused = [rows.get(str(Case(NUMERICS, optimizer, name)), {}) for name in FUSED]
        cells = [_number(row, key, "{:.1e}") for key in _DIFFERENCES for row in fused]
        exact = next((row for row in fused if "chain_to_float64" in row), {})
        body.append([optimizer, *cells, _number(exact, "chain_to_float64", "{:.1e}")])
    titles = [f"{name} from {what}" for what in _DIFFERENCES.values() for name in FUSED]
    return _table(["optimizer", *titles, "chain from float64"], body) if body else []


_DIFFERENCES = {"to_chain": "the chain", "to_float64": "float64"}


def _failed(rows: Mapping[str, Row]) -> list[str]:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for case, reason in failed(rows).items():
        by_reason.setdefault(reason, []).append(case)
    return [f"- {'; '.join(cases)}: {reason}" for reason, cases in by_reason.items()]


def _missing(missing: Iterable[Case]) -> list[str]:
    """A line for each set."""
    by_set: dict[str, list[str]] = {}
    for case in missing:
        graphs = "" if case.graphs else ", no graphs"
        by_set.setdefault(case.leaf_set, []).append(f"{case.optimizer} / {case.kernels}{graphs}")
    return [f"- {leaf_set}: {'; '.join(names)}" for leaf_set, names in by_set.items()]


def _set(rows: Mapping[str, Row], leaf_set: str) -> str:
    known = [*_of(rows, leaf_set)]
    parts = [f"## {leaf_set}: {in_words(LEAF_SETS[leaf_set])}"]
    for graphs in (True, False):
        mine = [row for row in known if row["graphs"] == graphs and row["kernels"] != PYTORCH]
        titles = [f"with{'' if graphs else 'out'} graphs", *_COLUMNS]
        body = [_line(rows, leaf_set, name, graphs) for name in _optimizers(mine)]
        parts.append("\n".join(_table(titles, body)))
    peers = [row for row in known if row["kernels"] == PYTORCH]
    if peers:
        body = [[row["optimizer"], _time(row), *_shares([row])] for row in peers]
        parts.append("\n".join(_table(["PyTorch", "ms", "of copy", "× adamw"], body)))
    return "\n\n".join(parts)


_COLUMNS = ("ms", "speed-up", "of copy", "× adamw")


def _line(rows: Mapping[str, Row], leaf_set: str, optimizer: str, graphs: bool) -> list[str]:
    cases = (Case(leaf_set, optimizer, name, graphs) for name in WAYS)
    of_kernels = [rows.get(str(case), {}) for case in cases]
    speeds = (speed_up(row, rows) if row else None for row in of_kernels[1:])
    gains = (_format(speed, "{:.2f}") for speed in speeds)
    times = _arrow([_time(row) for row in of_kernels])
    return [optimizer, times, " / ".join(gains), *_shares(of_kernels)]


def _shares(of_kernels: Sequence[Row]) -> list[str]:
    formats = {"of_copy": "{:.0%}", "to_adamw_per_byte": "{:.2f}"}
    return [
        _arrow([_number(row, key, text) for row in of_kernels]) for key, text in formats.items()
    ]


def _time(row: Row) -> str:
    median = _number(row, "median_ms", "{:.3g}")
    return f"{median} ± {row['spread_ms']:.1g}" if "spread_ms" in row else median


def _number(row: Row, key: str, text: str) -> str:
    """A dash for what was not measured; what was, and is no number, says so."""
    if key in row:
        return "not finite" if row[key] is None else text.format(row[key])
    return "failed" if "error" in row else "–"


def _format(number: float | None, text: str) -> str:
    return "–" if number is None else text.format(number)


def _arrow(cells: Sequence[str]) -> str:
    first, *others = cells
    return f"{first} → {' / '.join(others)}" if others else first


def _of(rows: Mapping[str, Row], leaf_set: str) -> Iterator[Row]:
    return (row for row in rows.values() if row["leaf_set"] == leaf_set)


def _optimizers(rows: Iterable[Row]) -> list[str]:
    """Each once, in the order of all tables."""
    found = {row["optimizer"] for row in rows}
    return [name for name in CONTENDERS if name in found]


def _table(titles: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *body)]


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""
