"""The history of all measurements: a file of JSON lines that only grows.

A row says what was measured, when, of which commit, with which versions, and on what kind of
device, but nothing that tells one machine from another of its kind.
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
    """What the measurements of one run have in common.

    Attributes:
      date: of the run, in UTC, as year-month-day.
      commit: short hash of the code, with "-dirty" where files differ from it; "" outside of git.
      device: its platform and kind, and the number of CPU cores that the run may use.
      versions: of packages, by their names.
    """

    date: str
    commit: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One case of a benchmark.

    Attributes:
      benchmark: its name on the command line.
      case: what it was done with.
      unit: of median and spread.
      median: over the repeats.
      spread: interquartile range over the repeats.
    """

    benchmark: str
    case: str
    unit: str
    median: float
    spread: float


def circumstances(device: str, packages: Iterable[str]) -> Circumstances:
    """Those of a run; packages that are not installed are left out."""
    return Circumstances(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_commit(),
        device=device,
        versions=_versions(packages),
    )


def append(path: Path, rows: Iterable[Measurement], shared: Circumstances) -> None:
    """Adds a line for each row to the end of the file, which need not exist."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(asdict(shared) | asdict(row), ensure_ascii=False), file=file)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: Any) -> str:
    """One of JAX's devices, and the CPU that drives it."""
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    return f"{device.platform}{kind}, {cores()} CPU cores"


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD")
    # Results are what a run changes; they don't change what the next one measures.
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
