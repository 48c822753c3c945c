"""`python -m benchmarks gpu` without a GPU: what it keeps where steps are wrong, fail or hang."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import gpu, peers, timing
from benchmarks.contenders import CHAIN, CONTENDERS, WAYS
from benchmarks.gpu import command, figures, numerics, supervise, targets, worker
from benchmarks.gpu.tasks import (
    COPY,
    NUMERICS,
    PYTORCH,
    Began,
    Case,
    Found,
    Job,
    Message,
    by_worth,
)
from benchmarks.leaf_sets import LEAF_SETS, count, leaves
from pallas_kernels import fuse

pytestmark = pytest.mark.slow

TINY = "tiny"
SETS = tuple(LEAF_SETS)
L2_BYTES = 62_914_560


def make_job(kernels: dict[str, str], optimizers: Sequence[str] = ("adamw",)) -> Job:
    """All tasks of one small set."""
    return Job(
        tasks=tuple(by_worth([TINY], optimizers, [], list(kernels))),
        sets={TINY: LEAF_SETS[TINY]},
        kernels=kernels,
        ragged=leaves([(8, 4), (33,)]),
        repeats=2,
        seconds_per_call=1e-8,
        copied=1024,
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(LEAF_SETS, TINY, leaves([(8, 4), (33,)]))


@pytest.fixture
def job() -> Job:
    return make_job(WAYS)


class Clock:
    """Time that passes only where a worker says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


HANGS = "hangs"


class Scripted:
    """A worker that finds good numbers for its cases, until what its script has for one of them.

    A script maps the name of a case to a row, to `HANGS`, or to an exception. Each case takes a
    second.
    """

    def __init__(self, script: dict[str, Any], clock: Clock):
        self.script, self.clock = script, clock
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> "Scripted":
        self.jobs.append(job)
        self.messages = self.told(job)
        return self

    def told(self, job: Job) -> Iterator[Message | None]:
        for case in (case for task in job.tasks for case in task.cases):
            yield Began(case)
            self.clock.now += 1
            outcome = self.script.get(str(case), good_row(case))
            if isinstance(outcome, Exception):
                raise outcome
            if outcome == HANGS:
                yield None
            yield Found(case, outcome)
        raise EOFError

    def receive(self, seconds: float) -> Message | None:
        before = self.clock.now
        message = next(self.messages)
        if message is None:
            self.clock.now = before + seconds
        return message if self.clock.now <= before + seconds else None

    def end(self) -> str:
        return "it is gone"


def good_row(case: Case) -> dict[str, Any]:
    if case.leaf_set == NUMERICS:
        return {"to_chain": 1e-7, "to_float64": 1e-6, "chain_to_float64": 1e-6, "passed": True}
    return {
        "seconds": [2e-3, 2e-3],
        "copy_bytes_per_second": 4e12,
        "reference_seconds": 1e-3,
        "drift": 0.0,
        "passed": True,
    }


def run(
    folder: Path, job: Job, script: dict[str, Any], *, deadline: float = 1e6, **options: Any
) -> tuple[int, dict[str, Any], str, list[Job]]:
    """Exit status, rows, report, and the jobs that workers were given."""
    clock = Clock()
    workers = Scripted(script, clock)
    status = command.run(
        job, jax.devices()[0], folder, deadline=deadline, clock=clock, start=workers, **options
    )
    rows = json.loads((folder / "gpu-cpu.json").read_text(encoding="utf-8"))
    return status, rows, (folder / "gpu-cpu.md").read_text(encoding="utf-8"), workers.jobs


def cases_of(job: Job) -> list[Case]:
    return [case for task in job.tasks for case in task.cases]


def names(job: Job) -> list[str]:
    return [*map(str, cases_of(job))]


def test_everything_runs_and_what_cannot_is_a_row(tmp_path, monkeypatch):
    # The flag would give each process eight devices.
    monkeypatch.setenv("XLA_FLAGS", "")
    job = make_job({CHAIN: "xla", "triton": "interpret", "mosaic": "no such kernels"})
    status = command.run(job, jax.devices()[0], tmp_path, deadline=float("inf"))
    rows = json.loads((tmp_path / "gpu-cpu.json").read_text(encoding="utf-8"))
    assert status == 1
    assert rows.keys() == set(names(job))
    for case, row in rows.items():
        assert row["passed"] == (row["kernels"] != "mosaic"), case
        assert ("no such kernels" in row.get("error", "")) == (row["kernels"] == "mosaic"), case
    assert rows["numerics / adamw / triton"]["to_chain"] < 1e-6
    assert rows["tiny / adamw / triton, no graphs"]["drift"] < 1e-6
    report = (tmp_path / "gpu-cpu.md").read_text(encoding="utf-8")
    assert "tiny / adamw / mosaic, no graphs: ValueError: backend must be one of" in report
    history = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    timed = [case for case, row in rows.items() if "median_ms" in row]
    assert sorted(json.loads(line)["case"] for line in history) == sorted(timed)


@pytest.mark.parametrize("case", ["numerics / adamw / mosaic", "tiny / adamw / triton, no graphs"])
def test_wrong_numbers_are_in_the_report_and_the_exit_status(case, job, tmp_path):
    status, rows, report, _ = run(tmp_path, job, {case: {"passed": False}})
    assert status == 1
    assert len(rows) == len(names(job))
    assert f"- {case}: its numbers are too far" in report


@pytest.mark.parametrize(
    ("outcome", "reason"), [(EOFError(), "it is gone"), (HANGS, "its process sent no message")]
)
def test_the_next_process_does_what_is_left(outcome, reason, job, tmp_path):
    lost = "tiny / adamw / mosaic"
    status, rows, report, jobs = run(tmp_path, job, {lost: outcome})
    assert status == 1
    assert reason in rows[lost]["error"]
    assert f"- {lost}: {reason}" in report
    assert rows.keys() == set(names(job))
    assert names(jobs[1]) == names(job)[names(job).index(lost) + 1 :]


def begin_and_abort(job: Job, send: worker.Send) -> None:
    send(Began(job.tasks[0].cases[0]))
    os.abort()


def test_a_crash_of_a_process_is_seen(job):
    process = supervise.Process(job, begin_and_abort)
    assert process.receive(60) == Began(job.tasks[0].cases[0])
    with pytest.raises(EOFError):
        process.receive(60)
    assert process.end() == "its process ended with exit code -6"


def test_kernels_that_end_processes_are_given_up(tmp_path):
    job = make_job(WAYS, ["adamw", "fame", "lamb"])
    lost = [f"numerics / {name} / mosaic" for name in ("adamw", "fame", "lamb")]
    status, rows, report, jobs = run(tmp_path, job, dict.fromkeys(lost, EOFError()))
    assert status == 1
    assert [case for case, row in rows.items() if row["kernels"] == "mosaic"] == lost[:2]
    assert "- tiny: adamw / mosaic; adamw / mosaic, no graphs; fame" in report
    assert len(jobs) == 3
    assert {case for case in names(job) if "mosaic" not in case} < rows.keys()


def test_what_the_deadline_cuts_off_is_listed(job, tmp_path):
    status, rows, report, jobs = run(tmp_path, job, {}, deadline=4.5)
    assert (status, len(jobs)) == (0, 1)
    assert list(rows) == names(job)[:4]
    assert "- tiny: adamw / chain, no graphs; adamw / triton; adamw / triton, no graphs" in report


def test_a_process_that_hangs_does_not_outlast_the_deadline(job, tmp_path):
    _, rows, report, jobs = run(tmp_path, job, {names(job)[3]: HANGS}, deadline=10)
    assert len(jobs) == 1
    assert list(rows) == names(job)[:3]
    assert names(job)[3].removeprefix("tiny / ") in report


def test_a_process_that_cannot_begin_is_an_error(job, tmp_path, capsys):
    class Stillborn(Scripted):
        def told(self, job):
            yield from ()
            raise EOFError

    status = command.run(
        job,
        jax.devices()[0],
        tmp_path,
        deadline=1e6,
        clock=(clock := Clock()),
        start=Stillborn({}, clock),
    )
    assert status == 1
    assert "nothing can be measured: it is gone" in capsys.readouterr().out


def test_a_run_is_resumed_where_it_was_cut_off(job, tmp_path):
    run(tmp_path, job, {names(job)[1]: {"passed": False}}, deadline=4.5)
    before = (tmp_path / "history.jsonl").read_text(encoding="utf-8")
    status, rows, report, jobs = run(tmp_path, job, {}, resume=True)
    assert status == 0
    assert names(jobs[0]) == [names(job)[1], *names(job)[4:]]
    assert rows.keys() == set(names(job))
    assert "Not measured" not in report
    assert (tmp_path / "history.jsonl").read_text(encoding="utf-8").startswith(before)


CHAIN_FOUND = [np.float32([1, -2]), np.int32(3)]


@pytest.mark.parametrize(
    ("value", "count", "passes"),
    [
        (1, 3, True),
        (1 + 1e-5, 3, True),
        (1 + 4e-5, 3, False),
        (np.nan, 3, False),
        (np.inf, 3, False),
        (1, 4, False),
    ],
)
def test_numbers_far_from_the_chain_do_not_pass(value, count, passes):
    fused = [np.float32([value, -2]), np.int32(count)]
    inexact = [np.array([1 + 1e-3, -2]), np.array(3)]  # no excuse
    assert numerics.compare(fused, CHAIN_FOUND, inexact)["passed"] == passes


@pytest.mark.parametrize(("value", "passes"), [(1, True), (1 + 3e-6, False)])
def test_numbers_must_be_as_near_to_float64_as_the_chain(value, passes):
    exact = [np.array([1 - 1e-7, -2]), np.array(3)]
    found = numerics.compare([np.float32([value, -2]), np.int32(3)], CHAIN_FOUND, exact)
    assert found["to_chain"] < numerics.FROM_CHAIN
    assert found["passed"] == passes


def test_what_is_worth_most_comes_first():
    sets, methods, kernels = list(LEAF_SETS), list(CONTENDERS), list(WAYS)
    tasks = [*by_worth(sets, methods, ["torch adamw, fused"], kernels)]
    order = [*dict.fromkeys(task.leaf_set for task in tasks)]
    assert order[:3] == [NUMERICS, COPY, "ResNet-50"]
    cases = [case for task in tasks for case in task.cases]
    assert len(cases) == len(set(cases))
    by_set = {
        name: {x.optimizer for x in cases if x.leaf_set == name} for name in [NUMERICS, *sets]
    }
    some = {"adamw", "fame", "torch adamw, fused"}
    assert by_set.pop("1000 of 64 KB") == some
    assert by_set.pop(NUMERICS) == set(methods)
    assert all(found == {*methods, *some} for found in by_set.values())
    for leaf_set in sets:
        ways = {(x.kernels, x.graphs) for x in cases if x.leaf_set == leaf_set}
        assert ways == {(k, graphs) for k in kernels for graphs in (True, False)} | {
            (PYTORCH, False)
        }


@pytest.mark.parametrize("leaf_set", SETS)
def test_no_set_fits_into_the_last_cache(leaf_set):
    parameter_gradient_and_moments = 4 * 4 * count(LEAF_SETS[leaf_set])
    assert parameter_gradient_and_moments > 4 * L2_BYTES


def timed(case: Case, seconds: float) -> dict[str, Any]:
    return figures.figures(case, good_row(case) | {"seconds": [seconds, seconds]})


def test_figures_are_a_calculation_by_hand(monkeypatch):
    million = "a million"
    monkeypatch.setitem(LEAF_SETS, million, leaves([(1000, 1000)]))
    row = timed(Case(million, "novak", "triton"), 2e-3)
    # Parameter, gradient, both moments and slow weights in, these in every fifth step, and all but
    # the gradient out.
    moved = (4 * 4 + 3 * 4 + 8 / 5) * 1e6
    assert row["bytes_per_parameter"] == pytest.approx(moved / 1e6, rel=1e-4)
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9, rel=1e-4)
    assert row["of_copy"] == pytest.approx(moved / 2e-3 / 4e12, rel=1e-4)
    assert row["to_adamw_per_byte"] == pytest.approx((2e-3 / moved) / (1e-3 / 28e6), rel=1e-4)
    assert row["median_ms"] == 2
    chain = timed(Case(million, "novak", CHAIN), 2e-3)
    assert chain["bytes_per_parameter"] == pytest.approx(36, rel=1e-4)


def test_targets_tell_the_worst_case():
    cases = {
        Case("ResNet-50", "adamw", CHAIN): 3.0,
        Case("ResNet-50", "adamw", "triton"): 2.0,
        Case("ResNet-50", "adamw", CHAIN, graphs=False): 3.0,
        Case("ResNet-50", "adamw", "triton", graphs=False): 1.0,
        Case("ResNet-50", "fame", CHAIN, graphs=False): 3.0,
        Case("ResNet-50", "fame", "triton", graphs=False): 2.0,
        Case("GPT-2 124M", "adamw", "triton"): 124439808 * 28 / (0.8 * 4e12) * 1e3,
    }
    rows = {str(case): timed(case, 1e-3 * ms) for case, ms in cases.items()}
    told = [targets.verdict(target, "triton", rows) for target in targets.TARGETS]
    assert told == [
        "**missed** by 1: 0.80 to 0.80 in 1 cases, least on GPT-2 124M / adamw / triton",
        "met: 1.50 to 3.00 in 3 cases, least on ResNet-50 / adamw / triton",
        "**missed** by 1: 1.50 to 3.00 in 2 cases, least on ResNet-50 / fame / triton, no graphs",
        "measured: 1.50 to 1.50 in 1 cases, least on ResNet-50 / adamw / triton",
    ]
    assert {targets.verdict(target, "mosaic", rows) for target in targets.TARGETS} == {
        "not measured"
    }


def test_the_time_of_a_call_is_no_steps():
    clock = Clock()

    def run(calls: int) -> None:
        clock.now += 7 + calls * 20 * 0.5  # seven seconds until the first begins

    assert timing.per_step(run, 20, clock)() == pytest.approx(0.5)


def test_a_loop_does_all_steps():
    tx = optax.adam(0.1)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = jnp.arange(3.0), jnp.array([1.0, -2.0, 0.5])
    expected = params, tx.init(params)
    for _ in range(4):
        expected = step(*expected, grads)
    found = jax.jit(timing.in_loop(step, 4))(params, tx.init(params), grads)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_loop_computes_in_every_step_what_depends_on_gradients_alone():
    tx = CONTENDERS["clip + adamw"].tx
    shapes = leaves([(64, 64)])
    program = timing.in_loop(fuse(tx, backend="xla").step, 20)
    compiled = jax.jit(program).lower(shapes, jax.eval_shape(tx.init, shapes), shapes).compile()
    before_the_loop = (compiled.as_text() or "").split("\nENTRY")[1]
    assert " fusion(" not in before_the_loop


def test_a_missing_gpu_is_an_error_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the command sets it
    with pytest.raises(SystemExit) as exit_:
        gpu.main([f"--out={tmp_path / 'results'}"])
    assert exit_.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


class Torch:
    """The part of PyTorch that a baseline's step needs, with a log of its calls."""

    def __init__(self, device: str):
        self.device = device
        self.log: list[str] = []
        self.nn = SimpleNamespace(Parameter=lambda x: x)
        self.cuda = SimpleNamespace(synchronize=lambda: self.log.append("synchronize"))
        self.optim = SimpleNamespace(AdamW=self.adamw)

    def tensor(self, values: np.ndarray, device: str) -> SimpleNamespace:
        return SimpleNamespace(values=values, device=device)

    def adamw(self, leaves: Sequence[Any], rate: float, **options: bool) -> SimpleNamespace:
        assert {x.device for leaf in leaves for x in (leaf, leaf.grad)} == {self.device}
        return SimpleNamespace(step=lambda: self.log.append("step"))


@pytest.mark.parametrize(("device", "ends"), [("cpu", []), ("cuda", ["synchronize"])])
def test_pytorch_is_waited_for_on_a_gpu(device, ends, monkeypatch):
    torch = Torch(device)
    monkeypatch.setattr(peers, "_torch", lambda: torch)
    monkeypatch.setitem(sys.modules, "torch", cast(ModuleType, torch))
    run = peers.running("torch adamw, fused", [np.ones(3)], [np.ones(3)], device)
    torch.log.clear()
    run(2)
    assert torch.log == ["step", "step", *ends]
