"""Prints what a script found, and writes its figures and its file of numbers."""

import argparse
import json
import math
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from _drawing import save_png
from _estimates import CONFIDENCE, Estimate
from _verdicts import Finding

VERSIONS = {module.__name__: module.__version__ for module in (jax, optax)}
_BEGIN = time.monotonic()
# The rows of a table by name; the cells of a row by column.
Rows = Mapping[str, Mapping[str, Estimate | float | str]]


def publish(
    name: str,
    options: argparse.Namespace,
    findings: Sequence[Finding],
    tables: Mapping[str, Rows],
    figures: Mapping[str, Figure],
    constants: Mapping[str, ArrayLike],
    ran: Mapping[str, Any] | None = None,
    not_decisive: Collection[str] = (),
) -> None:
    """Print tables and verdicts, and write them and the figures to files.

    Args:
      name: the script's name, which its file of numbers has too.
      options: the command line, which is recorded without `out` and `not_decisive`.
      findings: the findings, each a row in the table of claims.
      tables: the tables by their titles.
      figures: the figures by the names of their files.
      constants: the script's numbers that decide the results, as the options do.
      ran: seconds, device and versions, if the results are of earlier runs.
      not_decisive: names of options that don't decide the results.
    """
    console = Console()
    for title, rows in tables.items():
        Console(width=200).print(_printable(title, rows))  # rather a broken line than a cut number
    for finding in findings:
        console.print(f"{finding.claim}\n  [bold]{finding.verdict}[/bold]: {finding.shown}")
    document = {
        "findings": [
            {key: value for key, value in finding._asdict().items() if value}
            for finding in findings
        ],
        "tables": {title: _rounded(rows) for title, rows in tables.items()},
        "figures": [f"{figure}.png" for figure in figures],
        "options": decisive(options, not_decisive),
        "constants": {key: np.asarray(value).tolist() for key, value in constants.items()},
        "confidence": CONFIDENCE,
        "seconds": round(time.monotonic() - _BEGIN),
        "device": jax.devices()[0].device_kind,
        "versions": VERSIONS,
    } | dict(ran or {})
    path = options.out / f"{name}.json"
    with writing_to(options.out):
        for figure, drawn in figures.items():
            save_png(drawn, options.out / f"{figure}.png")
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    console.print(f"Wrote {path} and {', '.join(document['figures'])}.", soft_wrap=True)


def decisive(options: argparse.Namespace, others: Collection[str] = ()) -> dict[str, Any]:
    """Return the options that decide the results: all but `out` and others."""
    return {name: value for name, value in vars(options).items() if name not in {"out", *others}}


@contextmanager
def writing_to(path: Path) -> Generator[None]:
    """End the program with one line if results can't be written."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"--out {path}: can't be written to ({error})") from error


def _printable(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        texts = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells.values())
        table.add_row(name, *texts)
    return table


def _rounded(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return rows as in the file: four digits, an estimate as [mean, low, high]."""

    def cell(x: Estimate | float | str) -> Any:
        if isinstance(x, Estimate):
            return [None if math.isnan(number) else float(f"{number:.4g}") for number in x]
        return x if isinstance(x, str) else float(f"{x:.4g}")

    return {name: {column: cell(x) for column, x in cells.items()} for name, cells in rows.items()}
