"""VRAdam: what does its gate do at the edge of stability?

    python examples/evidence/edge_of_stability.py

A small network is trained on all of its images at once. Adam's steps α with momentum b1 are stable
while the curvature that they see, the largest eigenvalue of the preconditioned Hessian P^-1 H, is
below (2 + 2 b1) / ((1 - b1) α): 38 / α at b1 = .9 (Cohen et al. 2022, arXiv 2207.14484). Training
increases the curvature up to there. VRAdam divides α by 1 + min(beta3 |u|², cutoff). No optimizer
decays weights.

Three controls copy rates of the gated run: AdamW at α, at the run's mean rate, and at the rates
that the gate made with another seed, which is the schedule without the feedback. Three more
controls have a low rate late in training: AdamW with a cosine decay from α to 0, and AdamW at a
quarter and at an eighth of α.

In the tables, a curvature is the largest eigenvalue of P^-1 H divided by the edge 38 / α, or by the
run's own edge, 38 / its rate at that time, gate and schedule included. The curvature of H is the
eigenvalue itself. A peak is the distance in decades from the median loss of 50 steps to the
largest, on average. Steps uphill are the share of steps at which the loss rises. The mean rate and
the highest curvature are of the whole training, the loss is of the last tenth, and all else is of
the second half.

The rate α, the squared error and the larger beta3 were chosen to make an edge and a gate visible.
With cross-entropy the curvature falls instead, which the tables show. The share of steps uphill was
the first measure of steadiness. Peaks were added after curves were seen, and the slow controls
after results were seen. So all results are from seeds that were not used for these choices.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _command_line as command_line
import _estimates as estimates
import _full_batch as full_batch
import _results as results
import _verdicts as verdicts
from _drawing import BLUE, FIGURE_WIDTH, GREEN, ORANGE, PINK, entitle, log_ticks, tidy
from _estimates import Estimate, signed
from _full_batch import (
    FIRST_SEED,
    LOSS,
    MEASURED_EVERY,
    OF_ADAM,
    OF_OWN_EDGE,
    Gate,
    Run,
    Train,
    thin,
)
from _progress import two_at_a_time
from _verdicts import Finding, Verdict

RATE = 0.02
# Within these shares of the edge, training is at the edge.
EDGE = 0.9, 1.1
# The largest curvature at which gradient descent with steps of 1 is stable.
OF_DESCENT = 2
# VRAdam's default, and a value at which the gate closes in this network.
DEFAULT, STRONG = 1.0, 3000.0
ADAMW, VRADAM, STRONGER = "AdamW", "VRAdam", f"VRAdam, beta3 {STRONG:.0f}"
MEAN_RATE, REPLAYED = "AdamW, mean rate", "AdamW, replayed gate"
COSINE, QUARTER, EIGHTH = "AdamW, cosine", "AdamW, α / 4", "AdamW, α / 8"
CROSS_ENTROPY = "AdamW, cross-entropy"
# Where the labels of points are, in points from them.
ABOVE: dict[str, Any] = {"xytext": (5, 4), "ha": "left", "va": "bottom"}
LABELS: dict[str, dict[str, Any]] = {
    ADAMW: {"xytext": (-5, 4), "ha": "right", "va": "bottom"},
    MEAN_RATE: {"xytext": (5, -6), "ha": "left", "va": "top"},
}
SLOW = {COSINE: "with the cosine", QUARTER: "at a quarter of α", EIGHTH: "at an eighth"}
# Columns of the tables that findings read, besides those of `_full_batch`.
OF_EDGE, HIGHEST, OF_H = "curvature / edge", "highest / edge", "curvature of H"
CURVATURES = (OF_EDGE, OF_OWN_EDGE, HIGHEST, OF_H)
MEAN_OF_RATES, UPHILL, PEAKS = "mean rate / α", "steps uphill", "peaks, decades"
STYLES: dict[str, dict[str, Any]] = {
    ADAMW: {"color": "0.2", "marker": "o"},
    VRADAM: {"color": BLUE, "marker": "o", "linestyle": "--"},
    STRONGER: {"color": ORANGE, "marker": "o"},
    MEAN_RATE: {"color": GREEN, "marker": "s"},
    REPLAYED: {"color": PINK, "marker": "s", "linestyle": "--"},
    COSINE: {"color": "0.4", "marker": "^", "linestyle": "-."},
    QUARTER: {"color": "0.4", "marker": "<", "linestyle": "none"},
    EIGHTH: {"color": "0.4", "marker": "v", "linestyle": "none"},
}
CONSTANTS = full_batch.CONSTANTS | {
    "RATE": RATE,
    "EDGE": EDGE,
    "DEFAULT": DEFAULT,
    "STRONG": STRONG,
}
# Numbers by name, each an array with an entry for each seed.
Measured = Mapping[str, np.ndarray]


class Plan(NamedTuple):
    """Planned runs: for each seed one rate, or one for each step; with a gate or without."""

    rates: Sequence[ArrayLike]
    gate: Gate | None = None
    train: Train | None = None


def main(argv: Sequence[str] | None = None) -> None:
    options = full_batch.parse(make_parser(), argv)
    runs = at_the_edge(options)
    measured = {name: measure(found) for name, found in runs.items()}
    tables = {
        f"Curvature and rate, at α = {RATE}": table(measured, MEAN_OF_RATES, *CURVATURES),
        f"Loss, at α = {RATE}": table(measured, UPHILL, PEAKS, LOSS),
    }
    figures = {
        "edge_of_stability": draw_curves(runs),
        "edge_of_stability-steadiness": draw_peaks(measured),
    }
    findings = [*judge_edges(measured), judge_steadiness(measured)]
    results.publish("edge_of_stability", options, findings, tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(__doc__, **full_batch.SIZES)


def at_the_edge(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Return a run of every contender for each seed."""
    train = full_batch.trainer(full_batch.squared_error, options)
    train_other = full_batch.trainer(cross_entropy, options)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def run(plan: Plan) -> list[Run]:
        of_one = partial(plan.train or train, gate=plan.gate)
        return [of_one(seed, rates) for seed, rates in zip(seeds, plan.rates, strict=True)]

    def alike(rates: ArrayLike, *args: Any) -> Plan:
        return Plan([rates] * len(seeds), *args)

    cosine = optax.cosine_decay_schedule(RATE, options.steps)(np.arange(options.steps))
    plans = {
        ADAMW: alike(RATE),
        VRADAM: alike(RATE, Gate(DEFAULT)),
        STRONGER: alike(RATE, Gate(STRONG)),
        COSINE: alike(cosine),
        QUARTER: alike(RATE / 4),
        EIGHTH: alike(RATE / 8),
        CROSS_ENTROPY: alike(RATE, None, train_other),
    }
    runs = two_at_a_time(run, plans)
    gated = [found.rate for found in runs[STRONGER]]
    plans = {
        MEAN_RATE: Plan([rates.mean() for rates in gated]),
        REPLAYED: Plan(gated[-1:] + gated[:-1]),
    }
    runs |= two_at_a_time(run, plans)
    return {name: runs[name] for name in (*STYLES, CROSS_ENTROPY)}


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def measure(runs: Sequence[Run]) -> Measured:
    """Return each of the table's numbers for every seed."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_edge = np.array([run.preconditioned * RATE / OF_ADAM for run in runs])
    of_own = np.array([run.preconditioned * thin(run.rate) / OF_ADAM for run in runs])
    return {
        MEAN_OF_RATES: np.array([run.rate.mean() / RATE for run in runs]),
        OF_EDGE: np.median(of_edge[:, late], axis=1),
        OF_OWN_EDGE: np.median(of_own[:, late], axis=1),
        HIGHEST: of_edge.max(axis=1),
        OF_H: np.array([np.median(run.sharpness[late]) for run in runs]),
        UPHILL: np.array([rises(run.loss) for run in runs]),
        PEAKS: np.array([peaks(run.loss)[late].mean() for run in runs]),
        LOSS: np.array([run.late_loss for run in runs]),
    }


def table(measured: Mapping[str, Measured], *columns: str) -> dict[str, dict[str, Estimate]]:
    return {
        name: {column: estimates.mean(found[column]) for column in columns}
        for name, found in measured.items()
    }


def rises(loss: Any) -> float:
    """Return the share of the second half's steps in which the loss grows."""
    return float((np.diff(loss[len(loss) // 2 :]) > 0).mean())


def peaks(loss: Any) -> Any:
    """Return the decades from the median to the worst loss between two measurements, on average."""
    parts = np.log10(loss).reshape(-1, MEASURED_EVERY)
    return parts.max(axis=1) - np.median(parts, axis=1)


def judge_edges(measured: Mapping[str, Measured]) -> list[Finding]:
    def finding(error: str, found: Measured) -> Finding:
        at, highest = estimates.mean(found[OF_EDGE]), estimates.mean(found[HIGHEST])
        return Finding(
            f"VRAdam: with {error}, Adam trains at the edge of stability, 38 / α",
            judge_edge(at),
            f"The largest eigenvalue of P^-1 H is {at} of 38 / α in the second half of the steps,"
            f" and at most {highest.mean:.3g} of it on the way; that of H is"
            f" {found[OF_H].mean():.2g}, and gradient descent's edge 2 / α ="
            f" {OF_DESCENT / RATE:.0f}.",
        )

    return [
        finding("squared error", measured[ADAMW]),
        finding("cross-entropy", measured[CROSS_ENTROPY]),
    ]


def judge_edge(at: Estimate) -> Verdict:
    low, high = EDGE
    if low < at.low and at.high < high:
        return Verdict.HOLDS
    if at.high < low or high < at.low:
        return Verdict.REFUTED
    return Verdict.NOT_SEEN


def judge_steadiness(measured: Mapping[str, Measured]) -> Finding:
    """Judge whether VRAdam is steadier than AdamW at the same rates and than slow AdamW.

    Against slow AdamW it needs smaller peaks and a lower loss.
    """
    gated, published = measured[STRONGER], measured[VRADAM]

    def gain(name: str, measure: str) -> Estimate:
        return estimates.mean(measured[name][measure] - gated[measure])

    slow = {name: [gain(name, measure) for measure in (PEAKS, LOSS)] for name in SLOW}
    alike = [gain(name, PEAKS) for name in (ADAMW, MEAN_RATE, REPLAYED)]

    def shown(name: str) -> str:
        return f"{measured[name][PEAKS].mean():.2g} ({measured[name][LOSS].mean():.2f})"

    def less(name: str) -> str:
        return f"peaks {signed(-gain(name, PEAKS), 2)} decades"

    said = ", ".join(f"{how} {shown(name)}" for name, how in SLOW.items())
    worse = sum(all(x.low > 0 for x in differences) for differences in slow.values())
    better = sum(all(x.high < 0 for x in differences) for differences in slow.values())
    return Finding(
        "VRAdam: a gate below 1 makes training at that edge steadier, and a lower rate does not",
        verdicts.judge([*alike, *(x for each in slow.values() for x in each)], alike[:1]),
        f"Peaks of the loss in decades, and the logarithm of the loss in the end: VRAdam with"
        f" beta3 = {STRONG:.0f} {shown(STRONGER)}, at {gated[OF_OWN_EDGE].mean():.2f} of the edge"
        f" of its gated rate; VRAdam as published, where the gate's mean is"
        f" {published[MEAN_OF_RATES].mean():.3f}, {shown(VRADAM)}; AdamW at α {shown(ADAMW)}, at"
        f" the gated run's mean rate {shown(MEAN_RATE)}, at the rates of another seed's gate"
        f" {shown(REPLAYED)}. AdamW that is slow late: {said}. In both measures {worse} of these"
        f" {len(SLOW)} are worse than the gate, and {better} better.",
        untuned=less(ADAMW),
        tuned=f"{less(COSINE)} (AdamW with a cosine)",
    )


def draw_curves(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Draw medians over the seeds with their range."""
    figure = Figure(figsize=(FIGURE_WIDTH, 5.8), layout="constrained")
    panels: Any = figure.subplot_mosaic([["edge", "H"], ["rate", "loss"]])
    for name in STYLES:
        if name in (QUARTER, EIGHTH):
            continue
        curves = Run(*(np.stack(curve) for curve in zip(*runs[name], strict=True)))
        draw_curve(panels["edge"], name, curves.preconditioned)
        draw_curve(panels["H"], name, curves.sharpness)
        draw_curve(panels["rate"], name, thin(curves.rate))
        draw_curve(panels["loss"], name, thin(curves.loss))
    for axes, level, text in (
        (panels["edge"], OF_ADAM, "38 / α"),
        (panels["H"], OF_DESCENT, "2 / α"),
    ):
        axes.axhline(level / RATE, color="black", linestyle=":", linewidth=1)
        beside = {"xycoords": axes.get_yaxis_transform(), "ha": "left", "va": "center"}
        axes.annotate(text, (1.01, level / RATE), fontsize=9, **beside)
    title = "curvature that Adam sees, and its edge"
    entitle(panels["edge"], title, "steps", "top eigenvalue of $P^{-1} H$")
    title = "curvature of the loss, and gradient descent's edge"
    entitle(panels["H"], title, "steps", "top eigenvalue of H")
    entitle(panels["rate"], "rate, with gate and schedule", "steps", "rate")
    entitle(panels["loss"], f"loss, means of {MEASURED_EVERY} steps", "steps", "squared error")
    for name, axes in panels.items():
        axes.set_yscale("log")
        tidy(axes)
        log_ticks(axes.yaxis, (1,) if name == "loss" else (1, 2, 5))
    panels["rate"].set_ylim(bottom=RATE / 20)
    handles, _ = panels["edge"].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8.5, frameon=False)
    return figure


def draw_curve(axes: Axes, name: str, each: Any) -> None:
    style = STYLES[name]
    steps = MEASURED_EVERY * np.arange(1, each.shape[1] + 1)
    axes.plot(
        steps,
        np.median(each, axis=0),
        **style,
        markevery=(0.1, 0.2),
        markersize=4,
        linewidth=1.3,
        label=name,
    )
    low, high = each.min(axis=0), each.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.1, linewidth=0)


def draw_peaks(measured: Mapping[str, Measured]) -> Figure:
    """Draw peaks against losses."""
    figure = Figure(figsize=(FIGURE_WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    for name, style in STYLES.items():
        x, y = (estimates.mean(measured[name][key]) for key in (LOSS, PEAKS))
        draw_point(axes, x, y, style)
        place = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
        axes.annotate(name, (x.mean, y.mean), **place, **LABELS.get(name, ABOVE))
    axes.set_yscale("log")
    tidy(axes)
    log_ticks(axes.yaxis)
    axes.margins(0.1, 0.15)
    title = f"steadiness and loss at α = {RATE}: lower is steadier, left is a lower loss"
    entitle(axes, title, "log10 of the loss in the end", "peaks of the loss (decades)")
    return figure


def draw_point(axes: Axes, x: Estimate, y: Estimate, style: Mapping[str, Any]) -> None:
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=[[x.mean - x.low], [x.high - x.mean]],
        yerr=[[y.mean - y.low], [y.high - y.mean]],
        color=style["color"],
        marker=style["marker"],
        markersize=5,
        capsize=2,
        linewidth=1.2,
    )


if __name__ == "__main__":
    main()
