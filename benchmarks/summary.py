"""Figures, and tables of the pages, from the latest results; nothing is measured."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import command_line, latest, memory, plan_report, plots, scaling, step
from benchmarks.latest import Row
from benchmarks.peers import PEERS

ROOT = Path(__file__).parents[1]
README, LOW_PRECISION = "README.md", "docs/low_precision.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures and fill in the tables for which there are results."""
    options = make_parser().parse_args(argv)
    draw: dict[str, Callable[[Path], None]] = {"step": draw_steps, "scaling": scaling.draw}
    for benchmark, draw_results in draw.items():
        for path in sorted(options.out.glob(f"{benchmark}-*.json")):
            draw_results(path)
            print(path.with_suffix(".svg"))
    for name, (page, content) in contents(options.out).items():
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), name, content), encoding="utf-8")
        print(path, name)


def contents(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the tables for which there are results, with their pages, by the names of marks."""
    steps, plan = latest.path(folder, "step", "cpu"), latest.path(folder, "plan", "h200-aot")
    pod = latest.path(folder, "plan", "tpu-aot-v5e-16x16")
    memories = latest.path(folder, "memory", "tpu-aot")
    tables = {
        "step-table": (README, steps, table),
        "plan-table": (README, plan, plan_report.summary),
        "pod-table": (README, pod, plan_report.pod_summary),
        "memory-table": (README, memories, memory.table),
        "quantized-plan-table": (LOW_PRECISION, plan, plan_report.quantized_summary),
        "quantized-memory-table": (LOW_PRECISION, memories, memory.quantized_table),
    }
    return {
        name: (page, make(rows))
        for name, (page, path, make) in tables.items()
        if (rows := latest.load(path))
    }


def draw_steps(path: Path) -> None:
    """Draw a file of step times into an SVG in the same folder."""
    plots.steps(step.by_set(latest.load(path)), step.TARGET, path.with_suffix(".svg"))


def table(rows: Mapping[str, Row]) -> str:
    """Return the README's step table in Markdown, and the environment of its results."""
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
    """Return a page's text with this content between two marks.

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
