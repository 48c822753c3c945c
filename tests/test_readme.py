"""README and the pages in `docs/`: their examples run, and their links lead somewhere."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from optax_ext import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {page.stem: page for page in (README, *sorted((ROOT / "docs").rglob("*.md")))}
WITH_LINKS = [*PAGES.values(), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]


def run_examples(page: Path) -> dict[str, Any]:
    """Run the examples of a page as one program; return its variables."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    namespace: dict[str, Any] = {"__name__": page.stem}
    exec(compile("\n".join(blocks), str(page), "exec"), namespace)
    return namespace


# What each page prints, in this order.
PRINTED = {
    "README": ["step 50: loss", "step 200: loss", "gate"],
    "caadam": ["connections", "control: Adam at", "params/layers_0/kernel"],
    "composing": ["gate", "keeps the contract", "rate 0.0003", "novak"],
    "getting_started": ["step 200: loss", "rectification", "norm after one step"],
    "gpu": ["kernel 0.998", "step 1"],
    "low_precision": ["SignedRoot(group_size=64)"],
    "methods": ["rectification", "trust_ratio"],
    "sharding": ["'data'", "restored on 4 devices"],
}


@pytest.mark.parametrize("name", PRINTED)
def test_examples_run(name, capsys):
    assert run_examples(PAGES[name])
    printed = capsys.readouterr().out
    shown = re.findall(r"^```text\n(.*?)^```", PAGES[name].read_text(encoding="utf-8"), re.M | re.S)
    for text in (*shown, *PRINTED[name]):
        assert text in printed
        printed = printed.partition(text)[2]


def test_every_page_with_examples_runs():
    with_examples = {
        name for name, page in PAGES.items() if "```python" in page.read_text(encoding="utf-8")
    }
    assert with_examples == PRINTED.keys()


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_readme_is_one_page_and_describes_every_method():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    described = dict(re.findall(r"^\| \[`(\w+)`\]\S* \| (.*?) \|", text, re.M))
    assert described == {name: method.description for name, method in METHODS.items()}


def test_readme_on_a_package_index_has_absolute_links_only():
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    text = README.read_text(encoding="utf-8")
    for change in hatch["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]+)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
