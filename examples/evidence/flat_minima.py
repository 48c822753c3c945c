"""InvAdam, DualAdam: do they leave sharp minima sooner, and does training end in flatter ones?

    python examples/evidence/flat_minima.py

First, wells of one depth and several widths, in which the gradient's noise has the variance H / B,
as that of batches of B has at a minimum of curvature H. The rate of each method is such that the
widest well holds all for equally long. By the diffusion theory of Xie et al. (arXiv 2006.15815) a
barrier ΔL delays the escape by exp(ΔL / T), T = α' H / 2B, where α' is the rate after the division
or multiplication by sqrt(v) = sqrt(H / B):

    ΔL / T = 2 B ΔL / (α H) of SGD, 2 B^½ ΔL / (α H^½) of Adam, 2 B^1.5 ΔL / (α H^1.5) of InvAdam

Then trainings on the digits, all tuned by as many trials, DualAdam beside Adam with a linear
warm-up of the same length: the largest eigenvalue of the Hessian, and the test accuracy.

Not to be seen here: noise with B as large as batches have makes InvAdam's steps, which scale as the
squared gradient, and so its escapes, vanish unless its rate grows along; and sharpness is compared
at the end of some 4,000 parameters' training, where the loss is still falling.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _evidence as evidence
import _smooth as smooth
from _command_line import progress_bar
from _curvature import sharpness
from _digits import (
    CLASSES,
    SEARCH_SEED,
    Factory,
    Network,
    Runs,
    best,
    cross_entropy,
    load_once,
    train,
)
from _evidence import Estimate, Finding, Verdict
from _figures import GREEN, ORANGE, PINK, entitle, log_ticks, tidy
from _wells import CURVATURES, ESCAPING, Escape, Escaping, escape
from optax_ext import dualadam, invadam

HIDDEN = 32
SHORT, LONG = 100, 500
RATES = np.geomspace(1e-3, 0.128, 8)


def warm_up(steps: int) -> Factory:
    """Adam whose rate grows as DualAdam's share of Adam does."""
    return lambda rate: optax.adam(optax.linear_schedule(rate / steps, rate, steps - 1))


def dual(steps: int) -> Factory:
    """DualAdam whose first phase has this length."""
    return partial(dualadam, switch_rate=1 / steps)


class Training(NamedTuple):
    """A contender on the digits.

    Attributes:
      factory: makes it for a rate.
      rates: that it tries.
      control: its own one.
      colour: of its dots.
    """

    factory: Factory
    rates: Any
    control: str
    colour: str


ADAM = "Adam"
TRAINING = {
    ADAM: Training(optax.adam, RATES, ADAM, "0.2"),
    f"Adam, warm-up {SHORT}": Training(warm_up(SHORT), RATES, ADAM, PINK),
    f"DualAdam {SHORT}": Training(dual(SHORT), RATES, f"Adam, warm-up {SHORT}", GREEN),
    f"Adam, warm-up {LONG}": Training(warm_up(LONG), RATES, ADAM, PINK),
    f"DualAdam {LONG}": Training(dual(LONG), RATES, f"Adam, warm-up {LONG}", GREEN),
    # Its rate is per squared gradient.
    "InvAdam": Training(invadam, 300 * RATES, ADAM, ORANGE),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with progress_bar(len(ESCAPING) + 2 * len(TRAINING)) as on_progress:
        escapes = {}
        for name, method in ESCAPING.items():
            escapes[name] = escape(method, options.groups, options.trajectories, options.patience)
            on_progress(name, 1)
        trained = {
            name: judge_one(contender, options, partial(on_progress, name))
            for name, contender in TRAINING.items()
        }
    tables = {
        "ΔL / T as the times in the widest and in the sharpest well tell it, and p": {
            name: row_of_escape(ESCAPING[name], found) for name, found in escapes.items()
        },
        "On the digits; − is less another's, seed by seed": {
            name: row_of_training(name, trained) for name in trained
        },
    }
    findings = [judge_escapes(escapes), judge_trainings(trained)]
    figures = {"flat_minima": draw(escapes, trained)}
    evidence.publish("flat_minima", options, findings, tables, figures)


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        groups=(10, "of trajectories, between which the escapes' intervals are"),
        trajectories=(100, "in each group and well"),
        patience=(60000, "steps after which those that have not left are given up"),
        seeds=(16, "initial weights and orders of the images"),
        trials=(4, f"seeds apart on which each of {len(RATES)} rates is tried"),
        steps=(1000, "of each training"),
    )


class Judged(NamedTuple):
    """What a contender came to.

    Attributes:
      rate: the best one.
      search: the runs that decided, of shape (rates, seeds).
      runs: at the best rate, from other seeds.
      sharpness: of these.
      found_sharpness: of those that decided.
    """

    rate: float
    search: Runs
    runs: Runs
    sharpness: Any
    found_sharpness: Any


def judge_one(
    contender: Training, options: argparse.Namespace, on_progress: Callable[[float], object]
) -> Judged:
    train_on = partial(train, NETWORK, contender.factory, steps=options.steps)
    search = train_on(contender.rates[:, None], SEARCH_SEED + np.arange(options.trials))
    on_progress(1)
    rate = float(contender.rates[best(search)])
    runs = train_on(rate, np.arange(options.seeds))
    on_progress(1)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), search.params)
    found = np.asarray(sharpness_of_each(flat)).reshape(search.test.shape)
    return Judged(rate, search, runs, np.asarray(sharpness_of_each(runs.params)), found)


def apply(params: Any, images: jax.Array) -> jax.Array:
    return smooth.apply(params, images.reshape(len(images), -1))


NETWORK = Network(partial(smooth.initialize, widths=(64, HIDDEN, HIDDEN, CLASSES)), apply)


@jax.jit
def sharpness_of_each(params: Any) -> jax.Array:
    """The largest eigenvalue of the Hessian of the loss on all that was trained on."""
    train = load_once().train
    return lax.map(partial(sharpness, lambda p: cross_entropy(apply, p, train)), params)


def row_of_escape(method: Escaping, found: Escape) -> dict[str, Estimate | float | str]:
    return {
        "widest": evidence.mean(found.barriers[0]),
        "widest, theory": float(found.theory[0]),
        "sharpest": evidence.mean(found.barriers[-1]),
        "sharpest, theory": float(found.theory[-1]),
        "steps in the widest": evidence.mean(found.times[0]),
        "in the sharpest": evidence.mean(found.times[-1]),
        "p": evidence.mean(found.powers),
        "p, theory": "-" if method.power is None else method.power,
    }


def row_of_training(name: str, trained: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
    found, other = trained[name], trained[TRAINING[name].control]
    return {
        "rate": f"{found.rate:.3g}",
        "training loss": evidence.mean(found.runs.train),
        "sharpness": evidence.mean(found.sharpness),
        "control": TRAINING[name].control,
        "log10 sharpness, − control": flatter(found, other),
        "test loss": evidence.mean(found.runs.test),
        "accuracy, %": evidence.mean(found.runs.accuracy),
        "− control": better(found, other),
    }


def flatter(found: Judged, other: Judged) -> Estimate:
    """In decades of the sharpness, seed by seed."""
    return evidence.mean(np.log10(found.sharpness) - np.log10(other.sharpness))


def better(found: Judged, other: Judged) -> Estimate:
    """In points of test accuracy, seed by seed."""
    return evidence.mean(found.runs.accuracy - other.runs.accuracy)


def judge_escapes(escapes: Mapping[str, Escape]) -> Finding:
    p = {name: evidence.mean(found.powers) for name, found in escapes.items()}
    times = {name: found.times.mean(axis=1) for name, found in escapes.items()}
    sooner = {name: time[0] / time[-1] for name, time in times.items()}
    holds = p["InvAdam"].low > p["SGD"].high and p["SGD"].low > p["Adam"].high
    return Finding(
        "InvAdam: under gradient noise it leaves sharp minima first",
        Verdict.HOLDS if holds else Verdict.NOT_SEEN,
        f"The barrier falls with curvature as H^-p, p = {p['InvAdam']} (theory 1.5), SGD's"
        f" {p['SGD']} (1), Adam's {p['Adam']} (½); wells {CURVATURES[-1] / CURVATURES[0]:.1f} times"
        f" as sharp are left {sooner['InvAdam']:.0f}, {sooner['SGD']:.0f} and {sooner['Adam']:.0f}"
        " times sooner.",
    )


def judge_trainings(trained: Mapping[str, Judged]) -> Finding:
    pairs = {
        name: (found, trained[TRAINING[name].control])
        for name, found in trained.items()
        if name.startswith("DualAdam")
    }
    wins = [flatter(*pair).high < 0 and better(*pair).low > 0 for pair in pairs.values()]
    plain = [
        flatter(found, trained[ADAM]).high < 0 and better(found, trained[ADAM]).low > 0
        for found, _ in pairs.values()
    ]
    said = [
        f"{name}'s sharpness is {ratio(flatter(*pair))} times that of Adam warmed up alike,"
        f" its test accuracy {points(better(*pair))}"
        for name, pair in pairs.items()
    ]
    alone = trained["InvAdam"], trained[ADAM]
    return Finding(
        "DualAdam: it ends in flatter minima that generalize better",
        Verdict.HOLDS if all(wins) else Verdict.ONLY_UNTUNED if any(plain) else Verdict.NOT_SEEN,
        f"{'; '.join(said)}. InvAdam alone: {ratio(flatter(*alone))} times Adam's,"
        f" {points(better(*alone))}.",
    )


def ratio(decades: Estimate) -> str:
    center, low, high = 10 ** np.array(decades)
    return f"{center:.3f} [{low:.3f}, {high:.3f}]"


def points(x: Estimate) -> str:
    return f"{x.mean:+.2f} [{x.low:+.2f}, {x.high:+.2f}] points"


def draw(escapes: Mapping[str, Escape], trained: Mapping[str, Judged]) -> Figure:
    figure = Figure(figsize=(evidence.WIDTH, 3.8), layout="constrained")
    wells, ends, gains = figure.subplots(1, 3)
    draw_escapes(wells, escapes)
    for name, found in trained.items():
        losses, curvatures = np.log10(found.search.train), np.log10(found.found_sharpness)
        across, along = (x.mean(axis=1) for x in (losses, curvatures))
        ends.plot(across, along, linestyle="", label=name, **style(name))
    entitle(ends, "trained at every rate", "log10 of training loss", "log10 of sharpness")
    draw_gains(gains, trained)
    for axes in (wells, ends, gains):
        tidy(axes)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def draw_escapes(axes: Axes, escapes: Mapping[str, Escape]) -> None:
    for name, found in escapes.items():
        colour = ESCAPING[name].colour
        centers, *ends = np.array([evidence.mean(barriers) for barriers in found.barriers]).T
        dots = {"color": colour, "marker": "o", "markersize": 3.5, "linestyle": "", "capsize": 2}
        axes.errorbar(CURVATURES, centers, abs(centers - ends), label=f"{name} (left)", **dots)
        axes.plot(CURVATURES, found.theory, color=colour, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis, at=[1, 1.5, 2, 3, 4, 5])
    entitle(axes, "escapes; lines are theory", "curvature H", "barrier ΔL / T")


def draw_gains(axes: Axes, trained: Mapping[str, Judged]) -> None:
    axes.axvline(0, color="0.6", linewidth=1)
    axes.axhline(0, color="0.6", linewidth=1)
    for name, found in trained.items():
        if name != ADAM:
            flat, good = (difference(found, trained[ADAM]) for difference in (flatter, better))
            across, along = ([[x.mean - x.low], [x.high - x.mean]] for x in (flat, good))
            axes.errorbar(flat.mean, good.mean, along, across, linewidth=1, **style(name))
    entitle(axes, "tuned, less Adam's", "log10 of sharpness", "test accuracy (points)")


def style(name: str) -> dict[str, Any]:
    """A control is open, and large enough to be seen around what it controls."""
    control = "warm-up" in name
    return {
        "color": TRAINING[name].colour,
        "marker": "s" if str(LONG) in name else "o",
        "markersize": 7 if control else 3.5,
        "fillstyle": "none" if control else "full",
    }


if __name__ == "__main__":
    main()
