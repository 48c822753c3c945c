"""What the benchmarks' command lines have in common."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import RESULTS
from benchmarks.leaf_sets import LEAF_SETS


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


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Sets of leaves, all by default."""
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=LEAF_SETS,
        default=list(LEAF_SETS),
        metavar="SET",
        help=f"of {quoted(LEAF_SETS)} (default: all)",
    )


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """Turns of what is timed."""
    parser.add_argument(
        "--repeats",
        type=_turns_that_count,
        default=10,
        metavar="N",
        help="turns of each, after two that don't count (default: 10)",
    )


def quoted(names: Iterable[str]) -> str:
    """As a shell takes them."""
    return ", ".join(f"'{name}'" if " " in name or "(" in name else name for name in names)


def _turns_that_count(text: str) -> int:
    """A spread takes two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number above 1, got {text!r}")
    return int(text)


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
