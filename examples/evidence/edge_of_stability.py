"""VRAdam: what does its gate do at the edge of stability?

    python examples/evidence/edge_of_stability.py

A small network is trained on all of its images at once. Adam's steps α with momentum b1 are stable
while the curvature that they see, the largest eigenvalue of the preconditioned Hessian P^-1 H, is
below (2 + 2 b1) / ((1 - b1) α): 38 / α at b1 = .9 (Cohen et al. 2022, arXiv 2207.14484). Training
increases the curvature up to there. VRAdam divides α by 1 + min(beta3 |u|², cutoff). No optimizer
decays weights.

Three controls start at the rate of the gated run: AdamW, AdamW at the gated run's mean rate, and
AdamW with the rates that the gate made in the training of another seed, which is the schedule
without the feedback. Three more controls have a low rate late in training: AdamW with a cosine
decay from α to 0, and AdamW at a quarter and at an eighth of α.

In the tables, a curvature is the largest eigenvalue of P^-1 H divided by the edge 38 / α, or by the
run's own edge, 38 / its rate at that time, gate and schedule included. The highest is that of the
whole training. The curvature of H is the eigenvalue itself. A peak is the distance in decades from
the median loss of 50 steps to the largest, on average. Steps uphill are the share of steps at which
the loss rises. All these are of the second half of the steps; the loss is of the last tenth.

The rate α, the squared error and the larger beta3 were chosen to make an edge and a gate visible.
With cross-entropy the curvature falls instead, which the tables show. The share of steps uphill was
the first measure of steadiness. Peaks were added after curves were seen, and the slow controls
after results were seen. So all results are from seeds that were not used for these choices.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _command_line as command_line
import _edge as edges
import _estimates as estimates
import _results as results
import _verdicts as verdicts
from _command_line import side_by_side
from _drawing import BLUE, FIGURE_WIDTH, GREEN, ORANGE, PINK, entitle, log_ticks, tidy
from _edge import FIRST_SEED, LOSS, MEASURED_EVERY, OF_ADAM, OF_OWN_EDGE, Gate, Run, Train, thin
from _estimates import Estimate
from _verdicts import Finding, Verdict

RATE = 0.02
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
# Columns of the tables that findings read, besides those of `_edge`.
OF_EDGE, HIGHEST, OF_H = "curvature / edge", "highest / edge", "curvature of H"
CURVATURES = (OF_EDGE, OF_OWN_EDGE, HIGHEST, OF_H)
PEAKS = "peaks, decades"
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
CONSTANTS = edges.CONSTANTS | {
    "RATE": RATE,
    "OF_DESCENT": OF_DESCENT,
    "DEFAULT": DEFAULT,
    "STRONG": STRONG,
}
Cells = dict[str, Estimate]


class Plan(NamedTuple):
    """Planned runs: for each seed one rate, or one for each step; with a gate or without."""

    rates: Sequence[ArrayLike]
    gate: Gate | None = None
    train: Train | None = None


def main(argv: Sequence[str] | None = None) -> None:
    options = edges.parse(make_parser(), argv)
    runs = at_the_edge(options)
    edge = {name: row(found) for name, found in runs.items()}
    tables = {
        f"Curvature and rate, at α = {RATE}": columns(edge, "mean rate / α", *CURVATURES),
        f"Loss, at α = {RATE}": columns(edge, "steps uphill", PEAKS, LOSS),
    }
    figures = {
        "edge_of_stability": draw_curves(runs),
        "edge_of_stability-steadiness": draw_peaks(edge),
    }
    findings = [*judge_edges(edge), judge_steadiness(edge)]
    results.publish("edge_of_stability", options, findings, tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(__doc__, **edges.SIZES)


def at_the_edge(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Return a run of every contender for each seed."""
    train = edges.trainer(edges.squared_error, options)
    train_other = edges.trainer(edges.cross_entropy, options)
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
    runs = side_by_side(run, plans)
    gated = [found.rate for found in runs[STRONGER]]
    plans = {
        MEAN_RATE: Plan([rates.mean() for rates in gated]),
        REPLAYED: Plan(gated[-1:] + gated[:-1]),
    }
    runs |= side_by_side(run, plans)
    return {name: runs[name] for name in (*STYLES, CROSS_ENTROPY)}


def row(runs: Sequence[Run]) -> Cells:
    """Return the table's cells, over seeds."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_edge = np.array([run.preconditioned * RATE / OF_ADAM for run in runs])
    of_own = np.array([run.preconditioned * thin(run.rate) / OF_ADAM for run in runs])
    return {
        "mean rate / α": estimates.mean([run.rate.mean() / RATE for run in runs]),
        OF_EDGE: estimates.mean(np.median(of_edge[:, late], axis=1)),
        OF_OWN_EDGE: estimates.mean(np.median(of_own[:, late], axis=1)),
        HIGHEST: estimates.mean(of_edge.max(axis=1)),
        OF_H: estimates.mean([np.median(run.sharpness[late]) for run in runs]),
        "steps uphill": estimates.mean([rises(run.loss) for run in runs]),
        PEAKS: estimates.mean([peaks(run.loss)[late].mean() for run in runs]),
        LOSS: estimates.mean([run.late_loss for run in runs]),
    }


def columns(rows: Mapping[str, Cells], *names: str) -> dict[str, Cells]:
    return {name: {column: cells[column] for column in names} for name, cells in rows.items()}


def rises(loss: Any) -> float:
    """Return the share of the second half's steps in which the loss grows."""
    return float((np.diff(loss[len(loss) // 2 :]) > 0).mean())


def peaks(loss: Any) -> Any:
    """Return the decades from the median to the worst loss between two measurements, on average."""
    parts = np.log10(loss).reshape(-1, MEASURED_EVERY)
    return parts.max(axis=1) - np.median(parts, axis=1)


def judge_edges(edge: Mapping[str, Cells]) -> list[Finding]:
    def finding(error: str, cells: Cells) -> Finding:
        at, highest = cells[OF_EDGE], cells[HIGHEST]
        stays = at.low > 0.9 and at.high < 1.1
        return Finding(
            f"VRAdam: with {error}, Adam trains at the edge of stability, 38 / α",
            Verdict.HOLDS if stays else Verdict.REFUTED,
            f"The largest eigenvalue of P^-1 H is {at.mean:.3g} of 38 / α"
            f" [{at.low:.3g}, {at.high:.3g}] in the second half of the steps, and at most"
            f" {highest.mean:.3g} of it on the way; that of H is"
            f" {cells[OF_H].mean:.2g}, and gradient descent's edge 2 / α ="
            f" {OF_DESCENT / RATE:.0f}.",
        )

    return [
        finding("squared error", edge[ADAMW]),
        finding("cross-entropy", edge[CROSS_ENTROPY]),
    ]


def judge_steadiness(edge: Mapping[str, Cells]) -> Finding:
    """Judge whether VRAdam is steadier than AdamW at the same rates and than slow AdamW.

    Against slow AdamW it needs smaller peaks and a lower loss.
    """
    gated, published = edge[STRONGER], edge[VRADAM]
    measures = PEAKS, LOSS
    slow = {name: [edge[name][x].minus(gated[x]) for x in measures] for name in SLOW}
    alike = [edge[name][PEAKS].minus(gated[PEAKS]) for name in (ADAMW, MEAN_RATE, REPLAYED)]

    def shown(name: str) -> str:
        return f"{edge[name][PEAKS].mean:.2g} ({edge[name][LOSS].mean:.2f})"

    def less(name: str) -> str:
        return f"peaks {gated[PEAKS].mean - edge[name][PEAKS].mean:+.2f} decades"

    said = ", ".join(f"{how} {shown(name)}" for name, how in SLOW.items())
    worse = sum(all(x.low > 0 for x in differences) for differences in slow.values())
    better = sum(all(x.high < 0 for x in differences) for differences in slow.values())
    return Finding(
        "VRAdam: a gate below 1 makes training at that edge steadier, and a lower rate does not",
        verdicts.judge([*alike, *(x for each in slow.values() for x in each)], alike),
        f"Peaks of the loss in decades, and the logarithm of the loss in the end: VRAdam with"
        f" beta3 = {STRONG:.0f} {shown(STRONGER)}, at {gated[OF_OWN_EDGE].mean:.2f} of the edge of"
        f" its gated rate; VRAdam as published, where the gate's mean is"
        f" {published['mean rate / α'].mean:.3f}, {shown(VRADAM)}; AdamW at α {shown(ADAMW)}, at"
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


def draw_peaks(edge: Mapping[str, Cells]) -> Figure:
    """Draw peaks against losses."""
    figure = Figure(figsize=(FIGURE_WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    for name, style in STYLES.items():
        draw_point(axes, edge[name], style)
        at = edge[name][LOSS].mean, edge[name][PEAKS].mean
        place = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
        axes.annotate(name, at, **place, **LABELS.get(name, ABOVE))
    axes.set_yscale("log")
    tidy(axes)
    log_ticks(axes.yaxis)
    axes.margins(0.1, 0.15)
    title = f"steadiness and loss at α = {RATE}: lower is steadier, left is a lower loss"
    entitle(axes, title, "log10 of the loss in the end", "peaks of the loss (decades)")
    return figure


def draw_point(axes: Axes, cells: Cells, style: Mapping[str, Any]) -> None:
    x, y = cells[LOSS], cells[PEAKS]
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
