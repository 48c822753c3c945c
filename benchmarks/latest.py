"""The latest results of each benchmark: JSON by case, of which a run replaces its own rows only."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import history

Row = dict[str, Any]


def path(folder: Path, benchmark: str, platform: str) -> Path:
    """The file with a benchmark's results on one kind of device."""
    return folder / f"{benchmark}-{platform}.json"


def load(path: Path) -> dict[str, Row]:
    """All rows that there are, by their cases."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(
    path: Path,
    rows: Mapping[str, Row],
    measurements: Iterable[history.Measurement],
    circumstances: history.Circumstances,
) -> None:
    """Replaces these rows of the file, keeps the others, and adds to the history beside it.

    Args:
      path: of the file.
      rows: new ones, by their cases.
      measurements: of them, for the history.
      circumstances: of all these.
    """
    write(path, load(path) | {case: row | asdict(circumstances) for case, row in rows.items()})
    history.append(path.parent / "history.jsonl", measurements, circumstances)


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """Makes these all rows of the file, each on a line."""
    text = ",\n".join(f"{_json(case)}: {_json(row)}" for case, row in rows.items())
    unfinished = path.with_suffix(".tmp")  # a run may be ended at any time
    unfinished.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    unfinished.replace(path)


def step_times(benchmark: str, rows: Mapping[str, Row]) -> list[history.Measurement]:
    """What the history says of those rows that hold the time of a step."""
    return [
        history.Measurement(benchmark, case, "ms", row["median_ms"], row["spread_ms"])
        for case, row in rows.items()
        if "median_ms" in row
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
