"""The benchmarks' own arithmetic and bookkeeping: what they print must be what was measured."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as entry_point
from benchmarks import baselines, results, step, timing
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import OPTIMIZERS, least_bytes
from benchmarks.shapes import leaves
from pallas_kernels import fuse

pytestmark = pytest.mark.slow

SMALL = "small"


@pytest.fixture
def small(monkeypatch):
    """A set of leaves and a copy that take no time."""
    monkeypatch.setitem(LEAF_SETS, SMALL, leaves([(8, 4), (4,)]))
    monkeypatch.setattr(timing, "COPIED_PARAMETERS", 64)
    monkeypatch.setattr(timing, "REST_SECONDS", 0.0)


class FakeClock:
    """Time that passes only in steps, and a log of whose they were."""

    def __init__(self):
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("rest")

    def run(self, name: str, turns: Sequence[float]) -> timing.Run:
        """A run whose steps take so long in each of its turns."""
        remaining = iter(turns)

        def run(steps: int) -> None:
            self.now += steps * next(remaining)
            self.log.append(name)

        return run


def time_fakes(turns: Mapping[str, Sequence[float]], **options: Any):
    clock = FakeClock()
    runs = {name: clock.run(name, seconds) for name, seconds in turns.items()}
    times = timing.interleave(runs, clock=clock, rest=clock.rest, **options)
    return times, clock.log


def test_runs_take_turns():
    _, log = time_fakes({"a": [1.0] * 4, "b": [1.0] * 4}, repeats=2)
    assert log == ["rest", "a", "rest", "b"] * 4


def test_median_and_spread_are_of_the_turns_that_count():
    dropped = [100.0] * timing.DROPPED_TURNS
    times, _ = time_fakes({"a": [*dropped, 1, 2, 3, 4, 50], "b": [*dropped] + [7] * 5}, repeats=5)
    assert times["a"].seconds == pytest.approx((1, 2, 3, 4, 50))
    assert times["a"].median == pytest.approx(3)
    assert times["a"].spread == pytest.approx(2)
    assert (times["b"].median, times["b"].spread) == pytest.approx((7, 0))


def test_a_row_is_a_calculation_by_hand():
    times = timing.Times((0.1, 0.2, 0.3))
    row = step.make_row(times, moved=2e9, parameters=10**8, bandwidth=4e10, reference=5e-11)
    assert row == {
        "median_ms": pytest.approx(200),
        "spread_ms": pytest.approx(100),
        "bytes_per_parameter": pytest.approx(20),
        "of_copy": pytest.approx(0.25),
        "to_adamw_per_byte": pytest.approx(2),
        "times_ms": pytest.approx([100, 200, 300]),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_compile_once(name, small):
    optimizer = OPTIMIZERS[name]
    shapes = LEAF_SETS[SMALL]
    params = optimizer.prepare(jax.tree.map(lambda x: jnp.ones(x.shape), shapes))
    grads = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    traces: list[Any] = []

    def traced_step(*arguments):
        traces.append(arguments)
        return fuse(optimizer.tx, backend="xla").step(*arguments)

    run = timing.donated(traced_step, params, optimizer.tx.init(params), grads)
    for _ in range(3):
        run(2)
    assert len(traces) == 1


def test_bytes_to_move_are_those_of_a_calculation_by_hand(monkeypatch):
    # Gradient, parameter and both moments in, all but the gradient out; lookahead's slow weights
    # in and out, FAME's two further averages too. Once their norm is known, VRAdam reads its
    # momentum, and LAMB parameter and both moments, again. Rotating weights are a fifth, rounded up
    # in each of two blocks to 7 of 32 groups of rows.
    monkeypatch.setitem(LEAF_SETS, "square", leaves([(512, 512)]))
    expected = {
        "adamw": 28,
        "fame": 44,
        "optax.lookahead(adamw)": 36,
        "novak": 36,
        "vradam": 36,
        "lamb": 40,
        "novak, rotating": 28 + 8 * 7 / 32,
    }
    measured = {name: least_bytes(name, "square") for name in expected}
    assert measured == pytest.approx(expected, rel=1e-3)


def test_each_baseline_has_a_nearest_optimizer():
    assert {x.nearest for x in baselines.BASELINES.values()} <= OPTIMIZERS.keys()


def measure(folder: Path, *names: str) -> dict[str, Any]:
    step.main(["--sets", SMALL, "--optimizers", *names, "--repeats=2", f"--out={folder}"])
    return json.loads((folder / "step-cpu.json").read_text(encoding="utf-8"))


def test_adamw_is_compared_with_itself(small, tmp_path):
    rows = measure(tmp_path, "adamw")
    assert rows[f"{SMALL} / adamw"]["to_adamw_per_byte"] == 1


def test_a_run_replaces_its_own_rows_and_history_only_grows(small, tmp_path):
    path = tmp_path / "history.jsonl"
    first = measure(tmp_path, "adamw", "vradam")
    before = path.read_text(encoding="utf-8")
    latest = measure(tmp_path, "adamw")
    assert latest.keys() == first.keys()
    assert latest[f"{SMALL} / vradam"] == first[f"{SMALL} / vradam"]
    assert latest[f"{SMALL} / adamw"] != first[f"{SMALL} / adamw"]
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.splitlines()]
    assert [row["case"] for row in rows] == [f"{SMALL} / {x}" for x in ("adamw", "vradam", "adamw")]
    fields = "date commit device versions benchmark case unit median spread"
    assert all(list(row) == fields.split() for row in rows)
    assert rows[-1]["median"] == latest[f"{SMALL} / adamw"]["median_ms"]


def test_history_names_no_machine():
    device = results.describe(jax.devices()[0])
    found = results.Environment.of(device, ["jax", "not-installed-anywhere"])
    assert found.device == f"cpu, {results.cores()} CPU cores"
    assert found.versions == {"jax": jax.__version__}


def test_the_table_shows_the_file(small, tmp_path, capsys):
    rows = measure(tmp_path, "adamw", "novak, trust ratio")
    printed = capsys.readouterr().out
    assert step.table(rows) in printed
    for case, row in rows.items():
        name = case.removeprefix(f"{SMALL} / ")
        line = next(x for x in printed.splitlines() if x.startswith(f"| {name} "))
        assert f"{row['to_adamw_per_byte']:.2f}" in line
        assert f"{row['bytes_per_parameter']:.1f}" in line


def on_command_line(monkeypatch, *arguments: str) -> Callable[[], None]:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return entry_point.main


def test_list_says_what_each_is(monkeypatch, capsys):
    on_command_line(monkeypatch, "list")()
    printed = capsys.readouterr().out
    assert all(f"{name}\n  " in printed for name in entry_point.BENCHMARKS)


@pytest.mark.parametrize("name", entry_point.BENCHMARKS)
def test_options_reach_the_benchmark(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        on_command_line(monkeypatch, name, "--help")()
    assert exit_.value.code == 0
    assert f"python -m benchmarks {name} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["stepp"], "invalid choice: 'stepp'"),
        (["step", "--sets", "ResNet-51"], "invalid choice: 'ResNet-51'"),
        (["step", "--optimizers", "adam"], "invalid choice: 'adam'"),
        (["train", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["step", "--repeats", "1"], "above 1"),
        (["compiled", "--sets", "ResNet-51"], "invalid choice: 'ResNet-51'"),
        (["compiled", "--device", "gpu"], "invalid choice: 'gpu'"),
        (["compiled", "--device", "tpu-aot", "--backends", "xla", "mosaic"], "not mosaic"),
        (["compiled", "--record", "--backends", "xla"], "leave out --backends"),
    ],
)
def test_bad_names_are_errors(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        on_command_line(monkeypatch, *arguments)()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_baseline_that_is_not_installed_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(baselines, "installed", list)
    with pytest.raises(SystemExit) as exit_:
        step.main(["--optimizers", "torch adamw, fused"])
    assert exit_.value.code == 2
    assert "needs the extra `baselines`" in capsys.readouterr().err
