"""Files of results: the latest row of each case, and a history of all measurements.

A row contains the measurement, its date, the commit, the versions and the kind of device. It
contains nothing that identifies a machine. A run replaces the rows that it measures and keeps the
others. The history, a file of JSON lines, only grows.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Environment:
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

    @classmethod
    def of(cls, device: str, packages: Iterable[str]) -> "Environment":
        """Return the environment of this run, without packages that are not installed."""
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(date, _commit(), device, _versions(packages))

    def __str__(self) -> str:
        """Describe the device and the versions."""
        return ", ".join([self.device, *map(" ".join, self.versions.items())])


@dataclass(frozen=True)
class Measurement:
    """A line of the history.

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


def path(folder: Path, benchmark: str, platform: str) -> Path:
    """Return the path of a benchmark's results on one kind of device."""
    return folder / f"{benchmark}-{platform}.json"


def load(path: Path) -> dict[str, Row]:
    """Return all rows of the file by case; none if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(
    path: Path,
    rows: Mapping[str, Row],
    measurements: Iterable[Measurement],
    environment: Environment,
) -> None:
    """Replace these rows of the file, keep the others, and append to the history in its folder."""
    write(path, load(path) | {case: row | asdict(environment) for case, row in rows.items()})
    append_history(path.parent, measurements, environment)


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """Write a file that contains these rows only, each on a line."""
    text = ",\n".join(f"{_json(case)}: {_json(row)}" for case, row in rows.items())
    unfinished = path.with_suffix(".tmp")  # a run may be killed at any time
    unfinished.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    unfinished.replace(path)


def append_history(folder: Path, rows: Iterable[Measurement], environment: Environment) -> None:
    """Append a line for each measurement to the history in a folder."""
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        for row in rows:
            print(_json(asdict(environment) | asdict(row)), file=file)


def step_times(benchmark: str, rows: Mapping[str, Row]) -> list[Measurement]:
    """Return the measurements of the rows that contain the time of a step."""
    return [
        Measurement(benchmark, case, "ms", row["median_ms"], row["spread_ms"])
        for case, row in rows.items()
        if "median_ms" in row
    ]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: Any) -> str:
    """Describe a JAX device and the number of CPU cores."""
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    return f"{device.platform}{kind}, {cores()} CPU cores"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


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
