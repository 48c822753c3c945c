"""The recorded results of the evidence are of whole runs, and the pages show them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.examples.test_evidence_scripts import SMOKE

FOLDER = Path(__file__).parents[2] / "examples" / "evidence"
SCRIPTS = sorted(
    {path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_")} - {"summary"}
)


def test_every_script_is_tested_and_has_results(load_module):
    assert set(SCRIPTS) == SMOKE.keys() == set(load_module("summary").SCRIPTS)
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_are_of_a_whole_run(load_module, name):
    found = json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))
    assert all((FOLDER / "results" / figure).is_file() for figure in found["figures"])
    results, script = load_module("_results"), load_module(name)
    options = script.make_parser().parse_args([])
    assert found["options"] == results.decisive(options, getattr(script, "NOT_DECISIVE", ()))
    assert found["constants"].keys() == script.CONSTANTS.keys()
    for constant, value in script.CONSTANTS.items():
        np.testing.assert_allclose(found["constants"][constant], value, err_msg=constant)


def test_pages_show_the_results(load_module):
    summary = load_module("summary")
    for path, text in summary.pages(summary.load(FOLDER / "results")).items():
        assert path.read_text(encoding="utf-8") == text, path
