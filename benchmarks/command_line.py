"""Options and setup that the benchmarks' command lines share."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks import RESULTS
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.results import Environment, describe


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
) -> None:
    """Add an option that takes one or more names.

    Args:
      parser: the parser of the command.
      option: the name of the option.
      choices: the names that the option accepts.
      default: the names that are used without the option; `None` means all choices.
      by_default: words for the default in the help text; `None` lists the names.
    """
    names = list(choices)
    chosen = names if default is None else list(default)
    words = by_default or ("all" if chosen == names else quoted(chosen))
    parser.add_argument(
        option,
        nargs="+",
        choices=names,
        default=chosen,
        metavar="NAME",
        help=f"one or more of {quoted(names)} (default: {words})",
    )


def add_optimizers(parser: argparse.ArgumentParser, default: Iterable[str] = OPTIMIZERS) -> None:
    """Add the option `--optimizers`, the optimizers to measure."""
    add_choices(parser, "--optimizers", OPTIMIZERS, default)


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


def begin(
    parser: argparse.ArgumentParser,
    folder: Path,
    packages: Iterable[str],
    platform: str = "cpu",
) -> Environment:
    """Create the folder for results, and print the environment.

    JAX's default device is then the first of the platform.

    Args:
      parser: the parser, which reports errors to the user.
      folder: the folder for results.
      packages: the packages whose versions affect the results.
      platform: JAX's name of the platform.
    """
    try:
        device = find_device(platform)
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        parser.error(str(error))
    environment = Environment.of(describe(device), packages)
    print(environment)
    return environment


def find_device(platform: str) -> Any:
    """Return the first device of a platform; raise `RuntimeError` if there is none."""
    if platform == "cpu":  # else JAX warns about GPUs that it can't use
        jax.config.update("jax_platforms", "cpu")
    return jax.devices(platform)[0]
