"""The verdicts of the evidence's scripts, for made-up numbers that leave no doubt."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

HOLDS, UNTUNED = "holds", "holds only against an untuned baseline"
NOT_SEEN, REFUTED = "not seen at this scale", "does not hold"
# Of eight seeds, which differ by a little.
SEEDS = np.linspace(-0.01, 0.01, 8)


def verdicts(findings: Any) -> list[str]:
    return [str(finding.verdict) for finding in findings]


# A plain average as noisy as the code's lags 6.7 steps, Adam's 9.
@pytest.mark.parametrize(("lag", "verdict"), [(6.5, HOLDS), (8.0, UNTUNED), (9.5, REFUTED)])
def test_lag(load_module, lag, verdict):
    script = load_module("lag")
    lags = dict.fromkeys(script.AVERAGES, 0.0) | {script.PLAIN: 9.0, script.CODE: lag}
    measured = {name: script.Responses(None, np.array([x]), None) for name, x in lags.items()}
    assert verdicts(script.judge(measured)) == [HOLDS, verdict, HOLDS]


@pytest.mark.parametrize(("p", "verdict"), [(1.5, HOLDS), (1.0, NOT_SEEN), (0.4, NOT_SEEN)])
def test_escapes(load_module, p, verdict):
    script = load_module("escapes")
    powers = {"SGD": 1.0, "Adam": 0.5, "InvAdam": p}
    times = np.ones((len(script.CURVATURES), len(SEEDS)))
    escapes = {
        name: script.Escape(times, None, None, power + SEEDS) for name, power in powers.items()
    }
    assert verdicts([script.judge(escapes)]) == [verdict]


@pytest.mark.parametrize(
    ("sharpness", "accuracy", "warmed_up", "verdict"),
    [
        (0.5, 98, (1.0, 97), HOLDS),
        # As flat and as good as the control, flatter and better than plain Adam.
        (0.5, 98, (0.5, 98), UNTUNED),
        (0.5, 96, (1.0, 97), NOT_SEEN),
        (2.0, 98, (1.0, 97), NOT_SEEN),
    ],
)
def test_flat_minima(load_module, sharpness, accuracy, warmed_up, verdict):
    script, digits = load_module("flat_minima"), load_module("_evidence")

    def judged(sharpness: float, accuracy: float) -> Any:
        runs = digits.Runs(None, 0.1 + SEEDS, None, None, None, accuracy + SEEDS)
        return script.Judged(1e-3, runs, runs, sharpness + SEEDS, None)

    trained = {name: judged(1.0, 97) for name in script.TRAINING}
    for name in trained:
        if name.startswith("DualAdam"):
            # Seeds alike, as they are where both do the same.
            trained[name] = judged(sharpness, accuracy)
            trained[script.TRAINING[name].control] = judged(*warmed_up)
    assert verdicts([script.judge(trained)]) == [verdict]


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
        ({"NOVAK": (5, 80.0)}, [HOLDS, NOT_SEEN]),
        ({"NOVAK": (5, 80.0), "RAdam": (5, 80.0)}, [NOT_SEEN, NOT_SEEN]),
        ({"effective decay": (3, 70.0)}, [NOT_SEEN, HOLDS]),
        ({"effective decay": (3, 90.0)}, [NOT_SEEN, NOT_SEEN]),
    ],
)
def test_plain_depth(load_module, changes, expected):
    script, digits = load_module("plain_depth"), load_module("_evidence")
    assert verdicts(script.judge(plain_depth(script, digits, **changes))) == expected


def test_parts_of_novak(load_module):
    script, digits = load_module("plain_depth"), load_module("_evidence")
    changes = {"no lookahead": (3, 90.0), "Nesterov: nadam": (3, 70.0)}
    _, parts = script.judge(plain_depth(script, digits, **changes))
    assert "better in both ways: no lookahead; worse: Nesterov: nadam." in parts.shown


# Test losses of the additive formula as written, and of its control, tuned and not; Adam's are 0.2
# and 0.3.
@pytest.mark.parametrize(
    ("tuned", "untuned", "verdict"),
    [
        ((0.1, 0.2), (0.3, 0.3), HOLDS),
        ((0.1, 0.1), (0.1, 0.1), UNTUNED),
        ((0.2, 0.2), (0.3, 0.3), NOT_SEEN),
        ((0.3, 0.2), (0.4, 0.3), NOT_SEEN),
    ],
)
@pytest.mark.parametrize("how", ["as written", "as it ran"])
def test_connections(load_module, how, tuned, untuned, verdict):
    script, digits = load_module("connections"), load_module("_evidence")

    def runs(tuned: float, untuned: float) -> Any:
        noise = 0.1 * SEEDS
        losses = np.array([tuned + noise, untuned - noise])
        return digits.Runs(None, None, None, losses, None, losses)

    adam = runs(0.2, 0.3)
    judged = {name: script.Judged(1e-3, 1.0, None, adam, adam) for name in script.make_contenders()}
    mine, control = zip(tuned, untuned, strict=True)
    judged[f"additive, {how}"] = script.Judged(1e-3, 1.0, None, runs(*mine), runs(*control))
    # What ran for the additive formula was another rate, whatever became of it.
    expected = verdict if how == "as written" else NOT_SEEN
    assert verdicts(script.judge(judged)) == [expected, NOT_SEEN, NOT_SEEN]


# Differences of the mean loss, where the spread of seeds is .006.
@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.002, HOLDS), (-0.004, REFUTED), (np.nan, REFUTED)]
)
def test_low_precision_training(load_module, difference, verdict):
    script = load_module("low_precision_training")

    def judged(difference: float) -> Any:
        exact = script.Runs(None, 1 + SEEDS)
        stored = script.Runs(None, 1 + SEEDS[::-1] + difference)
        return script.row(script.Judged(exact, stored, 8.0, 2.0))

    rows = {task: dict.fromkeys(script.CONTENDERS, judged(0.0)) for task in script.TASKS}
    # Controls don't decide.
    rows["convnet"] |= {"NOVAK": judged(difference), "control: NOVAK": judged(1.0)}
    assert verdicts([script.judge(rows)]) == [verdict]


@pytest.mark.parametrize(("loss", "verdict"), [(1e-3, HOLDS), (1e-1, NOT_SEEN)])
def test_landscapes(load_module, loss, verdict):
    script = load_module("landscapes")

    def outcomes(loss: float) -> Any:
        outcome = script.Outcome(1.0, False, False, loss * (1 + SEEDS), None)
        return dict.fromkeys(script.LANDSCAPES, outcome)

    judged = {method: outcomes(1e-2 if method == "adamw" else loss) for method in script.METHODS}
    assert verdicts(script.judge(judged)) == [verdict]
