"""The report in Markdown: targets, numerics, times, failed cases and missing cases."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks import history
from benchmarks.contenders import CHAIN, CONTENDERS, WAYS
from benchmarks.gpu.targets import TARGETS, speed_up, verdict
from benchmarks.gpu.tasks import NUMERICS, PYTORCH, Case
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS, in_words

FUSED = tuple(name for name in WAYS if name != CHAIN)

NOTES = """\
- ms: the median time of a step, ± the interquartile range over its turns. Steps run in a loop
  inside of one program, with donated parameters and state. All kernels take turns in one process.
  The arrays of each set are larger than four last-level caches of the GPU.
- A cell has up to three numbers: the chain by XLA → the fused step by Triton / by Mosaic.
- speed-up: the chain's time divided by the time of the fused step.
- of copy: the bytes that the step must move, divided by its time, relative to a copy in place in
  the same turns. Slow weights count in every step of the chain, but in every fifth fused step only.
- × adamw: the time per byte, relative to the chain of optax.adamw with graphs in the same turns.
- Graphs are XLA's command buffers. XLA uses them for five launches or more.
- PyTorch's steps are launched from Python. Ten steps run before the results are waited for."""


def report(
    rows: Mapping[str, Row], circumstances: history.Circumstances, missing: Iterable[Case]
) -> str:
    """Return the whole report in Markdown."""
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
    """Return the first part of the report: targets, numerics, failed and missing cases."""
    parts = [
        _section("Targets", _targets(rows)),
        _section("Numerics: largest differences", _numerics(rows)),
        _section("Failed", _failed(rows)),
        _section("Not measured", _missing(missing)),
    ]
    return "\n\n".join(filter(None, parts))


def failed(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return the cases without correct numbers, with the reasons."""
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
    """Return a line for each reason of a failure."""
    by_reason: dict[str, list[str]] = {}
    for case, reason in failed(rows).items():
        by_reason.setdefault(reason, []).append(case)
    return [f"- {'; '.join(cases)}: {reason}" for reason, cases in by_reason.items()]


def _missing(missing: Iterable[Case]) -> list[str]:
    """Return a line for each set with missing cases."""
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
    baselines = [row for row in known if row["kernels"] == PYTORCH]
    if baselines:
        body = [[row["optimizer"], _time(row), *_shares([row])] for row in baselines]
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
    """Format a number of a row.

    Without a number, the text is "failed" or "not finite", or a dash if nothing was measured.
    """
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
    """Return the names of the optimizers, in the order of all tables."""
    found = {row["optimizer"] for row in rows}
    return [name for name in CONTENDERS if name in found]


def _table(titles: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *body)]


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""
