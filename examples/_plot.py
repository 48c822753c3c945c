"""The figure: for each optimizer what a rate costs, and how it trains at its best rate."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike
from PIL import Image

from _report import Result

# From the palette of Okabe and Ito, which is safe for all kinds of colour vision.
OWN = {"color": "#D55E00", "linewidth": 1.8, "zorder": 4}
CONTROL = {"color": "#0072B2", "linewidth": 1.5, "linestyle": (0, (3, 1.5)), "zorder": 5}
ADAMW = {"color": "0.6", "linewidth": 1.3, "zorder": 3}


def save_figure(results: Mapping[str, Result], path: Path) -> None:
    """Draw two panels for each optimizer: median and range over seeds, with AdamW's in grey."""
    shown = [name for name, result in results.items() if result.controls is None]
    pairs = min(2, len(shown))
    rows = math.ceil(len(shown) / pairs)
    figure = Figure(figsize=(4.8 * pairs, 1.75 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, 2 * pairs, sharey=True, squeeze=False)
    for i, (left, right) in enumerate(panels.reshape(-1, 2)):
        if i < len(shown):
            draw_pair(left, right, results, shown[i])
        else:
            left.remove()
            right.remove()
    draw_scales(panels, results)
    draw_legend(figure, results, wide=pairs > 1)
    figure.savefig(path, dpi=160)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)


def draw_pair(left: Axes, right: Axes, results: Mapping[str, Result], name: str) -> None:
    """Draw an optimizer in front of its control and of AdamW."""
    lines = [(results["adamw"], ADAMW)] if name != "adamw" else []
    lines += [(result, CONTROL) for result in results.values() if result.controls == name]
    for result, style in [*lines, (results[name], OWN)]:
        draw(left, result.rates, result.tuning_test.T, style)
        draw(right, result.runs.steps, result.runs.validation_loss, style)
        chosen = list(result.rates).index(result.rate)
        loss = np.median(result.tuning_test[chosen])
        left.plot(result.rate, loss, "o", markersize=4.5, **{**style, "linestyle": "none"})
    left.set_title(results[name].label, loc="left", fontsize=10, weight="bold")
    right.set_title(f"at rate {results[name].rate:g}", loc="left", fontsize=9)


def draw(axes: Axes, x: ArrayLike, losses: Any, style: Mapping[str, Any]) -> None:
    """Draw the median and the range over seeds, which are the first axis."""
    axes.plot(x, np.median(losses, axis=0), **style)
    low, high = losses.min(axis=0), losses.max(axis=0)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_scales(panels: Any, results: Mapping[str, Result]) -> None:
    """Draw the scales, which all panels share but for the rates."""
    lowest = min(
        min(result.tuning_test.min(), result.runs.validation_loss.min())
        for result in results.values()
    )
    for axes in panels.ravel():
        axes.set_yscale("log")
        # A run that learns nothing stays where AdamW begins; one that diverges is cut off.
        axes.set_ylim(0.9 * lowest, 1.4 * results["adamw"].runs.validation_loss[:, 0].max())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 1::2].ravel():
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axes in panels[:, ::2].ravel():
        axes.set_ylabel("loss", fontsize=8)
    for axes in panels[-1, ::2]:
        axes.set_xlabel("learning rate", fontsize=9)
    for axes in panels[-1, 1::2]:
        axes.set_xlabel("training step", fontsize=9)


def draw_legend(figure: Figure, results: Mapping[str, Result], *, wide: bool) -> None:
    """Explain above the panels what they have in common."""
    labels = {"the optimizer": OWN, "AdamW": ADAMW}
    labels |= {result.label: CONTROL for result in results.values() if result.controls}
    handles = [Line2D([], [], label=label, **style) for label, style in labels.items()]
    handles += [
        Patch(color=OWN["color"], alpha=0.15, linewidth=0, label="range over seeds"),
        Line2D([], [], color="0.3", marker="o", linestyle="none", label="best rate"),
    ]
    title = "Left: test loss against learning rate. Right: validation loss at the best rate"
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles) if wide else 2,
        fontsize=9,
        frameon=False,
        title=title if wide else title.replace(". ", "\n"),
        title_fontproperties={"size": 10.5},
    )
