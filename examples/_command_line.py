"""What the examples' command lines have in common."""

import argparse
import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of a training that can be interrupted."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        help="to save in, and to go on from (default: a new temporary one)",
    )
    add_numbers(parser, ("--save-every", positive, 50, "steps between checkpoints"))
    return parser


def add_numbers(
    parser: argparse.ArgumentParser, *options: tuple[str, Callable[[str], Any], float, str]
) -> None:
    """Options that take a number: the name, the type, the default, what it is."""
    for name, kind, default, what in options:
        help_ = f"{what} (default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar="N", help=help_)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option that `_data.load_data` reads."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="images x of shape (N, H, W) or (N, H, W, C) and integer labels y of shape (N,);"
        " bytes are divided by 255, anything else is standardized (default: the bundled digits)",
    )


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, and raise `OSError` unless files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """End the program in one line where results can't be written."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"--out {path}: can't be written to ({error})") from error


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 or above, that 32 bits hold, as a seed's must."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2³² - 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return float(text)


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or above, got {text!r}")
    return float(text)


def _number(text: str) -> float:
    """NaN, which is in no range, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, float], None]]:
    """A bar over so much work; what it yields takes a label and how much more is done."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)

        def advance(label: str, share: float) -> None:
            progress.update(task, description=label, advance=share)

        yield advance
