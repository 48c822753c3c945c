"""Options, tables and setup that the benchmarks' command lines share."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import RESULTS, history
from benchmarks.contenders import CONTENDERS
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.timing import STEPS_PER_TURN


def make_parser(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--out`, the folder for results."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {benchmark}", description=description
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="the folder for results (default: benchmarks/results)",
    )
    return parser


def add_choices(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Iterable[str],
    default: Iterable[str] | None = None,
    *,
    by_default: str | None = None,
    metavar: str = "NAME",
) -> None:
    """Add an option that takes one or more names.

    Args:
      parser: the parser of the command.
      option: the name of the option.
      choices: the names that the option accepts.
      default: the names that are used without the option; `None` means all choices.
      by_default: words for the default in the help text; `None` lists the names.
      metavar: the placeholder for a name in the help text.
    """
    names = list(choices)
    chosen = names if default is None else list(default)
    words = by_default or ("all" if chosen == names else quoted(chosen))
    parser.add_argument(
        option,
        nargs="+",
        choices=names,
        default=chosen,
        metavar=metavar,
        help=f"one or more of {quoted(names)} (default: {words})",
    )


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Add the option `--sets`, the sets of leaves; all by default."""
    add_choices(parser, "--sets", LEAF_SETS, metavar="SET")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option `--device`, the platform that runs the steps."""
    parser.add_argument("--device", choices=STEPS_PER_TURN, default="cpu", help="default: cpu")


def add_optimizers(parser: argparse.ArgumentParser, default: Iterable[str] = CONTENDERS) -> None:
    """Add the option `--optimizers`, the optimizers to measure."""
    add_choices(parser, "--optimizers", CONTENDERS, default)


def add_repeats(parser: argparse.ArgumentParser, default: int = 10) -> None:
    """Add the option `--repeats`, the number of turns that count."""
    parser.add_argument(
        "--repeats",
        type=_turns_that_count,
        default=default,
        metavar="N",
        help=f"turns of each program, after two warm-up turns (default: {default})",
    )


def quoted(names: Iterable[str]) -> str:
    """Return the names, quoted for a shell where necessary, separated by commas."""
    return ", ".join(f"'{name}'" if " " in name or "(" in name else name for name in names)


def _turns_that_count(text: str) -> int:
    """Parse a number of turns; a spread needs at least two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number above 1, got {text!r}")
    return int(text)


class Session(NamedTuple):
    """The setup of one benchmark run.

    Attributes:
      device: the device that is measured.
      circumstances: the environment that all measurements of the run share.
      console: the console that prints the tables.
    """

    device: Any
    circumstances: history.Circumstances
    console: Console


def begin(
    parser: argparse.ArgumentParser, options: argparse.Namespace, packages: Iterable[str]
) -> Session:
    """Find the device, create the folder for results, and print the device and the versions.

    Args:
      parser: the parser, which reports errors to the user.
      options: the parsed options, with `device` and `out`.
      packages: the packages whose versions affect the results.
    """
    try:
        device = find_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        parser.error(str(error))
    circumstances = history.circumstances(history.describe(device), packages)
    console = Console()
    versions = map(" ".join, circumstances.versions.items())
    console.print(circumstances.device, *versions, sep=", ", highlight=False)
    return Session(device, circumstances, console)


def find_device(platform: str) -> Any:
    """Return the first device of a platform; raise `RuntimeError` if there is none."""
    if platform == "cpu":  # else JAX warns about GPUs that it can't use
        jax.config.update("jax_platforms", "cpu")
    return jax.devices(platform)[0]


def progress_display(console: Any) -> Progress:
    """Return a display of the current case, the elapsed time and the remaining time."""
    return Progress(
        TextColumn("{task.description:<46}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def make_table(title: str, names: Iterable[str], columns: Iterable[str]) -> Table:
    """Return an empty table: names in the first columns, numbers in the others."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in names:
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def plus_minus(median: float, spread: float) -> str:
    """Format milliseconds and their spread to three digits, but at most to the microsecond."""
    decimals = sum(median < bound for bound in (100, 10, 1))
    return f"{median:.{decimals}f} ± {spread:.{decimals}f}"
