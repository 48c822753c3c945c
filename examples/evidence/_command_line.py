"""The command line of a script."""

import argparse
import errno
import os
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


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
