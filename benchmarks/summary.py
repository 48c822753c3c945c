"""Draws the figures from the latest results and fills README's table; measures nothing."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import command_line, figures, latest, scaling, step
from benchmarks.latest import Row
from benchmarks.peers import PEERS

README = Path(__file__).parents[1] / "README.md"

# Of the README's part that is filled; HTML comments, which its readers don't see.
BEGIN, END = "<!-- step-table -->\n", "<!-- /step-table -->\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws and fills in all that there are results for."""
    options = make_parser().parse_args(argv)
    draw: dict[str, Callable[[Path], None]] = {"step": draw_steps, "scaling": scaling.draw}
    for benchmark, draw_results in draw.items():
        for path in sorted(options.out.glob(f"{benchmark}-*.json")):
            draw_results(path)
            print(path.with_suffix(".svg"))
    if rows := latest.load(latest.path(options.out, "step", "cpu")):
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(fill(text, table(rows)), encoding="utf-8")
        print(options.readme)


def draw_steps(path: Path) -> None:
    """Draws a file of step times beside it."""
    figures.steps(step.by_set(latest.load(path)), step.TARGET, path.with_suffix(".svg"))


def table(rows: Mapping[str, Row]) -> str:
    """The README's table, in Markdown: optimizers by sets of leaves, and where it was measured."""
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
    """Time per byte relative to adamw's, in bold where a chain misses the target; milliseconds."""
    if row is None:
        return "–"
    ratio = f"{row['to_adamw_per_byte']:.2f}"
    if way not in PEERS and row["to_adamw_per_byte"] > step.TARGET:
        ratio = f"**{ratio}**"
    return f"{ratio} ({row['median_ms']:.{0 if row['median_ms'] >= 10 else 2}f} ms)"


def measured(row: Row) -> str:
    """On what, with what, and when."""
    cores = row["device"].removeprefix("cpu, ")
    return f"{cores} with {', '.join(map(' '.join, row['versions'].items()))}, {row['date']}"


def fill(text: str, content: str) -> str:
    """The README's text, with this content between its two marks; `ValueError` without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README must have a line {BEGIN.strip()} and, below it, {END.strip()}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.make_parser("summary", __doc__)
    parser.add_argument(
        "--readme", type=Path, default=README, metavar="FILE", help="to fill (default: README.md)"
    )
    return parser
