"""The figure: a panel for each method, with its control dashed and AdamW and SGD in grey."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from _data import Dataset
from _report import Result

# From the palette of Okabe and Ito, which is safe for all kinds of colour vision.
ORANGE, BLUE = "#D55E00", "#0072B2"
GREYS = {"adamw": "0.2", "sgd": "0.6"}
TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


def save_figure(results: Mapping[str, Result], data: Dataset, path: Path) -> None:
    """Draw validation accuracy against steps: mean and range over the seeds."""
    # Baselines alone share one panel.
    methods = [name for name in results if not (results[name].controls or name in GREYS)] or [None]
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(3 * max(columns, 2), 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, method in zip(panels, methods, strict=False):
        draw_panel(axes, results, method, least_error=0.5 / len(data.validation.labels))
    for axes in panels[len(methods) :]:
        axes.remove()

    seeds = len(next(iter(results.values())).curves.test)
    figure.supxlabel(
        f"training steps on {data.name}: mean and range over {seeds} seeds", fontsize=9
    )
    figure.supylabel("validation accuracy", fontsize=9)
    baselines = [line for line in panels[0].lines if line.get_color() in GREYS.values()]
    figure.legend(handles=baselines, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    lowest = min(line.get_ydata().min() for axes in panels[: len(methods)] for line in axes.lines)
    # The axis is inverted, since errors are drawn and accuracies are labelled.
    panels[0].set_ylim(1.2, lowest / 3)
    figure.savefig(path, dpi=150)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)


def draw_panel(
    axes: Axes, results: Mapping[str, Result], method: str | None, least_error: float
) -> None:
    """Draw a method in front of its control and of the baselines."""
    for name, grey in GREYS.items():
        if name in results:
            draw_curve(axes, results[name], least_error, color=grey, linewidth=1)
    own = [
        draw_curve(axes, result, least_error, color=BLUE, linestyle="--")
        for result in results.values()
        if method and result.controls == method
    ]
    if method:
        own.append(draw_curve(axes, results[method], least_error, color=ORANGE))
        axes.legend(handles=own[::-1], loc="upper left", fontsize=7.5, frameon=False)
        axes.set_title(results[method].label, fontsize=9, weight="bold")

    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks([1 - tick for tick in TICKS], [f"{100 * tick:.3g} %" for tick in TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curve(axes: Axes, result: Result, least_error: float, **style: Any) -> Line2D:
    """Draw the error, whose logarithm spreads what is close to full accuracy."""
    errors = np.maximum(1 - result.curves.validation, least_error)
    steps = result.curves.steps
    (line,) = axes.plot(
        steps, errors.mean(axis=0), label=f"{result.label} at {result.rate:.2g}", **style
    )
    low, high = errors.min(axis=0), errors.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return line
