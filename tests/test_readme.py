"""The examples of README and of the pages in `docs/`: those of a page run as one program."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run_examples(page: Path, at_least: int) -> dict[str, Any]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= at_least
    namespace: dict[str, Any] = {"__name__": page.stem}
    exec(compile("\n".join(blocks), str(page), "exec"), namespace)
    return namespace


def test_examples_run(capsys):
    namespace = run_examples(ROOT / "README.md", at_least=5)
    printed = capsys.readouterr().out
    assert "kernel" in printed or "path" in printed
    for name in ("mixture", "gated_lion"):
        state = namespace[name].init(namespace["variables"]["params"])
        assert state.inner_state


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_examples_of_a_page_run(page, capsys):
    run_examples(page, at_least=1)
    assert "SignedRoot(group_size=64)" in capsys.readouterr().out
