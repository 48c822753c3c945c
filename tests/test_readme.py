"""The README's examples, which run as one program."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


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
