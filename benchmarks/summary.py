"""Figures, and tables of the pages in `docs/`, from the latest results; nothing is measured."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    RESULTS,
    command_line,
    compiled_report,
    memory,
    report,
    results,
    scaling,
    step,
)
from benchmarks.results import Row

DOCS = Path(__file__).parents[1] / "docs"

# The tables of each page by the name of their marks: the file of results, and the function that
# makes the table from its rows.
TABLES: dict[str, dict[str, tuple[str, Callable[[Mapping[str, Row]], str]]]] = {
    "performance.md": {
        "step-table": ("step-cpu", step.summary),
        "compiled-table": ("compiled-h200-aot", compiled_report.summary),
    },
    "sharding.md": {"pod-table": ("compiled-tpu-aot-v5e-16x16", compiled_report.pod_summary)},
    "memory.md": {"memory-table": ("memory-tpu-aot", memory.summary)},
    "low_precision.md": {
        "quantized-compiled-table": ("compiled-h200-aot", compiled_report.quantized_summary),
        "quantized-memory-table": ("memory-tpu-aot", memory.quantized_summary),
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures and fill in the tables for which there are results."""
    options = make_parser().parse_args(argv)
    for name, draw in {"step-cpu": step.draw, "scaling-cpu": scaling.draw}.items():
        path = options.out / f"{name}.json"
        if path.exists():
            draw(path)
            print(path.with_suffix(".svg"))
    # The pages show the recorded results only.
    pages = contents(RESULTS) if options.out.resolve() == RESULTS.resolve() else {}
    for page, tables in pages.items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = report.fill(text, name, content)
        path.write_text(text, encoding="utf-8")
        print(path)


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """Return the tables for which there are results, by page and by the name of their marks."""
    found = {
        page: {
            name: make(rows)
            for name, (file, make) in tables.items()
            if (rows := results.load(folder / f"{file}.json"))
        }
        for page, tables in TABLES.items()
    }
    return {page: tables for page, tables in found.items() if tables}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return command_line.make_parser("summary", __doc__)
