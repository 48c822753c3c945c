"""VRAdam: does it train at a lower curvature or to a lower loss than Adam?

    python examples/evidence/curvature_and_loss.py

A small network is trained on all of its images at once, on the squared error. AdamW and VRAdam are
tuned by the same number of trials, on other seeds than they are judged by. The untuned baseline is
AdamW at the default rate. VRAdam runs at its defaults, at the setting that its authors published
for CIFAR-10 (rate .0846, cutoff 29, beta3 1.015), and as in their figure of the edge of stability.
No optimizer decays weights.

That figure compares VRAdam at rate .002, with cutoff 19 and the gradient's norm in the gate, with
Adam at rate .001. For VRAdam it shows the largest eigenvalue of the Hessian H, for Adam that of the
preconditioned Hessian P^-1 H. This script repeats that comparison, and makes it again with one rate
and one measure for both: over the second half of the steps, and where both first have the loss at
which the slower one ends. P divides Adam's momentum. Adam is stable while the largest eigenvalue of
P^-1 H is below 38 / its rate, its edge (Cohen et al. 2022, arXiv 2207.14484).

In a larger network the same beta3 closes the gate further, because the norm is a sum over all
parameters. The authors' code takes one norm for each group of parameters, which is
`optax.partition` with one `vradam` for each. Their sweeps searched the rate, beta3, the cutoff and
the measure of the gate for VRAdam, and only the rate for Adam. Their baseline is torch's Adam with
an L2 decay of 1e-5, where the paper says AdamW.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _command_line as command_line
import _estimates as estimates
import _full_batch as full_batch
import _results as results
import _verdicts as verdicts
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, draw_estimates, entitle, tidy
from _estimates import Estimate, signed
from _full_batch import FIRST_SEED, LOSS, OF_ADAM, OF_OWN_EDGE, Gate, Run, Setting, Train, thin
from _progress import two_at_a_time
from _verdicts import Finding

# VRAdam's default, and two values at which the gate closes in this network.
DEFAULT = 1.0
STRENGTHS = (DEFAULT, 50.0, 3000.0)
LOWEST_RATE, HIGHEST_RATE = 2e-3, 0.3
# The rate of those who do not tune: the default of both.
UNTUNED = 1e-3
FIRST_SEARCH_SEED = 1000
# Columns of the tables.
OF_H, OF_BOTH = "log10 of H's", "log10 of P^-1 H's"
FROM_UNTUNED, FROM_TUNED = f"from AdamW at {UNTUNED}", "from AdamW at its best"
# The two settings of the authors' figure of the edge, and AdamW at the gated one's rate.
FIGURE_ADAM, SAME_RATE = f"AdamW, rate {UNTUNED}", "AdamW, rate 0.002"
FIGURE = "VRAdam, rate 0.002, gradient's norm"
AT_DEFAULTS, CIFAR = f"VRAdam, rate {UNTUNED}", "VRAdam, setting for CIFAR-10"
BEST_ADAMW, BEST_VRADAM = "AdamW, best trial", "VRAdam, best trial"
SETTINGS = {
    FIGURE_ADAM: Setting(UNTUNED),
    SAME_RATE: Setting(2e-3),
    FIGURE: Setting(2e-3, Gate(1.0, 19.0, "gradient")),
    AT_DEFAULTS: Setting(UNTUNED, Gate(DEFAULT)),
    CIFAR: Setting(0.0846, Gate(1.015, 29.0)),
}
CONSTANTS = full_batch.CONSTANTS | {
    "STRENGTHS": STRENGTHS,
    "LOWEST_RATE": LOWEST_RATE,
    "HIGHEST_RATE": HIGHEST_RATE,
    "UNTUNED": UNTUNED,
    "SETTINGS": [
        [rate, *(gate[:2] if gate else (0, 0)), bool(gate and gate.norm_of == "gradient")]
        for rate, gate in SETTINGS.values()
    ],
    "FIRST_SEARCH_SEED": FIRST_SEARCH_SEED,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = full_batch.parse(make_parser(), argv)
    runs, settings = compare(full_batch.trainer(full_batch.squared_error, options), options)
    losses = {name: np.array([run.late_loss for run in x]) for name, x in runs.items()}
    curvatures = {name: curvatures_of(runs[name]) for name in (FIGURE_ADAM, SAME_RATE, FIGURE)}
    at_one_loss = where_losses_are_equal(runs[FIGURE], runs[SAME_RATE])
    tables = {
        "Curvature, as in the authors' figure and at one rate": {
            name: {key: estimates.mean(x) for key, x in found.items()}
            for name, found in curvatures.items()
        },
        f"Loss at published settings, and at the best of {len(STRENGTHS) * options.rates} trials": {
            name: row_of_loss(settings[name], losses, name) for name in losses
        },
    }
    findings = [judge_curvature(curvatures, at_one_loss), *judge_losses(losses, settings)]
    figures = {"curvature_and_loss": draw(curvatures, at_one_loss, losses)}
    results.publish("curvature_and_loss", options, findings, tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        **full_batch.SIZES,
        trials=(10, "other seeds, on which each rate is tried"),
        rates=(
            6,
            f"rates that VRAdam tries with {len(STRENGTHS)} strengths; AdamW tries thrice as"
            " many rates",
        ),
    )


def compare(
    train: Train, options: argparse.Namespace
) -> tuple[dict[str, list[Run]], dict[str, Setting]]:
    """Return the runs at the published settings and at the best trials, and all settings."""
    settings = SETTINGS | tune(train, options)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def run(setting: Setting) -> list[Run]:
        # Only the authors' figure is about curvatures.
        measured = setting in (SETTINGS[FIGURE_ADAM], SETTINGS[SAME_RATE], SETTINGS[FIGURE])
        return [train(seed, *setting, measured=measured) for seed in seeds]

    return two_at_a_time(run, settings), settings


def tune(train: Train, options: argparse.Namespace) -> dict[str, Setting]:
    """Return the best trial of AdamW and of VRAdam, by seeds that judge nothing."""
    seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + options.trials)

    def late_loss(setting: Setting) -> float:
        runs = (train(seed, *setting, measured=False) for seed in seeds)
        return float(np.mean([run.late_loss for run in runs]))

    trials = {
        BEST_ADAMW: [Setting(x) for x in grid(len(STRENGTHS) * options.rates)],
        BEST_VRADAM: [Setting(x, Gate(beta3)) for beta3 in STRENGTHS for x in grid(options.rates)],
    }
    best = {}
    for name, settings in trials.items():
        numbered = {f"{name}, {i}": setting for i, setting in enumerate(settings)}
        losses = list(two_at_a_time(late_loss, numbered).values())
        best[name] = settings[int(np.nanargmin(losses))]
    return best


def grid(rates: int) -> list[float]:
    return np.geomspace(LOWEST_RATE, HIGHEST_RATE, rates).tolist()


def curvatures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the medians over the second half, for each seed; those of loss are logarithms."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_own = [run.preconditioned * thin(run.rate) / OF_ADAM for run in runs]
    return {
        "mean rate": [float(run.rate.mean()) for run in runs],
        OF_H: np.array([np.log10(np.median(run.sharpness[late])) for run in runs]),
        OF_BOTH: np.array([np.log10(np.median(run.preconditioned[late])) for run in runs]),
        OF_OWN_EDGE: [float(np.median(x[late])) for x in of_own],
        LOSS: [run.late_loss for run in runs],
    }


def where_losses_are_equal(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, Estimate]:
    """Return differences of the curvatures' logarithms where both runs of a seed first have a loss.

    It is the loss at which the slower of both ends.
    """
    pairs = []
    for both in zip(runs, others, strict=True):
        level = max(thin(run.loss)[-1] for run in both)
        pairs.append([curvatures_at(run, level) for run in both])
    found, of_others = np.log10(pairs).transpose(1, 2, 0)
    return {
        measure: estimates.mean(x - y)
        for measure, x, y in zip((OF_H, OF_BOTH), found, of_others, strict=True)
    }


def curvatures_at(run: Run, loss: float) -> tuple[float, float]:
    """Return the curvatures of H and of P^-1 H where the mean loss of 50 steps is first so low."""
    first = np.argmax(thin(run.loss) <= loss)
    return run.sharpness[first], run.preconditioned[first]


def row_of_loss(setting: Setting, losses: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the row of one setting; differences are paired, seed by seed."""
    return {
        "rate": in_words(setting.rate) if "best" in name else f"{setting.rate:g}",
        "beta3": f"{setting.gate.beta3:g}" if setting.gate else "-",
        LOSS: estimates.mean(losses[name]),
        FROM_UNTUNED: estimates.mean(losses[name] - losses[FIGURE_ADAM]),
        FROM_TUNED: estimates.mean(losses[name] - losses[BEST_ADAMW]),
    }


def in_words(rate: float) -> str:
    at_edge = np.isclose(rate, (LOWEST_RATE, HIGHEST_RATE)).any()
    return f"{rate:.2g}{' (the last tried)' if at_edge else ''}"


def judge_curvature(
    curvatures: Mapping[str, Mapping[str, Any]], at_one_loss: Mapping[str, Estimate]
) -> Finding:
    as_shown, fair = compare_curvatures(curvatures)
    seen = curvatures[SAME_RATE][OF_OWN_EDGE], curvatures[FIGURE][OF_OWN_EDGE]
    at = [f"{estimates.mean(x).mean:.2g}" for x in seen]
    return Finding(
        "VRAdam: it trains at a lower curvature than Adam",
        # The untuned comparison is of two measures, so it decides nothing.
        verdicts.judge([-x for x in fair.values()]),
        f"Difference from Adam in decades. As in the authors' figure, VRAdam's H at rate .002"
        f" and Adam's P^-1 H at .001: {signed(as_shown, 2)}. Both at .002: {in_both(fair)}."
        f" Where their losses are equal: {in_both(at_one_loss)}. Neither is near its edge at"
        f" .002: Adam at {at[0]} of it, VRAdam at {at[1]}."
        f" {estimates.sensitivity(fair[OF_H], ' decades', 2)}",
        untuned=f"curvature {signed(as_shown, 2)} decades, with two measures",
        tuned=f"curvature {in_both(fair, ' decades')}",
    )


def in_both(differences: Mapping[str, Estimate], unit: str = "") -> str:
    of_h, of_both = (signed(differences[name], 2) for name in (OF_H, OF_BOTH))
    return f"{of_h}{unit} of H, {of_both} of P^-1 H"


def compare_curvatures(
    curvatures: Mapping[str, Mapping[str, Any]],
) -> tuple[Estimate, dict[str, Estimate]]:
    """Return VRAdam's difference from Adam as the authors show it, and at one rate by measure."""
    gated = curvatures[FIGURE]
    as_shown = estimates.mean(gated[OF_H] - curvatures[FIGURE_ADAM][OF_BOTH])
    fair = {x: estimates.mean(gated[x] - curvatures[SAME_RATE][x]) for x in (OF_H, OF_BOTH)}
    return as_shown, fair


def judge_losses(losses: Mapping[str, Any], settings: Mapping[str, Setting]) -> list[Finding]:
    """Judge VRAdam tuned, and at two settings of its authors."""

    def finding(claim: str, untuned: str, tuned: str) -> Finding:
        """Judge one setting of VRAdam against untuned AdamW, and one against tuned AdamW."""
        from_untuned = estimates.mean(losses[untuned] - losses[FIGURE_ADAM])
        from_tuned = estimates.mean(losses[tuned] - losses[BEST_ADAMW])
        extra = ""
        if untuned == FIGURE:
            at_one = estimates.mean(losses[FIGURE] - losses[SAME_RATE])
            extra = f" From AdamW at the same rate: {signed(at_one, 2)}."
        if tuned == BEST_VRADAM:
            found = settings[BEST_VRADAM]
            beta3 = found.gate.beta3 if found.gate else 0.0
            extra = f" VRAdam's best trial is rate {in_words(found.rate)} with beta3 {beta3:g}."
        return Finding(
            claim,
            verdicts.judge([-from_tuned], [-from_untuned]),
            f"Difference in decades of the loss: {signed(from_untuned, 2)} from AdamW at rate"
            f" {UNTUNED}; {signed(from_tuned, 2)} from AdamW at its best rate,"
            f" {in_words(settings[BEST_ADAMW].rate)}.{extra}"
            f" {estimates.sensitivity(from_tuned, ' decades', 2)}",
            untuned=f"loss {signed(from_untuned, 2)} decades",
            tuned=f"loss {signed(from_tuned, 2)} decades",
        )

    claim = "VRAdam: it trains to a lower loss than AdamW"
    return [
        finding(claim, AT_DEFAULTS, BEST_VRADAM),
        finding(f"{claim}, at twice Adam's rate as in the authors' figure", FIGURE, FIGURE),
        finding(f"{claim}, at the authors' setting for CIFAR-10", CIFAR, CIFAR),
    ]


def draw(
    curvatures: Mapping[str, Mapping[str, Any]],
    at_one_loss: Mapping[str, Estimate],
    losses: Mapping[str, Any],
) -> Figure:
    """Draw the differences from AdamW that decide."""
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curvature_differences(left, curvatures, at_one_loss)
    draw_loss_differences(right, losses)
    return figure


def draw_curvature_differences(
    axes: Axes,
    curvatures: Mapping[str, Mapping[str, Any]],
    at_one_loss: Mapping[str, Estimate],
) -> None:
    as_shown, fair = compare_curvatures(curvatures)
    labels = [
        "as in the authors' figure:\nVRAdam's H, Adam's $P^{-1} H$",
        "at one rate: both H",
        "both $P^{-1} H$",
        "and at one loss: both H",
        "both $P^{-1} H$",
    ]
    alike = [*fair.values(), *at_one_loss.values()]
    axes.axvline(0, color="0.6", linewidth=1)
    draw_estimates(axes, [0], [as_shown], across=True, color=ORANGE)
    draw_estimates(
        axes, range(1, 5), alike, across=True, color=BLUE, linestyle="", fillstyle="none"
    )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    tidy(axes, grid="x")
    entitle(axes, "curvature: VRAdam's difference from Adam", "decades (left is lower)", "")


def draw_loss_differences(axes: Axes, losses: Mapping[str, Any]) -> None:
    rows = {
        "both tuned, or\nboth at the default rate": (AT_DEFAULTS, BEST_VRADAM),
        "as in the authors' figure": (FIGURE, FIGURE),
        "setting for CIFAR-10": (CIFAR, CIFAR),
    }
    axes.axvline(0, color="0.6", linewidth=1)
    kinds = (
        (FIGURE_ADAM, ORANGE, "full", f"from AdamW at {UNTUNED}"),
        (BEST_ADAMW, BLUE, "none", "from AdamW at its best"),
    )
    for which, (baseline, colour, fill, label) in enumerate(kinds):
        found = [estimates.mean(losses[x[which]] - losses[baseline]) for x in rows.values()]
        places = np.arange(len(rows)) + 0.3 * (which - 0.5)
        look = {"color": colour, "fillstyle": fill, "linestyle": "", "label": label}
        draw_estimates(axes, places, found, across=True, **look)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, grid="x")
    entitle(axes, "loss: VRAdam's difference from AdamW", "decades (left is lower)", "")
    below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.2), "ncols": 1}
    axes.legend(fontsize=8, frameon=False, **below)


if __name__ == "__main__":
    main()
