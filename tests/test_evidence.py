"""The evidence in small: each script runs, and finds what is known beforehand; README shows it.

A new script is a row of `SMOKE`.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks.summary import fill

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "evidence"


@pytest.fixture
def load_module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a file of the evidence as a script does: from its own folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def check_lag(tables: dict[str, Any]) -> None:
    (rows,) = tables.values()
    for name, cells in rows.items():
        assert cells["lag"] == pytest.approx(cells["by formula"], abs=1e-3), name
        assert cells["noise"][0] == pytest.approx(cells["noise, by formula"], rel=0.15), name
    assert rows["EMA .9 (Adam)"]["by formula"] == pytest.approx(9)
    assert rows["TEMA .9 .9 .9 (equal)"]["noise, by formula"] == pytest.approx(0.199, abs=5e-4)


class Smoke(NamedTuple):
    """A script in small.

    Attributes:
      options: that make it quick.
      check: raises unless its tables are right.
    """

    options: list[str]
    check: Callable[[dict[str, Any]], None]


SMOKE = {"lag": Smoke(["--seeds=8", "--steps=1000"], check_lag)}


@pytest.mark.parametrize("name", SMOKE)
def test_script(load_module, tmp_path, capsys, name):
    options, check = SMOKE[name]
    load_module(name).main([*options, f"--out={tmp_path}"])
    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    check(found["tables"])
    printed = " ".join(capsys.readouterr().out.split())
    for finding in found["findings"]:
        assert finding["claim"] in printed
        assert f"{finding['verdict']}: {finding['shown']}" in printed
    for figure in found["figures"]:
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_every_script_is_tested_and_has_results():
    scripts = {path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_")}
    assert scripts - {"summary"} == SMOKE.keys()
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} == SMOKE.keys()


@pytest.mark.parametrize("name", SMOKE)
def test_results_are_of_a_whole_run(load_module, name):
    found = json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))
    assert all((FOLDER / "results" / figure).is_file() for figure in found["figures"])
    evidence, script = load_module("_evidence"), load_module(name)
    assert found["options"] == evidence.sizes(script.make_parser().parse_args([]))


def test_intervals(load_module):
    evidence = load_module("_evidence")
    # Student's quantile for one degree of freedom is 12.706, the standard error here 1/2.
    assert evidence.mean([0, 1]) == pytest.approx((0.5, 0.5 - 6.353, 0.5 + 6.353), abs=1e-3)
    assert np.isnan(evidence.mean([3.0])[1:]).all()
    # Wilson's: z² / (n + z²) is the upper end where none succeeds.
    assert evidence.share([False] * 10) == pytest.approx((0, 0, 0.27753), abs=1e-4)


@pytest.mark.parametrize("argument", ["--seeds=0", "--steps=1.5"])
def test_bad_sizes(load_module, capsys, argument):
    with pytest.raises(SystemExit):
        load_module("lag").main([argument])
    assert "must be a whole number above 0" in capsys.readouterr().err


def test_readme_shows_the_results(load_module):
    summary = load_module("summary")
    text = summary.README.read_text(encoding="utf-8")
    assert fill(text, "evidence-table", summary.table(FOLDER / "results")) == text
