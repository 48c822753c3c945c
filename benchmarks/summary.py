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
from benchmarks.optimizers import REFERENCE, TRITON, XLA
from benchmarks.results import Row
from optax_ext import METHODS

DOCS = Path(__file__).parents[1] / "docs"

STEP, H200, POD = "step-cpu", "compiled-h200-aot", "compiled-tpu-aot-v5e-16x16"
MEMORY = "memory-tpu-aot"


def overview(times: Mapping[str, Row], compiled: Mapping[str, Row]) -> str:
    """Return the table of the README: steps on ResNet-50, timed on a CPU and compiled for a GPU."""
    lines = []
    reference = times[f"ResNet-50 / {REFERENCE}"]["bytes_per_parameter"]
    for name in (REFERENCE, *METHODS, f"{REFERENCE}, 8 bits"):
        case = f"ResNet-50 / {name}"
        chain, fused = (compiled[case][backend] for backend in (XLA, TRITON))
        lines.append(
            {
                "step of": name,
                "CPU: time": relative_time(times.get(case), reference),
                "H200: kernels": f"{chain['kernels']} → {fused['kernels']}",
                "bytes per parameter": f"{chain['bytes']:.1f} → {fused['bytes']:.1f}",
            }
        )
    return report.table(lines)


def relative_time(row: Row | None, bytes_of_reference: float) -> str:
    """Format the time of a step relative to adamw's, from the times per byte."""
    if row is None:
        return "–"
    return f"{row['to_adamw_per_byte'] * row['bytes_per_parameter'] / bytes_of_reference:.2f}"


# The tables of each page by the name of their marks: the files of results, and the function that
# makes the table from the rows of each.
TABLES: dict[str, dict[str, tuple[Sequence[str], Callable[..., str]]]] = {
    "../README.md": {"performance-table": ([STEP, H200], overview)},
    "performance.md": {
        "step-table": ([STEP], step.summary),
        "compiled-table": ([H200], compiled_report.summary),
    },
    "sharding.md": {"pod-table": ([POD], compiled_report.pod_summary)},
    "memory.md": {"memory-table": ([MEMORY], memory.summary)},
    "low_precision.md": {
        "quantized-compiled-table": ([H200], compiled_report.quantized_summary),
        "quantized-memory-table": ([MEMORY], memory.quantized_summary),
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
    if options.out.resolve() != RESULTS.resolve():
        return  # the pages show the recorded results
    for page, tables in contents().items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = report.fill(text, name, content)
        path.write_text(text, encoding="utf-8")
        print(path)


def contents() -> dict[str, dict[str, str]]:
    """Return the tables of the recorded results, by page and by the name of their marks."""
    return {
        page: {
            name: make(*(results.load(RESULTS / f"{file}.json") for file in files))
            for name, (files, make) in tables.items()
        }
        for page, tables in TABLES.items()
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return command_line.make_parser("summary", __doc__)
