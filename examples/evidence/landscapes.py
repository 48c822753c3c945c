"""All methods: do they end lower than AdamW on three hard landscapes?

    python examples/evidence/landscapes.py

All methods are tuned by one search: the same rates, constant or with a cosine to 0, from the same
starts. The trial with the least mean logarithm of the last loss is then judged by other starts. No
method decays weights, and every other argument has its default. CaAdam is not judged and not drawn:
both parameters are in one tensor, so it is Adam here.

In the figure, darker means a larger loss. A path leads from the open dot to the filled one, and the
star is the minimum.

The verdict on a method is on the mean difference from AdamW over the three landscapes, start by
start. Two parameters without noise show how a rule follows a curved valley or leaves a well. They
show nothing about batches or generalization.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _command_line as command_line
import _estimates as estimates
import _results as results
import _verdicts as verdicts
import optax_ext
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, entitle, tidy
from _estimates import Estimate, signed
from _progress import progress_bar
from _results import Rows
from _verdicts import Finding

ADAMW = "adamw"
METHODS = {ADAMW: optax.adamw} | {name: row.factory for name, row in optax_ext.METHODS.items()}
# On one tensor CaAdam is Adam, so that there is nothing to judge.
JUDGED = [name for name in METHODS if name not in (ADAMW, "caadam")]
# Wide enough for InvAdam, whose rate is per squared gradient.
LOWEST_RATE, HIGHEST_RATE = 1e-9, 1e2
# A loss below it is as good as 0, and counts as the minimum reached.
REACHED = 1e-6
DIFFERENCE = "difference from AdamW"
SHADES = [str(grey) for grey in np.linspace(1, 0.66, 8)]


class Landscape(NamedTuple):
    """A function of two parameters whose least value is 0.

    Attributes:
      loss: the function.
      low: corner of the box that is drawn and that starts are taken from.
      high: the opposite one.
      shown: the start of the path that is drawn.
      minimum: where the loss is 0.
      contour_power: the contours are evenly spaced in the loss to this power.
    """

    loss: Callable[[jax.Array], jax.Array]
    low: tuple[float, float]
    high: tuple[float, float]
    shown: tuple[float, float]
    minimum: tuple[float, float]
    contour_power: float


def rosenbrock(p: jax.Array) -> jax.Array:
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def rastrigin(p: jax.Array) -> jax.Array:
    return jnp.sum(p**2 + 10 * (1 - jnp.cos(2 * jnp.pi * p)))


def valley(p: jax.Array) -> jax.Array:
    """Return a parabola of curvatures 1 and 1000 along the diagonals, which no scales can undo."""
    return ((p[0] + p[1]) ** 2 + 1000 * (p[0] - p[1]) ** 2) / 4


LANDSCAPES = {
    "Rosenbrock": Landscape(rosenbrock, (-2, -1), (2, 3), (-1.5, 2.5), (1, 1), 0.25),
    "Rastrigin": Landscape(rastrigin, (-4.5, -4.5), (4.5, 4.5), (2.8, -3.3), (0, 0), 1.0),
    "valley": Landscape(valley, (-2, -2), (2, 2), (-1.8, -0.9), (0, 0), 0.25),
}


class Outcome(NamedTuple):
    """The outcome of one method on one landscape.

    Attributes:
      rate: the best one.
      cosine: whether it is best with a cosine to 0.
      at_edge: whether it is the least or the largest tried.
      losses: at the end, from each start.
      path: from the start that is shown, of shape (steps + 1, 2).
    """

    rate: float
    cosine: bool
    at_edge: bool
    losses: Any
    path: Any


# Recorded with the results, which depend on them.
CONSTANTS = {"LOWEST_RATE": LOWEST_RATE, "HIGHEST_RATE": HIGHEST_RATE, "REACHED": REACHED}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    warnings.filterwarnings("ignore", ".*nothing will be scaled", UserWarning)
    rates = jnp.geomspace(LOWEST_RATE, HIGHEST_RATE, options.rates)
    outcomes: dict[str, dict[str, Outcome]] = {}
    with progress_bar(len(METHODS) * len(LANDSCAPES)) as on_progress:
        for method, factory in METHODS.items():
            outcomes[method] = {}
            for name, landscape in LANDSCAPES.items():
                run = partial(descend, factory, landscape.loss, steps=options.steps)
                outcomes[method][name] = tune_and_run(run, landscape, rates, options.starts)
                on_progress(method, 1)
    tables = {f"{name}, {options.steps} steps": table(outcomes, name) for name in LANDSCAPES}
    figures = {"landscapes": draw(outcomes)}
    results.publish("landscapes", options, judge(outcomes), tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        starts=(100, "points to start from, and as many others to tune on"),
        steps=(500, "of each run"),
        rates=(56, "that each method tries, five in a factor of ten, constant and with a cosine"),
    )


def tune_and_run(run: Callable[..., Any], landscape: Landscape, rates: Any, starts: int) -> Outcome:
    """Return the outcome of the trial that is best from one set of starts, from another set."""
    trials = jnp.tile(rates, 2), jnp.repeat(jnp.array([False, True]), len(rates))
    low, high = jnp.array(landscape.low), jnp.array(landscape.high)
    draws = jax.random.uniform(jax.random.key(0), (2 * starts, 2), minval=low, maxval=high)
    losses, paths = run(trials, jnp.concatenate([jnp.array([landscape.shown]), draws]))
    tuning, others = losses[:, 1 : 1 + starts], losses[:, 1 + starts :]
    best = int(jnp.argmin(jnp.mean(log(tuning), axis=1)))
    return Outcome(
        rate=float(trials[0][best]),
        cosine=bool(trials[1][best]),
        at_edge=best % len(rates) in (0, len(rates) - 1),
        losses=np.asarray(others[best]),
        path=np.concatenate([[landscape.shown], paths[best]]),
    )


@partial(jax.jit, static_argnames=("factory", "loss", "steps"))
def descend(
    factory: Callable[..., optax.GradientTransformation],
    loss: Callable[[jax.Array], jax.Array],
    trials: tuple[jax.Array, jax.Array],
    starts: jax.Array,
    steps: int,
) -> tuple[Any, Any]:
    """Run from every start in every trial, which is a rate and whether it follows a cosine.

    Returns:
      The last losses, of shape (trials, starts), and the paths from the first start, of shape
      (trials, steps, 2).
    """

    def run(trial: Any, start: Any) -> tuple[Any, Any]:
        rate, cosine = trial
        to_zero = optax.cosine_decay_schedule(1.0, steps)
        tx = factory(lambda t: rate * jnp.where(cosine, to_zero(t), 1.0), weight_decay=0.0)

        def step(run: Any, _: None) -> tuple[Any, Any]:
            params, state = run
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (params, _), path = lax.scan(step, (start, tx.init(start)), length=steps)
        return loss(params), path

    losses, paths = jax.vmap(jax.vmap(run, (None, 0)), (0, None))(trials, starts)
    return losses, paths[:, 0]


def log(losses: jax.Array) -> jax.Array:
    """Return decimal logarithms, clipped where a loss is as good as 0 or diverges."""
    return jnp.log10(jnp.clip(jnp.nan_to_num(losses, nan=jnp.inf), REACHED, 1e6))


def table(outcomes: Mapping[str, Mapping[str, Outcome]], name: str) -> Rows:
    def row(found: Outcome) -> dict[str, Estimate | float | str]:
        return {
            "rate": f"{found.rate:.2g}{', the last' if found.at_edge else ''}",
            "schedule": "cosine" if found.cosine else "constant",
            "reaches the minimum": estimates.share(found.losses < REACHED),
            "log10 of the loss": estimates.mean(log(found.losses)),
            DIFFERENCE: estimates.mean(difference(found, outcomes[ADAMW][name])),
        }

    return {method: row(by_name[name]) for method, by_name in outcomes.items()}


def difference(found: Outcome, adamw: Outcome) -> Any:
    """Return the difference in decades of the loss, start by start."""
    return log(found.losses) - log(adamw.losses)


def judge(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[Finding]:
    """Judge each method by its mean over the landscapes."""
    return [finding(method, outcomes[method], outcomes[ADAMW]) for method in JUDGED]


def finding(method: str, found: Mapping[str, Outcome], adamw: Mapping[str, Outcome]) -> Finding:
    differences = {name: difference(found[name], adamw[name]) for name in LANDSCAPES}
    overall = estimates.mean(np.mean(list(differences.values()), axis=0))
    each = ", ".join(f"{name} {signed(estimates.mean(x), 2)}" for name, x in differences.items())
    return Finding(
        f"{optax_ext.METHODS[method].title}: it ends lower than AdamW on hard landscapes (a"
        " question of ours)",
        verdicts.judge([-overall]),
        f"Difference from AdamW in decades of the loss, both tuned: {signed(overall, 2)} on"
        f" average; {each}. {estimates.sensitivity(overall, ' decades', 2)}",
        tuned=f"{signed(overall, 2)} decades of the loss",
    )


def draw(outcomes: Mapping[str, Mapping[str, Outcome]]) -> Figure:
    """Draw a sheet: a row for each method, a column for each landscape."""
    figure = Figure(figsize=(FIGURE_WIDTH, 2.15 * len(JUDGED) + 0.6), layout="constrained")
    panels = figure.subplots(len(JUDGED), len(LANDSCAPES), sharex="col", sharey="col")
    for row, method in zip(panels, JUDGED, strict=True):
        for axes, name in zip(row, LANDSCAPES, strict=True):
            draw_contours(axes, LANDSCAPES[name])
            for who in (ADAMW, method):
                draw_path(axes, outcomes[who][name], who == ADAMW)
            # Paths that leave the picture are cut off.
            corner = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 8}
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
            said = trial(outcomes[method][name])
            axes.annotate(said, (0.985, 0.975), color=ORANGE, bbox=box, **corner)
        entitle(row[0], "", "", optax_ext.METHODS[method].title)
        row[0].yaxis.label.set(fontsize=10, weight="bold")
    for axes, name in zip(panels[0], LANDSCAPES, strict=True):
        axes.set_title(f"{name}\nAdamW: {trial(outcomes[ADAMW][name])}", fontsize=9)
    figure.supxlabel("first parameter (left to right), second (upwards)", fontsize=9)
    lines = panels[0, 0].get_lines()
    named = {"AdamW (dashed)": lines[1], "the row's method": lines[4], "minimum": lines[0]}
    look = {"fontsize": 9, "frameon": False}
    figure.legend(named.values(), named, loc="outside upper center", ncols=3, **look)
    return figure


def trial(found: Outcome) -> str:
    return f"rate {found.rate:.2g}, {'cosine' if found.cosine else 'constant'}"


def draw_path(axes: Axes, found: Outcome, is_adamw: bool) -> None:
    colour, style = (BLUE, "--") if is_adamw else (ORANGE, "-")
    axes.plot(*found.path.T, color=colour, linestyle=style, linewidth=1.3)
    axes.plot(*found.path[0], color="black", marker="o", markersize=6, fillstyle="none")
    axes.plot(*found.path[-1], color=colour, marker="o", markersize=5, zorder=3)


def draw_contours(axes: Axes, landscape: Landscape) -> None:
    """Draw the landscape in grey, over the box of the starts and a margin around it."""
    low, high = np.array(landscape.low), np.array(landscape.high)
    margin = 0.1 * (high - low)
    x, y = np.linspace(low - margin, high + margin, 241).T
    points = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(y)))
    losses = np.asarray(jax.vmap(jax.vmap(landscape.loss, -1), -1)(points)).T
    levels = np.linspace(0, losses.max() ** landscape.contour_power, 9) ** (
        1 / landscape.contour_power
    )
    axes.contourf(x, y, losses, levels=levels, colors=SHADES)
    axes.contour(x, y, losses, levels=levels, colors="0.6", linewidths=0.4)
    axes.plot(*landscape.minimum, marker="*", color="black", markersize=10, linestyle="")
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]])
    tidy(axes)
    axes.grid(visible=False)


if __name__ == "__main__":
    main()
