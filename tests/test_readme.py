"""README and the pages in `docs/`: their examples run, and their links lead somewhere."""

import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest

from optax_ext import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {page.stem: page for page in (README, *sorted((ROOT / "docs").rglob("*.md")))}
WITH_LINKS = [*PAGES.values(), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]


def run_examples(page: Path) -> None:
    """Run the examples of a page as one program; each recipe is a program of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    programs = blocks if page.stem == "recipes" else ["\n".join(blocks)]
    for program in programs:
        namespace: dict[str, Any] = {"__name__": page.stem}
        exec(compile(program, str(page), "exec"), namespace)


# What each page prints, in this order.
PRINTED = {
    "README": ["step 50: loss", "step 200: loss", "gate"],
    "caadam": ["connections", "control: Adam at", "params/layers_0/kernel"],
    "composing": ["gate", "keeps the contract", "novak"],
    "getting_started": ["linen: share of InvAdam 0.", "linen: loss 0.0", "loss 5.000 -> 0.00"],
    "gpu": ["kernel 0.998", "step 1"],
    "low_precision": ["SignedRoot(group_size=64)"],
    "methods": ["rectification", "trust_ratio"],
    "recipes": [
        "nnx: loss 0.0",
        "in PartitionState.inner_states/biases/",
        "in PartitionState.inner_states/kernels/",
        "saved: loss",
        "in 8 bits: loss",
        "int8",
        "equinox: loss 0.0",
        "haiku: loss 0.0",
        "keras: loss 1.25 -> 0.0",
        "parameters bfloat16 P('fsdp', None)",
        "corrections int8 P('fsdp', None)",
        "rate 0.0052",
        "decay 0.0010, compiled 1 time",
        "'kernels/learning_rate': 0.004, 'kernels/gate': 0.1571",
        "'biases/rectification': 1.0, 'biases/trust_ratio/0': 1.0",
        "'kernels/effective_rate': 0.0006",
    ],
    "sharding": ["'data'", "restored on 4 devices"],
}


@pytest.mark.parametrize("name", PRINTED)
def test_examples_run(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # Keras writes its settings there
    with jax.numpy_rank_promotion("allow"):  # as users have it; layers of Keras need it
        run_examples(PAGES[name])
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
