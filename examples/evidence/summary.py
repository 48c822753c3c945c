"""Fills README's table of claims and verdicts from the results; runs nothing.

python examples/evidence/summary.py
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.summary import fill

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(fill(text, "evidence-table", table(RESULTS)), encoding="utf-8")
    print(README)


def table(folder: Path) -> str:
    """In Markdown, a row for each claim, the scripts in order of their names."""
    lines = ["| claim | verdict | what was seen | figure | `python examples/evidence/…` |"]
    lines.append("|---|---|---|---|---|")
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [row(path.stem, found, finding) for finding in found["findings"]]
    return "\n".join(lines)


def row(script: str, found: dict[str, Any], finding: dict[str, str]) -> str:
    figures = ", ".join(
        f"[{Path(figure).stem}](examples/evidence/results/{figure})" for figure in found["figures"]
    )
    command = f"`{script}.py`, {takes(found['seconds'])}"
    cells = finding["claim"], f"**{finding['verdict']}**", finding["shown"], figures, command
    return f"| {' | '.join(cells)} |"


def takes(seconds: float) -> str:
    """In the unit that a reader would say it in."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main()
