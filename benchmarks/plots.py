"""Figures of the results; the same results give the same file."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.baselines import BASELINES
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.results import Row
from benchmarks.shapes import count

# Inches; a page shows 96 pixels per inch.
WIDTH = 8.4

# Okabe and Ito's palette, whose colours are distinct for every kind of colour vision.
GREY, ORANGE, BLUE = "0.4", "#D55E00", "#0072B2"
COLOURS = (GREY, ORANGE, BLUE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "os^Dv<>"


class Package(NamedTuple):
    """The appearance of a package of optimizers.

    Attributes:
      label: its label in the legend.
      colour: the colour of its dots.
    """

    label: str
    colour: str


PACKAGES = {
    "optax": Package("Optax", GREY),
    "optax_ext": Package("optax_ext", BLUE),
    "torch": Package("PyTorch's nearest", ORANGE),
}


def scaling(columns: Mapping[str, Sequence[Row]], labels: Sequence[str], path: Path) -> None:
    """Draw the step time and compile time of each optimizer against one or more numbers.

    Args:
      columns: rows of the scaling benchmark, by the number that varies among them.
      labels: the axis labels of these numbers.
      path: the path of the figure.
    """
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    names = dict.fromkeys(row["optimizer"] for row in itertools.chain(*columns.values()))
    styles = line_styles(names)
    for (number, rows), column in zip(columns.items(), panels.T, strict=True):
        for name in names:
            points = sorted((x for x in rows if x["optimizer"] == name), key=lambda x: x[number])
            for axes, times in zip(column, ("times_ms", "compile_times_s"), strict=True):
                x, samples = [row[number] for row in points], [row[times] for row in points]
                draw_line(axes, x, samples, **styles[name])
    for axes in panels.ravel():
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes)
    for axes in panels[:, 0]:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    for axes, label in zip(panels[-1], labels, strict=True):
        axes.set_xlabel(label, fontsize=9)
    for axes, label in zip(panels[:, 0], ("time of a step (ms)", "to compile (s)"), strict=True):
        axes.set_ylabel(label, fontsize=9)
    add_legend(figure, styles)
    save(figure, path)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each line."""
    looks = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
    return {
        name: {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.3}
        for name, (colour, marker) in zip(names, looks, strict=False)
    }


def draw_line(
    axes: Axes, x: Sequence[float], samples: Sequence[Sequence[float]], **style: Any
) -> None:
    """Draw a line through the medians and a band between the quartiles."""
    if samples:
        low, median, high = np.transpose([np.quantile(x, (0.25, 0.5, 0.75)) for x in samples])
        axes.plot(x, median, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def steps(results: Mapping[str, Mapping[str, Row]], target: float, path: Path) -> None:
    """Draw the time per byte of each optimizer relative to adamw, a panel for each set of leaves.

    Args:
      results: rows of the step benchmark, by the set of leaves and by the optimizer.
      target: the ratio that no chain should exceed.
      path: the path of the figure.
    """
    names = list(dict.fromkeys(itertools.chain(*results.values())))
    figure = Figure(figsize=(WIDTH, 0.19 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (leaf_set, rows) in zip(panels, results.items(), strict=True):
        axes.axvline(1, color="0.5", linewidth=1)
        axes.axvline(target, color="0.5", linewidth=1, linestyle=(0, (3, 2)))
        for name, row in rows.items():
            draw_ratio(axes, names.index(name), name, row)
        axes.set_title(f"{leaf_set}\n{size(leaf_set)}", fontsize=8)
        tidy(axes)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    name_rows(panels[0], names)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter("{x:g}")
    figure.supxlabel(
        f"time per byte, relative to optax.adamw (line at 1, dashed at {target:g})", fontsize=9
    )
    dot = {"marker": "o", "linestyle": ""}
    shown = set(map(package, names))
    add_legend(
        figure,
        {x.label: dot | {"color": x.colour} for name, x in PACKAGES.items() if name in shown},
    )
    save(figure, path)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows from top to bottom, in the colours of their packages."""
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(PACKAGES[package(name)].colour)
    axes.set_ylim(len(names) - 0.4, -0.6)


def draw_ratio(axes: Axes, y: int, name: str, row: Row) -> None:
    """Draw a dot at the median and a line between the quartiles."""
    colour = PACKAGES[package(name)].colour
    relative = np.array(row["times_ms"]) / row["median_ms"] * row["to_adamw_per_byte"]
    axes.plot(np.quantile(relative, (0.25, 0.75)), [y, y], color=colour, linewidth=1.6, alpha=0.45)
    axes.plot(row["to_adamw_per_byte"], y, color=colour, marker="o", markersize=4.5)


def package(name: str) -> str:
    """Return the package of the optimizer."""
    return "torch" if name in BASELINES else OPTIMIZERS[name].package


def size(leaf_set: str) -> str:
    """Describe the number of leaves and of parameters."""
    shapes = LEAF_SETS[leaf_set]
    leaves = f"{len(shapes)} {'leaf' if len(shapes) == 1 else 'leaves'}"
    return f"{leaves}, {count(shapes) / 1e6:.3g} M"


def add_legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a legend above all panels."""
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False)


def tidy(axes: Axes) -> None:
    """Use small ticks, a faint grid behind the data, and no box."""
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whose content depends only on the figure."""
    with mpl.rc_context({"svg.hashsalt": "optax_ext"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
