"""What the README says: its examples run, as one program, and its table is what was measured."""

import json
import re
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.plan_report import summary

README = Path(__file__).parents[1] / "README.md"


def test_table_of_programs_is_what_was_measured():
    rows = json.loads((RESULTS / "plan-h200-aot.json").read_text(encoding="utf-8"))
    assert summary(rows) in README.read_text(encoding="utf-8")


def test_examples_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    program = "\n".join(blocks)
    namespace = {"__name__": "readme"}
    exec(compile(program, str(README), "exec"), namespace)

    printed = capsys.readouterr().out
    assert "kernel" in printed or "path" in printed
    for name in ("mixture", "gated_lion"):
        state = namespace[name].init(namespace["variables"]["params"])
        assert state.inner_state
