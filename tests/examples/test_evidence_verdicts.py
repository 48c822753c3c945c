"""The verdicts of the evidence's scripts, for made-up numbers that leave no doubt."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

HOLDS, UNTUNED = "holds", "holds only against an untuned baseline"
NOT_SEEN, REFUTED = "not seen at this scale", "does not hold"
OPPOSITE = "the opposite was seen"
REVERSED = "holds against an untuned baseline, reversed against a tuned one"
# Of eight seeds, which differ by a little.
SEEDS = np.linspace(-0.01, 0.01, 8)


def verdicts(findings: Any) -> list[str]:
    return [str(finding.verdict) for finding in findings]


BETTER, WORSE, UNCLEAR = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)


@pytest.mark.parametrize(
    ("gains", "untuned", "verdict"),
    [
        ([BETTER, BETTER], [], HOLDS),
        ([BETTER], [WORSE], HOLDS),
        ([BETTER, UNCLEAR], [], NOT_SEEN),
        ([BETTER, WORSE], [], NOT_SEEN),
        ([UNCLEAR], [BETTER], UNTUNED),
        ([WORSE], [BETTER, BETTER], REVERSED),
        ([UNCLEAR], [BETTER, UNCLEAR], NOT_SEEN),
        ([WORSE, WORSE], [], OPPOSITE),
        ([WORSE, WORSE], [UNCLEAR], OPPOSITE),
        ([WORSE, UNCLEAR], [WORSE], NOT_SEEN),
        # The intervals of a single seed are NaN, those of equal seeds are 0.
        ([(np.nan, np.nan)], [], NOT_SEEN),
        ([(0.0, 0.0)], [(0.0, 0.0)], NOT_SEEN),
    ],
)
def test_judge(load_module, gains, untuned, verdict):
    estimate = load_module("_estimates").Estimate
    of_tuned, of_untuned = (
        [estimate((low + high) / 2, low, high) for low, high in ends] for ends in (gains, untuned)
    )
    assert str(load_module("_verdicts").judge(of_tuned, of_untuned)) == verdict


# A plain average as noisy as the code's lags 6.7 steps, Adam's 9. The paper's lags more
# than Adam's here, and less than a plain average as noisy, 12.2.
@pytest.mark.parametrize(("lag", "verdict"), [(6.5, HOLDS), (8.0, REVERSED), (9.5, OPPOSITE)])
def test_lag(load_module, lag, verdict):
    script = load_module("lag")
    lags = dict.fromkeys(script.AVERAGES, 0.0) | {script.PLAIN: 9.0, script.CODE: lag}
    lags[script.PAPER] = 10.0
    measured = {name: script.Responses(None, np.array([x]), None) for name, x in lags.items()}
    assert verdicts(script.judge(measured)) == [OPPOSITE, HOLDS, verdict, HOLDS]


@pytest.mark.parametrize(("p", "verdict"), [(1.5, HOLDS), (1.0, NOT_SEEN), (0.4, OPPOSITE)])
def test_escapes(load_module, p, verdict):
    script = load_module("escapes")
    powers = {"SGD": 1.0, "Adam": 0.5, "InvAdam": p}
    times = np.ones((len(script.CURVATURES), len(SEEDS)))
    escapes = {
        name: script.Escape(times, None, None, power + SEEDS) for name, power in powers.items()
    }
    assert verdicts([script.judge(escapes)]) == [verdict]


@pytest.mark.parametrize(
    ("sharpness", "accuracy", "warmed_up", "expected"),
    [
        (0.5, 98, (1.0, 97), (HOLDS, HOLDS, HOLDS)),
        # As flat and as good as the control, flatter and better than plain Adam.
        (0.5, 98, (0.5, 98), (UNTUNED, UNTUNED, UNTUNED)),
        (0.5, 96, (1.0, 97), (NOT_SEEN, HOLDS, OPPOSITE)),
        (2.0, 96, (1.0, 97), (OPPOSITE, OPPOSITE, OPPOSITE)),
    ],
)
@pytest.mark.parametrize("active", [False, True])
def test_flat_minima(load_module, active, sharpness, accuracy, warmed_up, expected):
    script, digits = load_module("flat_minima"), load_module("_digits")

    def judged(sharpness: float, accuracy: float) -> Any:
        both = [accuracy + SEEDS] * 2  # tuned and at the untuned rate
        runs = digits.Runs(None, None, None, None, None, np.array(both))
        return script.Judged(1e-3, runs, None, runs, np.array([sharpness + SEEDS] * 2), 0.001)

    trained = {name: judged(1.0, 97) for name in script.TRAINING}
    for name in script.ACTIVE if active else script.PLAIN:
        # Seeds alike, as they are where both do the same.
        trained[name] = judged(sharpness, accuracy)
        trained[script.TRAINING[name].control] = judged(*warmed_up)
    plain, *parts = verdicts(script.judge(trained))
    assert (tuple(parts) if active else plain) == (expected[1:] if active else expected[0])


def test_inverse_term_grows_with_the_square_of_the_loss(load_module):
    script = load_module("flat_minima")
    contender = script.TRAINING["DualAdam 100, loss × 30"]
    plain = script.TRAINING["DualAdam 100"]
    # One step, so that both terms have the same gradients up to the factor of 30.
    shares = [script.inverse_share(x, 1e-3, 1) for x in (plain, contender)]
    odds = [x / (1 - x) for x in shares]
    assert odds[1] == pytest.approx(900 * odds[0], rel=1e-2)
    assert np.isnan(script.inverse_share(script.TRAINING["Adam"], 1e-3, 1))


def plain_depth(script: ModuleType, digits: ModuleType, **changes: tuple[int, float]) -> Any:
    """Contenders that train at so many of the rates, and their accuracy there."""

    def judged(rates: int, accuracy: float) -> Any:
        succeeded = np.arange(len(script.RATES))[:, None] < rates
        trained = np.where(succeeded, 100.0, 10.0) + 0 * SEEDS
        reached = np.where(succeeded, accuracy, 10.0) + SEEDS
        runs = digits.Runs(None, None, None, None, trained, reached)
        return script.Judged(runs, np.zeros(len(SEEDS), int))

    return {6: {name: judged(*changes.get(name, (3, 80.0))) for name in script.CONTENDERS}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [NOT_SEEN, NOT_SEEN]),
        ({"NOVAK": (5, 80.0), "effective decay": (5, 80.0)}, [HOLDS, NOT_SEEN]),
        # At the untuned rate, the fourth, NOVAK trains, and not with effective decay.
        ({"NOVAK": (5, 80.0)}, [HOLDS, UNTUNED]),
        # There NOVAK trains and AdamW does not, and RAdam explains it.
        ({"NOVAK": (5, 80.0), "RAdam": (5, 80.0)}, [UNTUNED, UNTUNED]),
        ({"NOVAK": (3, 80.0), "RAdam": (5, 80.0)}, [NOT_SEEN, NOT_SEEN]),
        ({"NOVAK": (2, 80.0)}, [OPPOSITE, NOT_SEEN]),
        ({"effective decay": (3, 70.0)}, [NOT_SEEN, HOLDS]),
        ({"effective decay": (3, 90.0)}, [NOT_SEEN, OPPOSITE]),
    ],
)
def test_plain_depth(load_module, changes, expected):
    script, digits = load_module("plain_depth"), load_module("_digits")
    assert verdicts(script.judge(plain_depth(script, digits, **changes))) == expected


def test_parts_of_novak(load_module):
    script, digits = load_module("plain_depth"), load_module("_digits")
    changes = {"no lookahead": (3, 90.0), "Nesterov: nadam": (3, 70.0)}
    _, parts = script.judge(plain_depth(script, digits, **changes))
    assert "better in both ways: no lookahead; worse: Nesterov: nadam." in parts.shown


# Test losses of the additive formula, as written or as it ran, and of its control, tuned and not;
# Adam's are 0.2 and 0.3.
@pytest.mark.parametrize(
    ("tuned", "untuned", "verdict"),
    [
        ((0.1, 0.2), (0.3, 0.3), HOLDS),
        ((0.1, 0.1), (0.1, 0.1), UNTUNED),
        ((0.2, 0.2), (0.3, 0.3), NOT_SEEN),
        ((0.3, 0.2), (0.4, 0.3), OPPOSITE),
        ((0.3, 0.3), (0.4, 0.4), NOT_SEEN),
    ],
)
@pytest.mark.parametrize("how", ["as written", "as it ran", "by module"])
def test_connections(load_module, how, tuned, untuned, verdict):
    script, digits = load_module("connections"), load_module("_digits")

    def runs(tuned: float, untuned: float) -> Any:
        noise = 0.1 * SEEDS
        losses = np.array([tuned + noise, untuned - noise])
        return digits.Runs(None, None, None, losses, None, losses)

    adam = runs(0.2, 0.3)
    judged = {name: script.Judged(1e-3, 1.0, None, adam, adam) for name in script.make_contenders()}
    mine, control = zip(tuned, untuned, strict=True)
    for name in judged:
        if name.startswith(f"additive, {how}"):
            judged[name] = script.Judged(1e-3, 1.0, None, runs(*mine), runs(*control))
    # Only the formula as written decides about the formula.
    ran = verdict if how == "as it ran" else NOT_SEEN
    written = verdict if how == "as written" else NOT_SEEN
    assert verdicts(script.judge(judged)) == [ran, NOT_SEEN, written, NOT_SEEN, NOT_SEEN]


# Logarithms of losses: VRAdam's at the untuned setting and at its best; AdamW's are -2 and -3.
@pytest.mark.parametrize(
    ("untuned", "best", "verdict"),
    [
        (-1, -4, HOLDS),
        (-3, -3, UNTUNED),
        (-2, -3, NOT_SEEN),
        (-1, -2, OPPOSITE),
    ],
)
def test_losses_of_vradam(load_module, untuned, best, verdict):
    script = load_module("curvature_and_loss")
    settings = script.SETTINGS | {
        script.BEST_ADAMW: script.Setting(0.01),
        script.BEST_VRADAM: script.Setting(0.02, script.Gate(50.0)),
    }
    losses = dict.fromkeys(settings, -2 + SEEDS) | {
        script.BEST_ADAMW: -3 + SEEDS,
        script.AT_DEFAULTS: untuned + SEEDS[::-1],
        script.BEST_VRADAM: best + SEEDS[::-1],
    }
    tuned, figure, cifar = verdicts(script.judge_losses(losses, settings))
    # The settings that are as good as the untuned AdamW are worse than the tuned one.
    assert (tuned, figure, cifar) == (verdict, OPPOSITE, OPPOSITE)


# Logarithms of the curvatures of H and of P^-1 H at one rate, where Adam's are 1 and 4.
@pytest.mark.parametrize(
    ("of_h", "of_both", "verdict"),
    [(0, 3, HOLDS), (1, 3, NOT_SEEN), (2, 3, NOT_SEEN), (2, 5, OPPOSITE)],
)
def test_curvature_of_vradam(load_module, of_h, of_both, verdict):
    script, estimates = load_module("curvature_and_loss"), load_module("_estimates")

    def curvatures(of_h: float, of_both: float) -> Any:
        same = {script.OF_OWN_EDGE: 0.5 + SEEDS}
        return same | {script.OF_H: of_h + SEEDS, script.OF_BOTH: of_both + SEEDS}

    found = dict.fromkeys((script.FIGURE_ADAM, script.SAME_RATE), curvatures(1, 4))
    found[script.FIGURE] = curvatures(of_h, of_both)
    at_one_loss = {script.OF_H: estimates.exact(7.0), script.OF_BOTH: estimates.exact(8.0)}
    finding = script.judge_curvature(found, at_one_loss)
    assert verdicts([finding]) == [verdict]
    assert "equal: +7.00 [+7.00, +7.00] of H, +8.00" in finding.shown


# Differences of the mean loss, where the spread of seeds is .006, and the differences of seeds in
# spreads.
@pytest.mark.parametrize(
    ("difference", "noise", "verdict"),
    [
        (0.002, 0.0, HOLDS),
        (0.002, 1.0, NOT_SEEN),
        (0.004, 1.0, NOT_SEEN),
        (0.02, 1.0, REFUTED),
        (-0.004, 0.0, REFUTED),
        (np.nan, 0.0, REFUTED),
    ],
)
def test_low_precision_training(load_module, difference, noise, verdict):
    script = load_module("low_precision_training")

    def judged(difference: float, noise: float = 0.0) -> Any:
        exact = script.Runs(None, 1 + SEEDS)
        stored = script.Runs(None, 1 + SEEDS + noise * SEEDS[::-1] + difference)
        return script.row(script.Judged(exact, stored, 8.0, 2.0))

    rows = {task: dict.fromkeys(script.CONTENDERS, judged(0.0)) for task in script.TASKS}
    # Controls don't decide.
    rows["convnet"] |= {"NOVAK": judged(difference, noise), "control: NOVAK": judged(1.0)}
    assert verdicts([script.judge(rows)]) == [verdict]


# Losses at the end on two landscapes and on the third, where AdamW's are 1e-2.
@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((1e-3, 1e-3), HOLDS),
        ((1e-2, 1e-2), NOT_SEEN),
        ((1e-1, 1e-1), OPPOSITE),
        ((1e-2, 1e-1), OPPOSITE),
        ((1e-3, 1e-1), HOLDS),
    ],
)
def test_landscapes(load_module, losses, verdict):
    script = load_module("landscapes")

    def outcomes(loss: float, last: float) -> Any:
        *names, last_name = script.LANDSCAPES
        at = dict.fromkeys(names, loss) | {last_name: last}
        return {
            name: script.Outcome(1.0, False, False, x * (1 + SEEDS), None) for name, x in at.items()
        }

    judged = {method: outcomes(1e-2, 1e-2) for method in script.METHODS}
    judged["fame"] = outcomes(*losses)
    assert verdicts(script.judge(judged)) == [verdict, *[NOT_SEEN] * 4]
