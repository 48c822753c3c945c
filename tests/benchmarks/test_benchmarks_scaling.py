"""The benchmark of leaves and parameters: what it measures where, and what it draws."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import scaling, timing, trace
from benchmarks.scaling import Point

pytestmark = pytest.mark.slow


@pytest.fixture
def quick(monkeypatch):
    """Points and compilations that take no time."""
    monkeypatch.setattr(timing, "REST_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "FIXED_LEAVES", 2)
    monkeypatch.setattr(scaling, "FIXED_PARAMETERS", 20)
    monkeypatch.setattr(scaling, "SECONDS_OF_COMPILATION", 0.0)


def test_leaves_have_the_parameters_among_them():
    assert [x.shape for x in Point(10, 1000).shapes().values()] == [(100,)] * 10
    assert [x.shape for x in Point(3, 1000).shapes().values()] == [(332,)] * 3
    assert [x.shape for x in Point(3, 3).shapes().values()] == [(1,)] * 3


def test_small_steps_share_a_turn():
    turns = [Point(10, 10**i).steps_per_turn() for i in range(3, 9)]
    assert turns == [100, 100, 10, 1, 1, 1]


def test_a_row_is_a_calculation_by_hand():
    times, reference = timing.Times((0.1, 0.4, 0.3)), timing.Times((0.1, 0.2, 0.1))
    assert scaling.make_row(times, reference, [2.0, 1.0, 4.0]) == {
        "median_ms": pytest.approx(300),
        "spread_ms": pytest.approx(150),
        "to_adamw": pytest.approx(2),
        "to_adamw_spread": pytest.approx(1),
        "compile_s": 2,
        "times_ms": pytest.approx([100, 400, 300]),
        "compile_times_s": [2, 1, 4],
    }


def test_every_compilation_is_from_nothing(quick, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        seconds = scaling.compile_seconds(Point(2, 8), "adamw")
    assert len(seconds) == 2
    for done in ("Finished tracing step", "Finished XLA compilation of jit(step)"):
        assert sum(message.startswith(done) for message in caplog.messages) == 2, done
    assert not any("cache hit" in message.lower() for message in caplog.messages)


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    scaling.main(["--repeats=2", f"--out={folder}", "--optimizers=adamw", *arguments])
    return json.loads((folder / "scaling-cpu.json").read_text(encoding="utf-8"))


def test_points_on_both_axes_are_measured_once_and_rows_are_kept(quick, tmp_path, capsys):
    before = measure(tmp_path, "--leaves", "1", "2", "--parameters", "20")
    printed = capsys.readouterr().out
    points = ("1 leaf, 20 parameters", "2 leaves, 20 parameters")
    assert list(before) == [f"{point} / adamw" for point in points]
    assert all(point in printed for point in points)
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = {(x["case"], x["unit"]): x["median"] for x in map(json.loads, lines)}
    for case, row in before.items():
        assert history.pop((case, "ms")) == row["median_ms"]
        assert history.pop((f"{case}, compile", "s")) == row["compile_s"]
    assert not history

    figure = tmp_path / "scaling-cpu.svg"
    drawn = figure.read_bytes()
    scaling.draw(tmp_path / "scaling-cpu.json")
    assert figure.read_bytes() == drawn

    after = measure(tmp_path, "--leaves", "--parameters", "4")
    assert list(after) == [*before, "2 leaves, 4 parameters / adamw"]
    assert before.items() <= after.items()
    assert figure.read_bytes() != drawn


def test_without_matplotlib_it_measures(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert measure(tmp_path, "--leaves", "1", "--parameters")
    assert not list(tmp_path.glob("*.svg"))
    assert "summary" in capsys.readouterr().out


def test_traces_are_timed_apart_from_plans(tmp_path, capsys):
    trace.main(["--leaves", "2", "--optimizers", "adamw", "--repeats=2", f"--out={tmp_path}"])
    (case, row), *rest = json.loads((tmp_path / "trace-cpu.json").read_text("utf-8")).items()
    assert case == "2 leaves / adamw"
    assert case in capsys.readouterr().out
    assert not rest
    assert 0 < min(row["plan_s"]) < max(row["trace_s"])
    lines = map(json.loads, (tmp_path / "history.jsonl").read_text("utf-8").splitlines())
    assert [x["case"] for x in lines] == [f"{case}, trace_s", f"{case}, plan_s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--leaves", "0"], "must be in [1, 1000000], got '0'"),
        (["--leaves", "1000001"], "got '1000001'"),
        (["--parameters", "1e6"], "got '1e6'"),
        (["--parameters", "9"], "must be in [10, "),
    ],
)
def test_bad_numbers_are_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        scaling.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
