"""The command line of a script, and the bar that shows its progress."""

import argparse
import errno
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

RESULTS = Path(__file__).parent / "results"
Contender = TypeVar("Contender")
Judged = TypeVar("Judged")


def make_parser(description: str | None, **sizes: tuple[int, str]) -> argparse.ArgumentParser:
    """Return a parser of `--out` and of sizes, each given as its default and its description.

    Parsing makes the folder, so that no training is lost because it is missing.
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


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    """Make a folder to write files in, and return it."""
    try:
        make_folder(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return Path(text)


def make_folder(folder: Path) -> None:
    """Make a folder if it is missing; raise `OSError` unless files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def progress_bar(total: int) -> Generator[Callable[[str, float], None]]:
    """Show a bar; yield a function that takes a label and how much more work is done."""
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


def side_by_side(
    judge: Callable[[Contender], Judged], contenders: Mapping[str, Contender]
) -> dict[str, Judged]:
    """Judge each contender, two at a time; a bar shows how many are done.

    One contender can train while another is compiled.
    """
    judged = {}
    with progress_bar(len(contenders)) as on_progress, ThreadPoolExecutor(2) as pool:
        found = pool.map(judge, contenders.values())
        for name, one in zip(contenders, found, strict=True):
            judged[name] = one
            on_progress(name, 1)
    return judged
