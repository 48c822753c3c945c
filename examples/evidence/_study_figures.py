"""The figures of the study: differences from AdamW, and validation losses against rates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import _study_protocol as protocol
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _study_comparisons import Outcome
from _study_protocol import BASELINE, Study
from _study_workloads import Workload

# Panels reach so many times as far as the largest interval of most contenders.
ROOM = 1.3
# Losses above this many times the lowest one have the same color.
FAR = 4.0


def draw_differences(study: Study, outcomes: Mapping[str, Outcome]) -> Figure:
    """Draw the differences from AdamW, a panel for each workload."""
    rows = math.ceil(len(outcomes) / 2)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.6 + 2.7 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, 2, sharey=True, squeeze=False)
    names = [
        name
        for name, contender in study.contenders.items()
        if name != BASELINE and not contender.form_of
    ]
    for axes, outcome in zip(panels.flat, outcomes.values(), strict=False):
        draw_panel(axes, study, outcome, names)
    for axes in panels.flat[len(outcomes) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_panel(axes: Axes, study: Study, outcome: Outcome, names: Sequence[str]) -> None:
    """Draw intervals, over bars that are as long as what would have been seen."""
    rows = {name: row for row, name in enumerate(names) if name in outcome.judged}
    forms = {
        name: rows[contender.form_of]
        for name, contender in study.contenders.items()
        if name in outcome.judged and contender.form_of in rows
    }
    limit = reach(outcome, names)
    axes.axvline(0, color="0.3", linewidth=1)
    draw_smallest(axes, outcome, rows)
    look: dict[str, Any] = {"color": BLUE, "label": "float32 state"}
    draw_series(axes, outcome, {name: row - 0.15 for name, row in rows.items()}, limit, look)
    look = {"color": ORANGE, "label": "8-bit state", "marker": "D", "markersize": 3}
    draw_series(axes, outcome, {name: row + 0.2 for name, row in forms.items()}, limit, look)
    axes.set_xlim(-limit, limit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    entitle(axes, outcome.title, "test loss, less AdamW's", "")
    tidy(axes, "x")


def draw_smallest(axes: Axes, outcome: Outcome, rows: Mapping[str, int]) -> None:
    smallest = np.array([outcome.from_baseline[name].smallest for name in rows])
    look = {"height": 0.8, "color": "0.88", "label": "too small to be seen"}
    axes.barh(list(rows.values()), 2 * smallest, left=-smallest, **look)


def draw_series(
    axes: Axes,
    outcome: Outcome,
    rows: Mapping[str, float],
    limit: float,
    look: Mapping[str, Any],
) -> None:
    found = {row: outcome.from_baseline[name].difference for name, row in rows.items()}
    inside = {row: x for row, x in found.items() if abs(x.mean) <= limit}
    if inside:
        draw_estimates(axes, list(inside), list(inside.values()), across=True, linestyle="", **look)
    for row in found.keys() - inside.keys():
        point_outside(axes, row, found[row].mean, limit, look["color"])


def reach(outcome: Outcome, names: Sequence[str]) -> float:
    """Return how far a panel reaches: to all intervals but those that are far from the others."""
    ends = [
        max(*np.abs(outcome.from_baseline[name].difference), outcome.from_baseline[name].smallest)
        for name in names
        if name in outcome.judged
    ]
    return ROOM * min(max(ends, default=1), 3 * float(np.median(ends or [1]))) or 1.0


def point_outside(axes: Axes, row: float, mean: float, limit: float, color: str) -> None:
    """Write a difference that lies outside of the panel at its edge."""
    side, text = ("right", f"{mean:+.2g} →") if mean > 0 else ("left", f"← {mean:+.2g}")
    place = math.copysign(limit, mean)
    axes.text(place, row, text, ha=side, va="center", fontsize=8, color=color)


def draw_sensitivity(
    study: Study, workloads: Mapping[str, Workload], outcomes: Mapping[str, Outcome]
) -> Figure:
    """Draw validation losses of trials: a row for each contender, a column for rates."""
    own = [name for name in outcomes if study.own_trials(name, BASELINE)]
    names = [name for name, contender in study.contenders.items() if not contender.form_of]
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + 0.24 * len(names)), layout="constrained")
    panels: Any = figure.subplots(1, len(own), sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, own, strict=True):
        losses = np.full((len(names), study.rules[name].trials), np.nan)
        for row, contender in enumerate(names):
            if contender in outcomes[name].judged:
                losses[row] = by_rate(study, name, contender)
        draw_losses(axes, losses, workloads[name].title.removesuffix(", 1×"))
    panels[0, 0].set_yticks(range(len(names)), names)
    return figure


def by_rate(study: Study, workload: str, contender: str) -> np.ndarray:
    """Return the median over searches of the lowest rates, of the second lowest, and so on."""
    rates = [[run.setting.rate for run in row] for row in study.trials(workload, contender)]
    searched = study.searched(workload, contender)
    return np.median(np.take_along_axis(searched, np.argsort(rates, axis=1), axis=1), axis=0)


def draw_losses(axes: Axes, losses: np.ndarray, title: str) -> None:
    least, most = np.nanmin(losses), np.nanmax(losses)
    half = protocol.RATE_DECADES / 2
    image = axes.imshow(
        losses,
        aspect="auto",
        cmap="cividis_r",
        norm=LogNorm(least, min(FAR * least, most)),
        extent=(-half, half, len(losses) - 0.5, -0.5),
        interpolation="nearest",
    )
    width = 2 * half / losses.shape[1]
    for row, of_one in enumerate(losses):
        if np.isfinite(of_one).all():
            best = (np.argmin(of_one) + 0.5) * width - half
            axes.plot(best, row, marker="o", color="white", markersize=3.5, markeredgecolor="black")
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", extend="max", shrink=0.9)
    log_ticks(bar.ax.xaxis, at=[1, 1.5, 2, 3, 5])
    bar.ax.tick_params(labelsize=8)
    entitle(axes, f"{title}\nvalidation loss", "rate / center of the range", "")
    axes.set_xticks([-1, 0, 1], ["0.1", "1", "10"])
    axes.tick_params(labelsize=8)
