"""What the examples' figures have in common."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
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


def save_png(figure: Figure, path: Path) -> None:
    """Writes a small file."""
    figure.savefig(path, dpi=150)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)
