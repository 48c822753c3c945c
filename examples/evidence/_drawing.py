"""How all figures look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike
from PIL import Image

from _estimates import Estimate

# The width of a figure in inches; a page shows 96 pixels of an inch.
FIGURE_WIDTH = 8.4
# From the palette of Okabe and Ito, which is safe for all kinds of colour vision.
ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
SKY, AMBER = "#56B4E9", "#E69F00"


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Draw small ticks, a faint grid behind the data, and no box."""
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def entitle(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of the axes, with units."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def log_ticks(axis: Axis, at: Sequence[float] = (1, 2, 5), form: str = "{x:g}") -> None:
    """Label these multiples of the powers of ten, and nothing in between."""
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())


def save_png(figure: Figure, path: Path) -> None:
    """Write a small file."""
    figure.savefig(path, dpi=150)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)


def draw_estimates(
    axes: Axes,
    places: ArrayLike,
    estimates: Sequence[Estimate],
    *,
    across: bool = False,
    **look: Any,
) -> None:
    """Draw dots and intervals at these places along x, or along y if `across`."""
    centers, *ends = np.transpose(estimates)
    spread = abs(centers - ends)
    look = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2} | look
    if across:
        axes.errorbar(centers, places, xerr=spread, **look)
    else:
        axes.errorbar(places, centers, yerr=spread, **look)
