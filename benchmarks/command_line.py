"""What the benchmarks' command lines have in common."""

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
    """A command line that says where results go."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {benchmark}", description=description
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="for the results (default: benchmarks/results)",
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
    """An option that takes some of several names.

    Args:
      parser: of the command.
      option: its name.
      choices: what it takes.
      default: what it has if it is not given; `None` is all.
      by_default: the default in words; `None` lists it.
      metavar: stands for a name.
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
        help=f"of {quoted(names)} (default: {words})",
    )


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Sets of leaves, all by default."""
    add_choices(parser, "--sets", LEAF_SETS, metavar="SET")


def add_device(parser: argparse.ArgumentParser) -> None:
    """What the steps run on."""
    parser.add_argument("--device", choices=STEPS_PER_TURN, default="cpu", help="default: cpu")


def add_optimizers(parser: argparse.ArgumentParser, default: Iterable[str] = CONTENDERS) -> None:
    """Optimizers to measure."""
    add_choices(parser, "--optimizers", CONTENDERS, default)


def add_repeats(parser: argparse.ArgumentParser, default: int = 10) -> None:
    """Turns of what is timed."""
    parser.add_argument(
        "--repeats",
        type=_turns_that_count,
        default=default,
        metavar="N",
        help=f"turns of each, after two that don't count (default: {default})",
    )


def quoted(names: Iterable[str]) -> str:
    """As a shell takes them."""
    return ", ".join(f"'{name}'" if " " in name or "(" in name else name for name in names)


def _turns_that_count(text: str) -> int:
    """A spread takes two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number above 1, got {text!r}")
    return int(text)


class Session(NamedTuple):
    """A run of a benchmark.

    Attributes:
      device: where it measures.
      circumstances: of all that it measures.
      console: where it shows its tables.
    """

    device: Any
    circumstances: history.Circumstances
    console: Console


def begin(
    parser: argparse.ArgumentParser, options: argparse.Namespace, packages: Iterable[str]
) -> Session:
    """Finds the device, makes the folder for results, and says what will be measured with what.

    Args:
      parser: tells the user what can't be had.
      options: with `device` and `out`.
      packages: whose versions the results depend on.
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
    """The first device of a platform; `RuntimeError` if there is none."""
    if platform == "cpu":  # else JAX warns of GPUs that it can't use
        jax.config.update("jax_platforms", "cpu")
    return jax.devices(platform)[0]


def progress_display(console: Any) -> Progress:
    """What is being measured, and how long it has taken and will take."""
    return Progress(
        TextColumn("{task.description:<46}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def make_table(title: str, names: Iterable[str], columns: Iterable[str]) -> Table:
    """An empty table: names in the first columns, numbers in the others."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in names:
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def plus_minus(median: float, spread: float) -> str:
    """Milliseconds and their spread, to the median's third digit or the microsecond."""
    decimals = sum(median < bound for bound in (100, 10, 1))
    return f"{median:.{decimals}f} ± {spread:.{decimals}f}"
