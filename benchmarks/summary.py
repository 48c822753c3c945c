"""Figures, and tables of the pages in `docs/`, from the latest results; nothing is measured."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import RESULTS, command_line, latest, memory, plan_report, plots, scaling, step
from benchmarks.latest import Row
from benchmarks.peers import PEERS

DOCS = Path(__file__).parents[1] / "docs"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures and fill in the tables for which there are results."""
    options = make_parser().parse_args(argv)
    draw: dict[str, Callable[[Path], None]] = {"step": draw_steps, "scaling": scaling.draw}
    for benchmark, draw_results in draw.items():
        for path in sorted(options.out.glob(f"{benchmark}-*.json")):
            draw_results(path)
            print(path.with_suffix(".svg"))
    # The pages show the recorded results only.
    pages = contents(RESULTS) if options.out.resolve() == RESULTS.resolve() else {}
    for page, tables in pages.items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = fill(text, name, content)
        path.write_text(text, encoding="utf-8")
        print(path)


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """Return the tables for which there are results, by page and by the name of their marks."""
    tables = {
        "performance.md": {
            "step-table": ("step-cpu", table),
            "plan-table": ("plan-h200-aot", plan_report.summary),
        },
        "sharding.md": {"pod-table": ("plan-tpu-aot-v5e-16x16", plan_report.pod_summary)},
        "memory.md": {"memory-table": ("memory-tpu-aot", memory.table)},
        "low_precision.md": {
            "quantized-plan-table": ("plan-h200-aot", plan_report.quantized_summary),
            "quantized-memory-table": ("memory-tpu-aot", memory.quantized_table),
        },
    }
    found = {
        page: {
            name: make(rows)
            for name, (results, make) in of_page.items()
            if (rows := latest.load(folder / f"{results}.json"))
        }
        for page, of_page in tables.items()
    }
    return {page: filled for page, filled in found.items() if filled}


def draw_steps(path: Path) -> None:
    """Draw a file of step times into an SVG in the same folder."""
    plots.steps(step.by_set(latest.load(path)), step.TARGET, path.with_suffix(".svg"))


def table(rows: Mapping[str, Row]) -> str:
    """Return the table of steps in Markdown, and the environment of its results."""
    results = step.by_set(rows)
    ways = dict.fromkeys(way for found in results.values() for way in found)
    lines = [
        f"| optimizer | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
        *(
            f"| {way} | {' | '.join(cell(way, found.get(way)) for found in results.values())} |"
            for way in ways
        ),
    ]
    shown = [row for found in results.values() for row in found.values()]
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(set(map(measured, shown))))}."])


def cell(way: str, row: Row | None) -> str:
    """Format the time per byte relative to adamw, and milliseconds.

    The ratio is bold if a chain misses the target.
    """
    if row is None:
        return "–"
    ratio = f"{row['to_adamw_per_byte']:.2f}"
    if way not in PEERS and row["to_adamw_per_byte"] > step.TARGET:
        ratio = f"**{ratio}**"
    return f"{ratio} ({row['median_ms']:.{0 if row['median_ms'] >= 10 else 2}f} ms)"


def measured(row: Row) -> str:
    """Describe the environment of a row: cores, versions and date."""
    cores = row["device"].removeprefix("cpu, ")
    return f"{cores} with {', '.join(map(' '.join, row['versions'].items()))}, {row['date']}"


def fill(text: str, name: str, content: str) -> str:
    """Return the text of a page with this content between two marks.

    The marks are HTML comments, which a page does not show.

    Raises:
      ValueError: the text lacks a mark.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page must have a line {begin.strip()} and, below it, {end.strip()}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return command_line.make_parser("summary", __doc__)
