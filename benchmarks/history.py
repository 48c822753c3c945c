"""The history of all measurements: a file of JSON lines that only grows.

A row contains the measurement, its date, the commit, the versions and the kind of device. It
contains nothing that identifies a machine.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Circumstances:
    """The environment that all measurements of one run share.

    Attributes:
      date: the date of the run in UTC, as year-month-day.
      commit: the short hash of the commit, with "-dirty" if files differ; "" outside of git.
      device: the platform and kind of the device, and the number of CPU cores that the run may use.
      versions: the versions of packages, by name.
    """

    date: str
    commit: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """The result of one case of a benchmark.

    Attributes:
      benchmark: the name of the benchmark on the command line.
      case: the name of the case, such as an optimizer on a set of leaves.
      unit: the unit of median and spread.
      median: the median over the repeats.
      spread: the interquartile range over the repeats.
    """

    benchmark: str
    case: str
    unit: str
    median: float
    spread: float


def circumstances(device: str, packages: Iterable[str]) -> Circumstances:
    """Return the environment of this run, without packages that are not installed."""
    return Circumstances(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_commit(),
        device=device,
        versions=_versions(packages),
    )


def append(path: Path, rows: Iterable[Measurement], shared: Circumstances) -> None:
    """Append a line for each row to the file; create the file if it does not exist."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(asdict(shared) | asdict(row), ensure_ascii=False), file=file)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: Any) -> str:
    """Describe a JAX device and the number of CPU cores."""
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    return f"{device.platform}{kind}, {cores()} CPU cores"


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD")
    # A run changes its results only, and these do not affect the next measurement.
    changed = _git("status", "--porcelain", "--", ":/", ":(exclude)results")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return found.stdout.strip()


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
