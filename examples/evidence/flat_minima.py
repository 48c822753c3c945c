"""DualAdam: does training end in flatter minima, and do these generalize better?

    python examples/evidence/flat_minima.py

Trainings on the digits, all tuned by as many trials, DualAdam beside Adam with a linear warm-up of
the same length: the largest eigenvalue of the Hessian, and the test accuracy.

Not to be seen here: a sharpness that no longer changes, for at the end of these trainings of some
4,000 parameters the loss is still falling. What noise alone does is told by `escapes.py`.

In the authors' CIFAR script the blend ends near epoch 32 of 200; it decays by 0, their AdamW and
RAdam by 1e-2. Their decay is decoupled, as ours; that of pytorch_optimizer 4.1 is coupled by
default, and so another rule.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _evidence as evidence
from _evidence import (
    CLASSES,
    GREEN,
    ORANGE,
    PINK,
    SEARCH_SEED,
    Estimate,
    Factory,
    Finding,
    Network,
    Runs,
    Verdict,
    apply_smooth,
    best,
    cross_entropy,
    entitle,
    initialize_smooth,
    load_digits,
    sharpness,
    tidy,
    train,
)
from optax_ext import dualadam, invadam

HIDDEN = 32
SHORT, LONG = 100, 500
RATES = np.geomspace(1e-3, 0.128, 8)


def warm_up(steps: int) -> Factory:
    """Return Adam, with a rate that grows like DualAdam's share of Adam."""
    return lambda rate: optax.adam(optax.linear_schedule(rate / steps, rate, steps - 1))


def dual(steps: int) -> Factory:
    """Return DualAdam, with a first phase of this length."""
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


# They decide the results, and are recorded with them.
CONSTANTS = {
    "CLASSES": CLASSES,
    "SEARCH_SEED": SEARCH_SEED,
    "HIDDEN": HIDDEN,
    "SHORT": SHORT,
    "LONG": LONG,
    "RATES": RATES,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    trained = evidence.side_by_side(partial(judge_one, options), TRAINING)
    title = "On the digits; − is less another's, seed by seed"
    rows = {name: row(name, trained) for name in trained}
    evidence.publish(
        "flat_minima",
        options,
        [judge(trained)],
        {title: rows},
        {"flat_minima": draw(trained)},
        CONSTANTS,
    )


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        seeds=(16, "initial weights and orders of the images"),
        trials=(4, f"seeds apart on which each of {len(RATES)} rates is tried"),
        steps=(1000, "of each training"),
    )


class Judged(NamedTuple):
    """The results of one contender.

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


def judge_one(options: argparse.Namespace, contender: Training) -> Judged:
    train_on = partial(train, NETWORK, contender.factory, steps=options.steps)
    search = train_on(contender.rates[:, None], SEARCH_SEED + np.arange(options.trials))
    rate = float(contender.rates[best(search)])
    runs = train_on(rate, np.arange(options.seeds))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), search.params)
    found = np.asarray(sharpness_of_each(flat)).reshape(search.test.shape)
    return Judged(rate, search, runs, np.asarray(sharpness_of_each(runs.params)), found)


def apply(params: Any, images: jax.Array) -> jax.Array:
    return apply_smooth(params, images.reshape(len(images), -1))


NETWORK = Network(partial(initialize_smooth, widths=(64, HIDDEN, HIDDEN, CLASSES)), apply)


@jax.jit
def sharpness_of_each(params: Any) -> jax.Array:
    """Return the largest eigenvalue of the Hessian of the loss on all training images."""
    train = load_digits().train
    return lax.map(partial(sharpness, lambda p: cross_entropy(apply, p, train)), params)


def row(name: str, trained: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
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
    """Return the difference in decades of the sharpness, seed by seed."""
    return evidence.mean(np.log10(found.sharpness) - np.log10(other.sharpness))


def better(found: Judged, other: Judged) -> Estimate:
    """Return the difference in points of test accuracy, seed by seed."""
    return evidence.mean(found.runs.accuracy - other.runs.accuracy)


def judge(trained: Mapping[str, Judged]) -> Finding:
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
    losses = [found.runs.train.mean() for found in alone]
    return Finding(
        "DualAdam: it ends in flatter minima that generalize better",
        Verdict.HOLDS if all(wins) else Verdict.ONLY_UNTUNED if any(plain) else Verdict.NOT_SEEN,
        f"{'; '.join(said)}. InvAdam alone: {ratio(flatter(*alone))} times Adam's, at a training"
        f" loss of {losses[0]:.3g} instead of {losses[1]:.3g}, {points(better(*alone))}.",
    )


def ratio(decades: Estimate) -> str:
    center, low, high = 10 ** np.array(decades)
    return f"{center:.3f} [{low:.3f}, {high:.3f}]"


def points(x: Estimate) -> str:
    return f"{x.mean:+.2f} [{x.low:+.2f}, {x.high:+.2f}] points"


def draw(trained: Mapping[str, Judged]) -> Figure:
    figure = Figure(figsize=(evidence.WIDTH, 3.8), layout="constrained")
    ends, gains = figure.subplots(1, 2)
    for name, found in trained.items():
        losses, curvatures = np.log10(found.search.train), np.log10(found.found_sharpness)
        across, along = (x.mean(axis=1) for x in (losses, curvatures))
        ends.plot(across, along, linestyle="", label=name, **style(name))
    entitle(ends, "trained at every rate", "log10 of training loss", "log10 of sharpness")
    draw_gains(gains, trained)
    for axes in (ends, gains):
        tidy(axes)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


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
    """Draw all seeds; a control's dots are open, and visible around those of its method."""
    control = "warm-up" in name
    return {
        "color": TRAINING[name].colour,
        "marker": "s" if str(LONG) in name else "o",
        "markersize": 7 if control else 3.5,
        "fillstyle": "none" if control else "full",
    }


if __name__ == "__main__":
    main()
