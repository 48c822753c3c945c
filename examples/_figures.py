"""What the examples' figures have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

# Of Okabe and Ito's palette, which every kind of colour vision can tell apart.
ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Small ticks, a faint grid behind the data, no box."""
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def entitle(axes: Axes, title: str, x: str, y: str) -> None:
    """A title and what is on the axes, with units."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def log_ticks(axis: Axis, at: Sequence[float] = (1, 2, 5), form: str = "{x:g}") -> None:
    """Numbers at these multiples of the powers of ten, and nothing in between."""
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())


def save_png(figure: Figure, path: Path) -> None:
    """Writes a small file."""
    figure.savefig(path, dpi=150)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)
