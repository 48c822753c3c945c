"""The study's protocol: who may be judged, by which runs, and by which statistics."""

import itertools
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

TRIALS, SEEDS = 2, 8


def rules(protocol: ModuleType) -> dict[str, Any]:
    """Return the rules of a workload, and of a longer one."""
    short = protocol.Rules(guess=9.5, trials=TRIALS, seeds=SEEDS)
    return {"short": short, "long": short._replace(settings_from="short")}


def make_study(protocol: ModuleType) -> Any:
    contenders = {
        "AdamW": protocol.Contender(optax.adamw, 1e-3),
        "method": protocol.Contender(optax.adamw, 1e-1),
        "method, 8-bit": protocol.Contender(optax.adamw, 1e-1, form_of="method"),
    }
    return protocol.Study(contenders, rules(protocol))


def record(study: Any, runs: Any, validation: float = 1.0) -> None:
    study.results.update({run: {"validation": validation, "test": 2.0} for run in runs})


def test_a_contender_without_its_trials_is_refused(load_module):
    study = make_study(load_module("_study_protocol"))
    with pytest.raises(ValueError, match=r"method at short .* 16 of 16 trainings on trials"):
        study.decisive_results("short", "method")
    trials = study.missing("short", "method")
    record(study, trials[:-1])
    for judge in (study.chosen, study.decisive, study.decisive_results, study.losses):
        with pytest.raises(ValueError, match="1 of 16 trainings on trials are missing"):
            judge("short", "method")
    assert study.missing("short", "method") == trials[-1:]


def test_a_contender_without_its_seeds_is_refused(load_module):
    study = make_study(load_module("_study_protocol"))
    record(study, study.missing("short", "method"))
    seeds = study.missing("short", "method")
    record(study, seeds[:-1])
    with pytest.raises(ValueError, match="1 of 8 trainings on seeds are missing"):
        study.losses("short", "method")
    assert not study.complete("short", "method")
    record(study, seeds[-1:])
    assert study.complete("short", "method")
    np.testing.assert_array_equal(study.losses("short", "method"), np.full(SEEDS, 2.0))


def test_few_seeds_and_other_numbers_of_trials_are_refused(load_module):
    protocol = load_module("_study_protocol")
    with pytest.raises(ValueError, match="at least 8 seeds must decide, got 7"):
        protocol.Study({}, {"short": protocol.Rules(guess=1.0, seeds=7)})
    short = protocol.Rules(guess=1.0)
    both = rules(protocol) | {"long": short._replace(seeds=16, settings_from="short")}
    with pytest.raises(ValueError, match="16 seeds can't be judged by 8 searches"):
        protocol.Study({}, both)
    for trials in (1, 12):
        with pytest.raises(ValueError, match=f"trials above 1, got {trials} and 8"):
            protocol.cube(trials, 8)


def test_each_search_chooses_among_its_own_trials(load_module):
    protocol = load_module("_study_protocol")
    study = make_study(protocol)
    searches = study.trials("short", "method")
    record(study, study.missing("short", "method"))
    best = [row[i % TRIALS] for i, row in enumerate(searches)]
    record(study, best, validation=0.5)
    # The best of all, but of no search.
    extra = [run._replace(setting=protocol.Setting(1.0, 0.0, 0.0)) for run in best]
    record(study, extra, validation=0.1)
    record(study, [run._replace(seed=1000) for run in best[1:]], validation=0.1)
    assert study.chosen("short", "method") == [run.setting for run in best]
    decisive = study.missing("short", "method")
    assert [(run.setting, run.seed) for run in decisive] == [
        (run.setting, seed) for seed, run in enumerate(best)
    ]


def test_a_training_that_diverged_counts_as_a_guess(load_module):
    study = make_study(load_module("_study_protocol"))
    record(study, study.missing("short", "method"), validation=None)
    best = [row[1] for row in study.trials("short", "method")]
    record(study, best, validation=9.0)
    assert study.chosen("short", "method") == [run.setting for run in best]
    seeds = study.missing("short", "method")
    record(study, seeds)
    diverged, bad = {"validation": None, "test": None}, {"validation": 1.0, "test": 1e30}
    study.results.update({seeds[0]: diverged, seeds[1]: bad})
    np.testing.assert_array_equal(study.losses("short", "method"), [9.5, 9.5] + 6 * [2.0])


def test_forms_and_longer_horizons_have_no_trials(load_module):
    study = make_study(load_module("_study_protocol"))
    for workload, contender in (("long", "method"), ("short", "method, 8-bit")):
        assert study.own_trials(workload, contender) == []
        with pytest.raises(ValueError, match="method at short"):
            study.missing(workload, contender)
    record(study, study.missing("short", "method"))
    chosen = study.chosen("short", "method")
    for workload, contender in itertools.product(("short", "long"), ("method", "method, 8-bit")):
        runs = study.missing(workload, contender)
        assert {run[:2] for run in runs} == {(workload, contender)}
        assert [(run.setting, run.seed) for run in runs] == list(
            zip(chosen, range(SEEDS), strict=True)
        )
        assert study.number_missing(workload, contender) == SEEDS


def test_all_contenders_try_the_same_points(load_module):
    workloads = load_module("study").WORKLOADS
    contenders = load_module("_study_contenders").CONTENDERS
    study = load_module("_study_protocol").Study(
        contenders, {name: x.rules for name, x in workloads.items()}
    )
    for workload, of_one in study.rules.items():
        assert set(of_one.moved) <= contenders.keys()
        own = {name: study.own_trials(workload, name) for name in contenders}
        tried = {name: runs for name, runs in own.items() if runs}
        if of_one.settings_from:
            assert not tried
            continue
        assert tried.keys() == {name for name, x in contenders.items() if not x.form_of}
        expected = None
        for name, runs in tried.items():
            assert len(runs) == len(set(runs)) == of_one.trials * of_one.seeds
            seeds = np.array([run.seed for run in runs]).reshape(of_one.seeds, -1)
            np.testing.assert_array_equal(seeds.T, [1000 + np.arange(of_one.seeds)] * of_one.trials)
            rate, decay, warm_up = np.array([run.setting for run in runs]).T
            center = of_one.center * (10 if name in of_one.moved else 1) * contenders[name].rate
            points = np.log10(rate / center), rate * decay, warm_up
            expected = expected or points
            np.testing.assert_allclose(points, expected, rtol=2e-3, atol=2e-3, err_msg=name)
            check_search(points, of_one.trials)


def check_search(points: Any, trials: int) -> None:
    """Check that every search covers the ranges: three decades, three decades, and 0 to .4."""
    decades, of_step, warm_up = points
    for x, low, width in ((decades, -1.5, 3), (np.log10(of_step), -5, 3), (warm_up, 0, 0.4)):
        parts = np.floor((x - low) / width * trials).astype(int).reshape(-1, trials)
        np.testing.assert_array_equal(np.sort(parts, axis=1), [np.arange(trials)] * len(parts))


def test_differences_are_paired(load_module):
    comparisons = load_module("_study_comparisons")
    random = np.random.default_rng(0)
    losses, others = random.normal(size=8) + 0.5, random.normal(size=8)
    found = comparisons.compare(losses, others)
    differences = np.float64(losses) - np.float64(others)
    mean = differences.sum() / 8
    error = np.sqrt(((differences - mean) ** 2).sum() / 7 / 8)
    half = 2.364624 * error  # Student's quantile for seven degrees of freedom, from a table
    np.testing.assert_allclose(found.difference, [mean, mean - half, mean + half], rtol=1e-6)
    at_edge = comparisons.compare(losses - mean + half, others)
    assert at_edge.p == pytest.approx(0.05, rel=1e-5)
    assert comparisons.compare(losses, losses) == comparisons.Comparison((0, 0, 0), 0, 1)


@pytest.mark.parametrize("seeds", [8, 16])
@pytest.mark.parametrize("comparisons", [1, 11])
def test_the_smallest_effect_is_seen_in_four_of_five_studies(load_module, seeds, comparisons):
    smallest = load_module("_study_comparisons").smallest_effect
    differences = np.random.default_rng(0).normal(size=(20_000, seeds))
    # With the true deviation, which is that of this sample.
    effect = smallest(np.resize([1, -1], seeds) * np.sqrt((seeds - 1) / seeds), comparisons)
    p = stats.ttest_1samp(differences + effect, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / comparisons) == pytest.approx(0.8, abs=0.015)


def test_holm(load_module):
    np.testing.assert_allclose(
        load_module("_study_comparisons").holm([0.01, 0.04, 0.03, 0.9]), [0.04, 0.09, 0.09, 0.9]
    )


def test_schedule(load_module):
    protocol, training = load_module("_study_protocol"), load_module("_study_training")
    setting = protocol.Setting(2.0, 0.0, 0.25)
    rates = np.array([training.make_schedule(setting, 40)(count) for count in range(40)])
    np.testing.assert_allclose(rates[:10], 2 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[[24, 39]], [1, 0], atol=1e-6)
    assert (np.diff(rates[10:]) < 0).all()
    without = training.make_schedule(setting._replace(warm_up=0.0), 40)
    assert 1.9 < without(0) <= 2


@pytest.mark.slow
def test_every_decay_is_decoupled(load_module):
    contenders, script = load_module("_study_contenders"), load_module("_study_training")
    setting = load_module("_study_protocol").Setting(0.1, 0.5, 0.0)
    x = {"dense": {"kernel": jnp.arange(1.0, 4097).reshape(64, 64)}}
    for name, contender in contenders.CONTENDERS.items():
        tx = contender.factory(script.make_schedule(setting, 10), setting.decay)
        updates, _ = tx.update(optax.tree.zeros_like(x), tx.init(x), x)
        rate = script.make_schedule(setting, 10)(0)
        rate *= contenders.SWITCH_RATE if name == contenders.WARMED_UP else 1
        found, kernel = updates["dense"]["kernel"], x["dense"]["kernel"]
        np.testing.assert_allclose(found, -rate * 0.5 * kernel, rtol=1e-5, err_msg=name)


@pytest.fixture
def small(load_module) -> tuple[Any, Any]:
    """Return a small workload, and a function of seeds that returns runs of it."""
    workloads, protocol = load_module("_study_workloads"), load_module("_study_protocol")
    workload = workloads.ON_CPU["mlp"]._replace(
        load=lambda: load_module("study").shorten(workloads.load_mnist1d), steps=3
    )
    setting = protocol.Setting(1e-2, 1e-2, 0.2)

    def make_runs(*seeds: int) -> list[Any]:
        return [protocol.Run("mlp", "AdamW", setting, seed) for seed in seeds]

    return workload, make_runs


@pytest.mark.slow
def test_a_seed_decides_a_training(load_module, small):
    workload, make_runs = small
    factory = load_module("_study_contenders").CONTENDERS["AdamW"].factory
    trainer = load_module("_study_training").Trainer(workload, factory)
    names = "validation", "test", "accuracy"
    first, second = trainer.train(make_runs(0, 1))
    assert first["test"] != second["test"]
    (alone,) = trainer.train(make_runs(1))
    assert [second[name] for name in names] == pytest.approx([alone[name] for name in names])
    assert trainer.train(make_runs(1))[0]["test"] == alone["test"]
    (trial,) = trainer.train(make_runs(1000))
    assert trial.keys() == {"validation", "step_ms", "bytes"}
    assert trial["bytes"] == pytest.approx(8, abs=0.01)


@pytest.mark.slow
def test_data_are_the_same_each_time_and_held_out(load_module):
    workloads = load_module("_study_workloads")
    for load in (workloads.load_mnist1d, lambda: workloads.load_text(64)):
        first = jax.device_get(load())
        workloads.load_mnist1d.cache_clear()
        workloads.load_text.cache_clear()
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(load()))
        splits = ({x.tobytes() for x in split.images} for split in first)
        for a, b in itertools.combinations(splits, 2):
            # Licences and the like are in many files.
            assert len(a & b) < 0.02 * min(len(a), len(b))
    text = workloads.load_text(64)
    for split in jax.device_get(text):
        np.testing.assert_array_equal(split.images[:, 1:], split.labels[:, :-1])
    images = workloads.load_mnist1d()
    assert [len(split.labels) for split in images] == [4000, 1000, 5000]


class FakeTrainer:
    """Trains nothing, counts its runs, and is interrupted before some call."""

    calls: Iterator[int]
    ran: list[Any]
    interrupted_at: int | None

    def __init__(self, *_: Any) -> None:
        """Accept a workload and a factory."""

    def train(self, runs: list[Any]) -> list[dict[str, Any]]:
        if next(self.calls) == self.interrupted_at:
            raise KeyboardInterrupt
        self.ran.extend(runs)
        return [
            {"validation": abs(run.setting.rate - 1e-2), "test": 1 + 1e-3 * run.seed}
            | {"accuracy": 50.0, "step_ms": 1.0, "bytes": 8.0}
            for run in runs
        ]


@pytest.fixture
def study_script(load_module, monkeypatch, tmp_path) -> Callable[..., Any]:
    """Return a function that runs the script with a trainer that trains nothing."""
    script = load_module("study")
    monkeypatch.setattr(script, "Trainer", FakeTrainer)
    monkeypatch.setattr(script, "definition", lambda workload: f"of {workload.steps} steps")
    monkeypatch.setattr(script.report, "publish", lambda study, *_: None)

    def run(*arguments: str, interrupted_at: int | None = None) -> list[Any]:
        FakeTrainer.calls, FakeTrainer.ran = itertools.count(), []
        FakeTrainer.interrupted_at = interrupted_at
        options = ["--smoke", f"--out={tmp_path}", *arguments]
        if interrupted_at is None:
            script.main(options)
        else:
            with pytest.raises(SystemExit, match="The same command continues"):
                script.main(options)
        return FakeTrainer.ran

    return run


def test_a_rerun_repeats_nothing(study_script, tmp_path):
    # Two contenders with eight searches at two workloads; three with eight seeds at three.
    total = 2 * 2 * 8 * 2 + 3 * 3 * 8
    path = tmp_path / "study.jsonl"
    first = study_script(interrupted_at=4)
    assert 0 < len(first) == len(path.read_text().splitlines()) < total
    # The power failed while a line was written.
    path.write_text(path.read_text() + '{"workload": "ml')
    second = study_script()
    assert len(first) + len(second) == len({*first, *second}) == total
    assert study_script() == []
    lines = path.read_text().splitlines()
    assert len(lines) == total + 1
    kept = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(kept) == total
    assert all({"environment", "definition", "rate", "seed"} <= x.keys() for x in kept)
    # Runs of other data do not count.
    path.write_text(path.read_text().replace("of 5 steps", "of 4 steps"))
    assert {run.workload for run in study_script()} == {"mlp", "text"}


def test_settings_are_chosen_before_they_are_used(study_script):
    with pytest.raises(SystemExit, match="AdamW at mlp, whose trials are missing"):
        study_script("--workloads", "mlp-4x")


def test_smoke_does_not_replace_results(load_module, capsys):
    with pytest.raises(SystemExit):
        load_module("study").main(["--smoke"])
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seen", "explained", "verdict"),
    [
        ([-1, -1, 0], False, "HOLDS"),
        ([-1, -1, 0], True, "PARTLY"),
        ([-1, 0, 0], False, "PARTLY"),
        ([1, 0, 0], False, "PARTLY_OPPOSITE"),
        ([0, 0, 0], False, "NOT_SEEN"),
        ([-1, -1, 1], False, "NOT_SEEN"),
        ([1, 1, 0], False, "OPPOSITE"),
        ([1, 1, -1], False, "NOT_SEEN"),
    ],
)
def test_verdicts(load_module, seen, explained, verdict):
    judge = load_module("_study_report").judge
    assert judge(seen, explained) == load_module("_verdicts").Verdict[verdict]
