"""The latest results of each benchmark: a JSON file with a row for each case.

A run replaces the rows that it measures and keeps the others.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import history

Row = dict[str, Any]


def path(folder: Path, benchmark: str, platform: str) -> Path:
    """Return the path of a benchmark's results on one kind of device."""
    return folder / f"{benchmark}-{platform}.json"


def load(path: Path) -> dict[str, Row]:
    """Return all rows of the file by case; none if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(
    path: Path,
    rows: Mapping[str, Row],
    measurements: Iterable[history.Measurement],
    circumstances: history.Circumstances,
) -> None:
    """Replace these rows of the file, keep the others, and append to the history in its folder.

    Args:
      path: the path of the file.
      rows: the new rows by case.
      measurements: the measurements to append to the history.
      circumstances: the environment of all rows.
    """
    write(path, load(path) | {case: row | asdict(circumstances) for case, row in rows.items()})
    history.append(path.parent / "history.jsonl", measurements, circumstances)


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """Write a file that contains these rows only, each on a line."""
    text = ",\n".join(f"{_json(case)}: {_json(row)}" for case, row in rows.items())
    unfinished = path.with_suffix(".tmp")  # a run may be killed at any time
    unfinished.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    unfinished.replace(path)


def step_times(benchmark: str, rows: Mapping[str, Row]) -> list[history.Measurement]:
    """Return the measurements of the rows that contain the time of a step."""
    return [
        history.Measurement(benchmark, case, "ms", row["median_ms"], row["spread_ms"])
        for case, row in rows.items()
        if "median_ms" in row
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
