"""The tables and figures of the pages in `docs/`, compared with the recorded files."""

import json

import pytest

from benchmarks import RESULTS, report, results, step, summary

BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"

ROW = {
    "median_ms": 2.5,
    "to_adamw_per_byte": 1.0,
    "of_copy": 0.9,
    "times_ms": [2.0, 2.5, 4.0],
    "device": "cpu, 2 CPU cores",
    "versions": {"jax": "0.10.2", "optax": "0.2.8"},
    "date": "2026-11-21",
}


def test_pages_show_what_was_measured():
    contents = summary.contents()
    assert {page: set(tables) for page, tables in contents.items()} == {
        "../README.md": {"performance-table"},
        "performance.md": {"step-table", "compiled-table"},
        "sharding.md": {"pod-table"},
        "memory.md": {"memory-table"},
        "low_precision.md": {"quantized-compiled-table", "quantized-memory-table"},
    }
    for page, tables in contents.items():
        text = (summary.DOCS / page).read_text(encoding="utf-8")
        for name, content in tables.items():
            assert report.fill(text, name, content) == text, page
    text = (summary.DOCS / "performance.md").read_text(encoding="utf-8")
    rows = results.load(results.path(RESULTS, "step", "cpu"))
    assert all(f"| {case.partition(' / ')[2]} " in text for case in rows)


def test_the_table_takes_what_is_there():
    rows = {
        "ViT-B/16 / torch adamw, fused": ROW | {"to_adamw_per_byte": 1.2},
        "ResNet-50 / fame": ROW | {"to_adamw_per_byte": 1.159, "date": "2026-11-22"},
        "ResNet-50 / adamw": ROW,
        "ResNet-50 / of another time": ROW,
    }
    assert step.summary(rows).splitlines() == [
        "| optimizer          | ResNet-50      | ViT-B/16   |",
        "| ------------------ | -------------- | ---------- |",
        "| adamw              | 1.00 (90%)     | –          |",
        "| fame               | **1.16** (90%) | –          |",
        "| torch adamw, fused | –              | 1.20 (90%) |",
        "",
        "Measured 2026-11-21 on 2 CPU cores, jax 0.10.2, optax 0.2.8;"
        " 2026-11-22 on 2 CPU cores, jax 0.10.2, optax 0.2.8.",
    ]


def test_what_is_around_the_table_stays():
    text = f"# Title\n\n{BEGIN}\nold\n\n{END}\nbelow\n"
    filled = report.fill(text, "table", "| new |")
    assert filled == f"# Title\n\n{BEGIN}\n| new |\n\n{END}\nbelow\n"
    assert report.fill(filled, "table", "| new |") == filled


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}"])
def test_a_page_without_marks_is_an_error(text):
    with pytest.raises(ValueError, match="must have a line <!-- table -->"):
        report.fill(text, "table", "| new |")


def test_figures_are_the_same_each_time(tmp_path):
    rows = {
        f"{leaf_set} / {way}": ROW
        for leaf_set in ("ResNet-50", "1000 of 64 KB")
        for way in ("adamw", "novak", "torch adamw, fused")
    }
    (tmp_path / "step-cpu.json").write_text(json.dumps(rows), encoding="utf-8")

    def draw(rows: object) -> bytes:
        (tmp_path / "step-cpu.json").write_text(json.dumps(rows), encoding="utf-8")
        summary.main([f"--out={tmp_path}"])
        return (tmp_path / "step-cpu.svg").read_bytes()

    drawn = draw(rows)
    assert draw(rows) == drawn
    assert draw(rows | {"ResNet-50 / novak": ROW | {"to_adamw_per_byte": 1.1}}) != drawn
    assert b"<dc:date>" not in drawn
