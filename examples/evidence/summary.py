"""Fills the tables of evidence in `docs/`, and the page with all figures and numbers; runs nothing.

python examples/evidence/summary.py
"""

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _evidence import RESULTS, Estimate
from benchmarks.report import fill

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"
PAGE = RESULTS / "README.md"
FROM_DOCS = "../examples/evidence/results"
# In the order of the table.
SCRIPTS = (
    "lag",
    "edge_of_stability",
    "escapes",
    "flat_minima",
    "plain_depth",
    "connections",
    "landscapes",
    "low_precision",
    "low_precision_training",
)

# A file of results, as `_evidence.publish` writes it.
Document = Mapping[str, Any]


def main() -> None:
    documents = load(RESULTS)
    for path, text in pages(documents).items():
        path.write_text(text, encoding="utf-8")
        print(path)


def pages(documents: Mapping[str, Document]) -> dict[Path, str]:
    """Return the text of each page."""
    claims, low_precision = DOCS / "evidence.md", DOCS / "low_precision.md"
    filled = fill(
        low_precision.read_text(encoding="utf-8"), "stress", tables_of(documents["low_precision"])
    )
    training = tables_of(documents["low_precision_training"])
    return {
        claims: fill(claims.read_text(encoding="utf-8"), "evidence-table", table(documents)),
        low_precision: fill(filled, "training", training),
        PAGE: page(documents),
    }


def load(folder: Path) -> dict[str, Document]:
    return {
        script: json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))
        for script in SCRIPTS
    }


def table(documents: Mapping[str, Document]) -> str:
    """Return the table of claims in Markdown."""
    lines = [
        "| claim | verdict | difference from the untuned baseline | from the tuned one | script |",
        "|---|---|---|---|---|",
    ]
    for script, found in documents.items():
        command = f"`{script}.py`, {takes(found['seconds'])}"
        for finding in found["findings"]:
            claim = f"[{finding['claim']}]({FROM_DOCS}/README.md#{script})"
            differences = (finding.get(key, "–") for key in ("untuned", "tuned"))
            cells = claim, finding["verdict"], *differences, command
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(documents: Mapping[str, Document]) -> str:
    """Return the page with all figures and tables in Markdown, a section for each script."""
    sections = [section(script, found) for script, found in documents.items()]
    intro = (
        "Written by `python examples/evidence/summary.py` from the files beside it, which the"
        " scripts write. Intervals, in brackets, are of 95 % confidence over seeds."
    )
    return "\n\n".join(["# What the papers claim, put to a test", intro, *sections]) + "\n"


def section(script: str, found: Document) -> str:
    """Return a section: the script's docstring, verdicts, figures and tables."""
    title, _, how = read_docstring(script).partition("\n\n")
    command, _, how = how.partition("\n\n")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        f'<a id="{script}"></a>',
        f"## {title}",
        f"`{command.strip()}`, {takes(found['seconds'])} on {found['device']}, {versions}.",
        how,
        *(f"- **{x['claim']}: {x['verdict']}.** {x['shown']}" for x in found["findings"]),
        *(f"![{Path(name).stem}]({name})" for name in found["figures"]),
        tables_of(found),
    ]
    return "\n\n".join(parts)


def read_docstring(script: str) -> str:
    """Return a script's docstring without importing it."""
    tree = ast.parse((FOLDER / f"{script}.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def tables_of(found: Document) -> str:
    return "\n\n".join(table_of(title, rows) for title, rows in found["tables"].items())


def table_of(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"{title}:", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join(map(in_words, cells.values()))} |")
    return "\n".join(lines)


def in_words(cell: Any) -> str:
    """Return a cell as the script prints it; an estimate is a list of its mean and its ends."""
    if isinstance(cell, list):
        return str(Estimate(*(math.nan if x is None else x for x in cell)))
    return cell if isinstance(cell, str) else f"{cell:.3g}"


def takes(seconds: float) -> str:
    """Return a time in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main()
