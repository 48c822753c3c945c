"""Fills the tables of evidence in README and `docs/`, and the page of all figures; runs nothing.

python examples/evidence/summary.py
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _command_line import RESULTS
from _estimates import Estimate
from benchmarks import report
from benchmarks.report import fill
from examples import _comparison
from optax_ext import METHODS

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
COMPARISON = FOLDER.parent / "compare.json"
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGE = DOCS / "evidence_results.md"
FROM_DOCS = "../examples/evidence/results"
# In the order of the table.
SCRIPTS = (
    "study",
    "lag",
    "edge_of_stability",
    "curvature_and_loss",
    "escapes",
    "flat_minima",
    "plain_depth",
    "connections",
    "landscapes",
    "low_precision",
    "low_precision_training",
)

# A file of results, as `_results.publish` writes it.
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
    comparison = json.loads(COMPARISON.read_text(encoding="utf-8"))
    compared = fill(claims.read_text(encoding="utf-8"), "comparison", table_of_all(comparison))
    return {
        README: with_rates(README.read_text(encoding="utf-8"), best_rates(comparison, documents)),
        claims: fill(compared, "evidence-table", table(documents)),
        low_precision: fill(filled, "training", training),
        PAGE: page(documents),
    }


def load(folder: Path) -> dict[str, Document]:
    return {
        script: json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))
        for script in SCRIPTS
    }


def table_of_all(comparison: Document) -> str:
    """Return the table that `compare.py` prints, and what it says about it, in Markdown."""
    paragraphs = [f"- {text}" for text in _comparison.notes(comparison)]
    return "\n".join([report.table(_comparison.cells(comparison)), "", *paragraphs])


def best_rates(comparison: Document, documents: Mapping[str, Document]) -> dict[str, list[float]]:
    """Return the best rates of AdamW and of each method on every network where they were tuned.

    These are the network of the comparison, the two that train with state in 8 bits, and those of
    the study, there the median of its searches.
    """
    training = documents["low_precision_training"]
    # Rows without rates of their own, such as those of other weights, come last.
    rows = next(iter(training["tables"].values()))
    in_training = dict(zip(rows, training["constants"]["RATES"], strict=False))
    searches = [
        rows for title, rows in documents["study"]["tables"].items() if "chosen settings" in title
    ]
    titles = {"adamw": "AdamW"} | {name: method.title for name, method in METHODS.items()}
    return {
        name: [
            comparison["results"][name]["learning_rate"],
            *in_training[title],
            *(float(rows[title]["rates"].partition(" ")[0]) for rows in searches),
        ]
        for name, title in titles.items()
    }


def with_rates(readme: str, rates: Mapping[str, list[float]]) -> str:
    """Return README, its table filled with the best rates of each method relative to AdamW's."""
    for name in METHODS:
        ratios = sorted(x / y for x, y in zip(rates[name], rates["adamw"], strict=True))
        words = "–".join(dict.fromkeys(f"{float(f'{x:.1g}'):g}" for x in (ratios[0], ratios[-1])))
        row = rf"^(\| \[`{name}`\].*? \| .*? \| )[^|]* ×"
        readme, rows = re.subn(row, rf"\g<1>{words} ×", readme, flags=re.M)
        if rows != 1:
            raise ValueError(f"README has {rows} rows for {name}")
    return readme


def table(documents: Mapping[str, Document]) -> str:
    """Return the table of claims in Markdown."""
    lines = [
        "| claim | verdict | difference from the untuned baseline | from the tuned one | script |",
        "|---|---|---|---|---|",
    ]
    for script, found in documents.items():
        command = f"`{script}.py`, {takes(found['seconds'])}"
        for finding in found["findings"]:
            claim = f"[{finding['claim']}]({PAGE.name}#{anchor(title_of(script))})"
            differences = (finding.get(key, "–") for key in ("untuned", "tuned"))
            cells = claim, finding["verdict"], *differences, command
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(documents: Mapping[str, Document]) -> str:
    """Return the page with all figures and tables in Markdown, a section for each script."""
    sections = [section(script, found) for script, found in documents.items()]
    intro = (
        "Written by `python examples/evidence/summary.py` from the files in"
        " `examples/evidence/results`, which the scripts write. Intervals, in brackets, are of"
        " 95 % confidence over seeds."
    )
    return "\n\n".join(["# What the papers claim, put to a test", intro, *sections]) + "\n"


def anchor(title: str) -> str:
    """Return the anchor that GitHub and Sphinx give to a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def section(script: str, found: Document) -> str:
    """Return a section: the script's docstring, verdicts, figures and tables."""
    command, _, how = read_docstring(script).partition("\n\n")[2].partition("\n\n")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        f"## {title_of(script)}",
        f"`{command.strip()}`, {takes(found['seconds'])} on {found['device']}, {versions}.",
        how,
        *(f"- **{x['claim']}: {x['verdict']}.** {x['shown']}" for x in found["findings"]),
        *(f"![{Path(name).stem}]({FROM_DOCS}/{name})" for name in found["figures"]),
        tables_of(found),
    ]
    return "\n\n".join(parts)


def title_of(script: str) -> str:
    return read_docstring(script).partition("\n")[0].rstrip(".")


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
