"""Every method on three hard landscapes of two parameters, beside AdamW.

    python examples/evidence/landscapes.py

All are tuned by one search: the same rates, constant or with a cosine to 0, from the same starts.
What is best by the mean logarithm of the last loss is then judged by other starts. There is no
weight decay, and every other argument has its default. (CaAdam knows no difference between two
parameters of one tensor: here it is Adam, and its path lies on AdamW's.)

In the pictures, a path leads from the open dot to the filled one; the star is the minimum.

On two parameters there is no noise, no batch and nothing to generalize to: what can be seen is how
a rule follows a curved valley, or leaves a hollow. Fifteen intervals of 95 % are not corrected for
their number.
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

import _evidence as evidence
import optax_ext
from _evidence import ORANGE, Estimate, Finding, Verdict, entitle, progress_bar, tidy

METHODS = {"adamw": optax.adamw} | {name: row.factory for name, row in optax_ext.METHODS.items()}
# Wide enough for InvAdam, whose rate is per squared gradient.
LOWEST_RATE, HIGHEST_RATE = 1e-9, 1e2
# A loss below it is as good as 0, and counts as the minimum reached.
REACHED = 1e-6


class Landscape(NamedTuple):
    """A function of two parameters whose least value is 0.

    Attributes:
      loss: the function.
      low: corner of the box that is drawn and that starts are taken from.
      high: the opposite one.
      shown: the start of the path that is drawn.
      minimum: where the loss is 0.
    """

    loss: Callable[[jax.Array], jax.Array]
    low: tuple[float, float]
    high: tuple[float, float]
    shown: tuple[float, float]
    minimum: tuple[float, float]


def rosenbrock(p: jax.Array) -> jax.Array:
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def rastrigin(p: jax.Array) -> jax.Array:
    return jnp.sum(p**2 + 10 * (1 - jnp.cos(2 * jnp.pi * p)))


def valley(p: jax.Array) -> jax.Array:
    """Return a parabola of curvatures 1 and 1000 along the diagonals, which no scales can undo."""
    return ((p[0] + p[1]) ** 2 + 1000 * (p[0] - p[1]) ** 2) / 4


LANDSCAPES = {
    "Rosenbrock": Landscape(rosenbrock, (-2, -1), (2, 3), (-1.5, 2.5), (1, 1)),
    "Rastrigin": Landscape(rastrigin, (-4.5, -4.5), (4.5, 4.5), (2.8, -3.3), (0, 0)),
    "valley": Landscape(valley, (-2, -2), (2, 2), (-1.8, -0.9), (0, 0)),
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


# They decide the results, and are recorded with them.
CONSTANTS = {"LOWEST_RATE": LOWEST_RATE, "HIGHEST_RATE": HIGHEST_RATE, "REACHED": REACHED}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    # CaAdam is Adam here, as the page says.
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
    figures = {f"landscape-{name}": draw(outcomes, name) for name in METHODS if name != "adamw"}
    evidence.publish("landscapes", options, judge(outcomes), tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
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


def table(outcomes: Mapping[str, Mapping[str, Outcome]], name: str) -> evidence.Rows:
    def row(found: Outcome) -> dict[str, Estimate | float | str]:
        return {
            "rate": f"{found.rate:.2g}{', the last' if found.at_edge else ''}",
            "schedule": "cosine" if found.cosine else "constant",
            "reaches the minimum": evidence.share(found.losses < REACHED),
            "log10 of the loss": evidence.mean(log(found.losses)),
            "less AdamW's": less_adamw(found, outcomes["adamw"][name]),
        }

    return {method: row(by_name[name]) for method, by_name in outcomes.items()}


def less_adamw(found: Outcome, adamw: Outcome) -> Estimate:
    """Return the difference in decades of the loss, start by start."""
    return evidence.mean(log(found.losses) - log(adamw.losses))


def judge(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[Finding]:
    """Judge every method except CaAdam, which is Adam here."""
    differences = {
        f"{method} on {name}": less_adamw(outcomes[method][name], outcomes["adamw"][name])
        for method in METHODS
        if method not in ("adamw", "caadam")
        for name in LANDSCAPES
    }
    lower = [f"{who}, by {-x.mean:.2f} decades" for who, x in differences.items() if x.high < 0]
    higher = sum(x.low > 0 for x in differences.values())
    return [
        Finding(
            "A question of ours: all end lower than AdamW on hard landscapes",
            Verdict.HOLDS if len(lower) == len(differences) else Verdict.NOT_SEEN,
            f"Of {len(differences)} comparisons with AdamW as well tuned, {len(lower)} lower"
            f" ({'; '.join(lower) or 'none'}), {higher} higher, the others the same within the"
            " interval.",
        )
    ]


def draw(outcomes: Mapping[str, Mapping[str, Outcome]], method: str) -> Figure:
    figure = Figure(figsize=(evidence.WIDTH, 3.3), layout="constrained")
    for axes, (name, landscape) in zip(figure.subplots(1, 3), LANDSCAPES.items(), strict=True):
        paths = [outcomes[who][name].path for who in ("adamw", method)]
        draw_contours(axes, landscape, np.concatenate(paths))
        for who, colour, style in (("adamw", "0.2", "--"), (method, ORANGE, "-")):
            found = outcomes[who][name]
            label = f"{who}, rate {found.rate:.2g}, {'cosine' if found.cosine else 'constant'}"
            axes.plot(*found.path.T, color=colour, linestyle=style, linewidth=1.2, label=label)
            axes.plot(*found.path[0], color=colour, marker="o", markersize=6, fillstyle="none")
            axes.plot(*found.path[-1], color=colour, marker="o", markersize=4)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8, frameon=False)
        entitle(axes, name, "first parameter", "")
        tidy(axes)
    figure.axes[0].set_ylabel("second parameter", fontsize=9)
    return figure


def draw_contours(axes: Axes, landscape: Landscape, visited: Any) -> None:
    """Return the box of the starts and of the points visited from there."""
    low = np.minimum(landscape.low, visited.min(axis=0) - 0.1)
    high = np.maximum(landscape.high, visited.max(axis=0) + 0.1)
    x, y = (np.linspace(*ends, 181) for ends in zip(low, high, strict=True))
    points = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(y)))
    losses = np.asarray(jax.vmap(jax.vmap(landscape.loss, -1), -1)(points)).T
    axes.contour(x, y, np.log10(losses + 1e-2), levels=8, colors="0.8", linewidths=0.7)
    axes.plot(*landscape.minimum, marker="*", color="black", markersize=9, linestyle="")


if __name__ == "__main__":
    main()
