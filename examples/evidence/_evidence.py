"""What every piece of evidence has: its options, intervals, verdicts, and files.

A script imports this as a whole and first: it lets it find what all examples share.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))
from _command_line import make_folder, positive, progress_bar, writing_to
from _figures import save_png

RESULTS = Path(__file__).parent / "results"
# Inches; a README shows 96 pixels in each.
WIDTH = 8.4
CONFIDENCE = 0.95
VERSIONS = {module.__name__: module.__version__ for module in (jax, optax)}
_BEGIN = time.monotonic()
Contender = TypeVar("Contender")
Judged = TypeVar("Judged")


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    ONLY_UNTUNED = "holds only against an untuned baseline"
    NOT_SEEN = "not seen at this scale"
    REFUTED = "does not hold"


class Finding(NamedTuple):
    """What was found about a claim.

    Attributes:
      claim: in one sentence that begins with the method.
      verdict: on it.
      shown: the numbers that decide, the control's among them, in a sentence or two.
    """

    claim: str
    verdict: Verdict
    shown: str


class Estimate(NamedTuple):
    """A mean, or a share, with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


# Rows of a table by name, their cells by column: measured, exact, or in words.
Rows = Mapping[str, Mapping[str, Estimate | float | str]]


def mean(samples: ArrayLike) -> Estimate:
    """Over seeds, with Student's interval; of differences between paired seeds just as well.

    Few seeds are the rule here, for which resampling gives intervals that are too narrow.
    """
    samples = np.asarray(samples, np.float64)
    center = samples.mean()
    if len(samples) < 2:
        return Estimate(center, math.nan, math.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(samples) - 1) * stats.sem(samples)
    return Estimate(center, center - half, center + half)


def share(successes: ArrayLike) -> Estimate:
    """Of the seeds that succeed, with Wilson's interval."""
    successes = np.asarray(successes, bool)
    found = stats.binomtest(int(successes.sum()), len(successes))
    interval = found.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(successes.mean()), interval.low, interval.high)


def make_parser(description: str | None, **sizes: tuple[int, str]) -> argparse.ArgumentParser:
    """A command line with `--out` and sizes, each given as its default and what it is of.

    The folder is made while it is parsed, so that no training is lost for want of one.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, what) in sizes.items():
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "--out",
        type=_folder,
        default=RESULTS,
        metavar="FOLDER",
        help="for the figure and its numbers (default: examples/evidence/results)",
    )
    return parser


def side_by_side(
    judge: Callable[[Contender], Judged], contenders: Mapping[str, Contender]
) -> dict[str, Judged]:
    """Judges each, two at a time; a bar shows how many are done.

    While one is compiled, or leaves a core idle, another trains.
    """
    judged = {}
    with progress_bar(len(contenders)) as on_progress, ThreadPoolExecutor(2) as pool:
        found = pool.map(judge, contenders.values())
        for name, one in zip(contenders, found, strict=True):
            judged[name] = one
            on_progress(name, 1)
    return judged


def _folder(text: str) -> Path:
    """A folder that is there from now on, for files to be written in."""
    try:
        make_folder(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return Path(text)


def draw_estimates(
    axes: Axes,
    places: ArrayLike,
    estimates: Sequence[Estimate],
    *,
    across: bool = False,
    **look: Any,
) -> None:
    """Dots and intervals at these places along x, or `across`, along y."""
    centers, *ends = np.transpose(estimates)
    spread = abs(centers - ends)
    look = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2} | look
    if across:
        axes.errorbar(centers, places, xerr=spread, **look)
    else:
        axes.errorbar(places, centers, yerr=spread, **look)


def publish(
    name: str,
    options: argparse.Namespace,
    findings: Sequence[Finding],
    tables: Mapping[str, Rows],
    figures: Mapping[str, Figure],
) -> None:
    """Prints the tables and the verdicts, and writes them and the figures.

    Args:
      name: of the script, and of the file of its numbers.
      options: of the command line; all but `out` decide the results.
      findings: a row each in README's table.
      tables: by their titles.
      figures: by the names of their files.
    """
    console = Console()
    for title, rows in tables.items():
        Console(width=200).print(_printable(title, rows))  # rather a broken line than a cut number
    for finding in findings:
        console.print(f"{finding.claim}\n  [bold]{finding.verdict}[/bold]: {finding.shown}")
    document = {
        "findings": [finding._asdict() for finding in findings],
        "tables": {title: _rounded(rows) for title, rows in tables.items()},
        "figures": [f"{figure}.png" for figure in figures],
        "options": sizes(options),
        "constants": constants(sys.modules.get(name, sys.modules["__main__"])),
        "confidence": CONFIDENCE,
        "seconds": round(time.monotonic() - _BEGIN),
        "device": jax.devices()[0].device_kind,
        "versions": VERSIONS,
    }
    path = options.out / f"{name}.json"
    with writing_to(options.out):
        for figure, drawn in figures.items():
            save_png(drawn, options.out / f"{figure}.png")
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    console.print(f"Wrote {path} and {', '.join(document['figures'])}.", soft_wrap=True)


def sizes(options: argparse.Namespace) -> dict[str, int]:
    """The options that decide the results."""
    return {name: value for name, value in vars(options).items() if name != "out"}


def constants(script: ModuleType) -> dict[str, Any]:
    """The numbers that a script names in capitals, which decide the results too."""

    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) or (isinstance(x, np.ndarray) and x.dtype.kind in "if")

    return {
        name: np.asarray(value).tolist()
        for name, value in vars(script).items()
        if name.isupper() and is_number(value)
    }


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
    """As in the file: four digits, an estimate as [mean, low, high]."""

    def cell(x: Estimate | float | str) -> Any:
        if isinstance(x, Estimate):
            return [None if math.isnan(number) else float(f"{number:.4g}") for number in x]
        return x if isinstance(x, str) else float(f"{x:.4g}")

    return {name: {column: cell(x) for column, x in cells.items()} for name, cells in rows.items()}
