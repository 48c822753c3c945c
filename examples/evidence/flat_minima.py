"""DualAdam: does training end in flatter minima, and do these generalize better?

    python examples/evidence/flat_minima.py

Networks of 4,000 parameters are trained on the digits, and every contender is tuned by the same
number of trials. At the end of training the largest eigenvalue of the Hessian and the test accuracy
are measured. The control of DualAdam is Adam with a linear warm-up of the same length. The untuned
baseline is plain Adam where both have the default rate, .001.

DualAdam's inverse term grows with the square of the gradient. With the loss as it is, the term is a
thousandth of DualAdam's steps, so DualAdam is Adam with a warm-up by construction. The script
measures this share: the sum of the norms of the inverse terms in the first phase, divided by the
same sum plus that of Adam's terms on the same gradients. So the claim is judged a second time where
the term acts: with a loss that is 30 or 100 times as large, which leaves Adam unchanged, and with
`scale_free`. The verdicts are on the mean over these variants, seed by seed. There flatness and
generalization are two claims.

At the end of these trainings the loss still falls, so their sharpness is not a final one.
`escapes.py` shows what gradient noise alone does.

In the authors' CIFAR script the blend ends near epoch 32 of 200. DualAdam has no weight decay
there, AdamW and RAdam have 1e-2. Their decay is decoupled, like ours. pytorch_optimizer 4.1 couples
it by default, which is another rule.
"""

import argparse
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
import _networks as networks
import _results as results
import _verdicts as verdicts
from _curvature import apply_smooth, initialize_smooth, sharpness
from _digits import Runs, load_digits, train
from _drawing import (
    AMBER,
    BLUE,
    FIGURE_WIDTH,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    draw_estimates,
    entitle,
    tidy,
)
from _estimates import Estimate
from _networks import CLASSES, Network, cross_entropy
from _progress import two_at_a_time
from _tuning import SEARCH_SEED, Factory, best
from _verdicts import Finding
from optax_ext import dualadam, invadam

HIDDEN = 32
SHORT, LONG = 100, 500
RATES = np.geomspace(1e-3, 0.128, 8)
# The rate of those who do not tune: the authors' default.
UNTUNED = 1e-3
# With the first, the inverse term is about a third of a step; with the second, most of it.
LARGER, LARGEST = 30.0, 100.0
# The number of seeds on which the inverse term is measured.
MEASURED = 4
DECADES = "difference in decades"


def warm_up(steps: int) -> Factory:
    """Return Adam, with a rate that grows like DualAdam's share of Adam."""
    return lambda rate: optax.adam(optax.linear_schedule(rate / steps, rate, steps - 1))


def dual(steps: int, loss_scale: float = 1.0, *, scale_free: bool = False) -> Factory:
    """Return DualAdam with a first phase of this length, for a loss times `loss_scale`."""

    def make(rate: Any) -> optax.GradientTransformation:
        tx = dualadam(rate, switch_rate=1 / steps, scale_free=scale_free)
        return optax.chain(optax.scale(loss_scale), tx)

    return make


class Training(NamedTuple):
    """A contender on the digits.

    Attributes:
      factory: returns the optimizer for a rate.
      rates: the rates that it tries.
      control: the name of its control.
      colour: the colour of its dots.
      steps: the length of the first phase or of the warm-up; 0 without one.
    """

    factory: Factory
    rates: Any
    control: str
    colour: str
    steps: int = 0


ADAM, INVADAM = "Adam", "InvAdam"


def with_control(steps: int) -> dict[str, Training]:
    """Return Adam with a warm-up, DualAdam as published, and DualAdam whose inverse term acts."""
    control, name = f"Adam, warm-up {steps}", f"DualAdam {steps}"
    variants = {
        name: (dual(steps), GREEN),
        f"{name}, loss × {LARGER:.0f}": (dual(steps, LARGER), BLUE),
        f"{name}, loss × {LARGEST:.0f}": (dual(steps, LARGEST), SKY),
        f"{name}, scale-free × {LARGER:.0f}": (dual(steps, LARGER, scale_free=True), AMBER),
    }
    return {control: Training(warm_up(steps), RATES, ADAM, PINK, steps)} | {
        variant: Training(factory, RATES, control, colour, steps)
        for variant, (factory, colour) in variants.items()
    }


TRAINING = {
    ADAM: Training(optax.adam, RATES, ADAM, "0.2"),
    # Its rate is per squared gradient.
    INVADAM: Training(invadam, 300 * RATES, ADAM, ORANGE),
    **with_control(SHORT),
    **with_control(LONG),
}
PLAIN = [f"DualAdam {steps}" for steps in (SHORT, LONG)]
ACTIVE = [name for name in TRAINING if name.startswith("DualAdam") and name not in PLAIN]
# Recorded with the results, which depend on them.
CONSTANTS = {
    "CLASSES": CLASSES,
    "SEARCH_SEED": SEARCH_SEED,
    "HIDDEN": HIDDEN,
    "SHORT": SHORT,
    "LONG": LONG,
    "RATES": RATES,
    "UNTUNED": UNTUNED,
    "LARGER": LARGER,
    "LARGEST": LARGEST,
    "MEASURED": MEASURED,
}
# Indices of the two rates at which every contender runs.
TUNED, AT_UNTUNED = 0, 1


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    trained = two_at_a_time(partial(judge_one, options), TRAINING)
    results.publish(
        "flat_minima",
        options,
        judge(trained),
        {
            "Sharpness": {name: row_of_sharpness(name, trained) for name in trained},
            "Generalization": {name: row_of_test(name, trained) for name in trained},
        },
        {"flat_minima": draw(trained)},
        CONSTANTS,
    )


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        seeds=(16, "initial weights and orders of the images"),
        trials=(4, f"other seeds, on which each of {len(RATES)} rates is tried"),
        steps=(1000, "steps of each training"),
    )


class Judged(NamedTuple):
    """The results of one contender.

    Attributes:
      rate: the best one.
      search: the runs that decided, of shape (rates, seeds).
      found_sharpness: the sharpness of the runs that decided.
      runs: at the best rate and at the untuned one, of shape (2, seeds), from other seeds.
      sharpness: the sharpness of these.
      inverse: the share of the inverse term in the first phase; NaN without one.
    """

    rate: float
    search: Runs
    found_sharpness: Any
    runs: Runs
    sharpness: Any
    inverse: float


def judge_one(options: argparse.Namespace, contender: Training) -> Judged:
    train_on = partial(train, NETWORK, contender.factory, steps=options.steps)
    search = train_on(contender.rates[:, None], SEARCH_SEED + np.arange(options.trials))
    rate = float(contender.rates[best(search.validation)])
    untuned = UNTUNED * contender.rates[0] / RATES[0]
    runs = train_on(np.array([[rate], [untuned]]), np.arange(options.seeds))
    found, other = sharpness_of(search), sharpness_of(runs)
    return Judged(rate, search, found, runs, other, inverse_share(contender, rate, options.steps))


def sharpness_of(runs: Runs) -> Any:
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), runs.params)
    return np.asarray(sharpness_of_each(flat)).reshape(runs.test.shape)


def inverse_share(contender: Training, rate: float, steps: int) -> float:
    """Return the inverse term's part of the steps of the first phase, or NaN without one."""
    steps = min(contender.steps, steps)
    if not steps or contender.control == ADAM:
        return float("nan")
    seeds = range(MEASURED)
    params = networks.initialize(NETWORK.init, np.array(seeds))
    images = len(load_digits().train.labels)
    batches = np.stack([networks.draw_batches(seed, steps, images) for seed in seeds])
    adam = TRAINING[contender.control].factory
    inverse, others = compare_steps(contender.factory, adam, rate, params, batches)
    return float(np.sum(inverse) / np.sum(np.add(inverse, others)))


@partial(jax.jit, static_argnames=("factory", "adam"))
def compare_steps(factory: Factory, adam: Factory, rate: Any, params: Any, batches: Any) -> Any:
    """Train; return the norms of each step without Adam's term, and of Adam's term alone."""
    tx, control = factory(rate), adam(rate)
    data = load_digits().train

    def step(run: Any, batch: Any) -> tuple[Any, Any]:
        params, state, state_of_control = run
        examples = jax.tree.map(lambda x: x[batch], data)
        gradient = jax.grad(partial(cross_entropy, apply))(params, examples)
        updates, state = tx.update(gradient, state, params)
        term, state_of_control = control.update(gradient, state_of_control, params)
        inverse = optax.tree.norm(optax.tree.sub(updates, term))
        run = optax.apply_updates(params, updates), state, state_of_control
        return run, (inverse, optax.tree.norm(term))

    def of_one(params: Any, batches: Any) -> Any:
        return lax.scan(step, (params, tx.init(params), control.init(params)), batches)[1]

    return jax.vmap(of_one)(params, jnp.asarray(batches))


def apply(params: Any, images: jax.Array) -> jax.Array:
    return apply_smooth(params, images.reshape(len(images), -1))


NETWORK = Network(partial(initialize_smooth, widths=(64, HIDDEN, HIDDEN, CLASSES)), apply)


@jax.jit
def sharpness_of_each(params: Any) -> jax.Array:
    """Return the largest eigenvalue of the Hessian of the loss on all training images."""
    train = load_digits().train
    return lax.map(partial(sharpness, lambda p: cross_entropy(apply, p, train)), params)


def row_of_sharpness(name: str, trained: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
    found, other = trained[name], trained[TRAINING[name].control]
    return {
        "rate": f"{found.rate:.3g}",
        "inverse term": "-" if np.isnan(found.inverse) else f"{found.inverse:.2g}",
        "training loss": estimates.mean(found.runs.train[TUNED]),
        "sharpness": estimates.mean(found.sharpness[TUNED]),
        "control": TRAINING[name].control,
        DECADES: estimates.mean(sharper(found, other)),
    }


def row_of_test(name: str, trained: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
    found, other = trained[name], trained[TRAINING[name].control]
    return {
        "test loss": estimates.mean(found.runs.test[TUNED]),
        "accuracy, %": estimates.mean(found.runs.accuracy[TUNED]),
        "control": TRAINING[name].control,
        "difference in points": estimates.mean(better(found, other)),
    }


# Returns the differences of a contender from its control, seed by seed.
Difference = Callable[[Judged, Judged, int], Any]


def sharper(found: Judged, other: Judged, which: int = TUNED) -> Any:
    """Return the difference in decades of the sharpness, seed by seed."""
    return np.log10(found.sharpness[which]) - np.log10(other.sharpness[which])


def better(found: Judged, other: Judged, which: int = TUNED) -> Any:
    """Return the difference in points of test accuracy, seed by seed."""
    return found.runs.accuracy[which] - other.runs.accuracy[which]


def judge(trained: Mapping[str, Judged]) -> list[Finding]:
    shares = [trained[name].inverse for name in PLAIN]
    alone = trained[INVADAM], trained[ADAM]
    plain = finding(
        "DualAdam: it ends in flatter minima that generalize better",
        trained,
        PLAIN,
        (sharper, better),
        f"This is so by construction: the inverse term is {max(shares):.1g} of the steps of the"
        " first phase here, so DualAdam is Adam with a warm-up. InvAdam alone, compared with Adam:"
        f" sharpness × {ratio(estimates.mean(sharper(*alone)))},"
        f" {points(estimates.mean(better(*alone)))}.",
    )
    shares = [trained[name].inverse for name in ACTIVE]
    active = partial(
        finding,
        trained=trained,
        names=ACTIVE,
        comment=f"With a loss times {LARGER:.0f} or {LARGEST:.0f}, or `scale_free`, the inverse"
        f" term is {min(shares):.2f} to {max(shares):.2f} of the steps of the first phase.",
    )
    where = "DualAdam: where its inverse term acts, it"
    return [
        plain,
        active(f"{where} ends in flatter minima", deciding=[sharper]),
        active(f"{where} generalizes better", deciding=[better]),
    ]


def finding(
    claim: str,
    trained: Mapping[str, Judged],
    names: Sequence[str],
    deciding: Sequence[Difference],
    comment: str,
) -> Finding:
    """Judge the mean over these contenders, against their controls and against untuned Adam."""

    def over_all(difference: Difference, which: int) -> Estimate:
        others = {name: TRAINING[name].control if which == TUNED else ADAM for name in names}
        each = [difference(trained[a], trained[b], which) for a, b in others.items()]
        return estimates.mean(np.mean(each, axis=0))

    def gains(which: int) -> list[Estimate]:
        found = {difference: over_all(difference, which) for difference in deciding}
        return [-x if difference is sharper else x for difference, x in found.items()]

    def shown(which: int, differences: Sequence[Difference] = (sharper, better)) -> str:
        found = {difference: over_all(difference, which) for difference in differences}
        return ", ".join(
            in_sharpness(x) if difference is sharper else points(x)
            for difference, x in found.items()
        )

    def sensitivity(difference: Difference) -> str:
        seen = over_all(difference, TUNED)
        unit = " decades of sharpness" if difference is sharper else " points"
        # Two optimizers that do the same have no interval.
        return estimates.sensitivity(seen, unit, 3) if round(seen.smallest_seen, 3) else ""

    return Finding(
        claim,
        verdicts.judge(gains(TUNED), gains(AT_UNTUNED)),
        f"Compared with Adam and a warm-up of the same length, tuned: {shown(TUNED)}. Compared"
        f" with plain Adam, both at rate {UNTUNED}: {shown(AT_UNTUNED)}."
        f" {comment} {' '.join(map(sensitivity, deciding))}".rstrip(),
        untuned=shown(AT_UNTUNED, deciding),
        tuned=shown(TUNED, deciding),
    )


def in_sharpness(x: Estimate) -> str:
    return f"sharpness × {ratio(x)}"


def ratio(decades: Estimate) -> str:
    center, low, high = 10 ** np.array(decades)
    return f"{center:.3f} [{low:.3f}, {high:.3f}]"


def points(x: Estimate) -> str:
    return f"test accuracy {estimates.signed(x, 2)} points"


def draw(trained: Mapping[str, Judged]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 4.8), layout="constrained")
    ends, flat, good = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    for name, found in trained.items():
        losses, curvatures = np.log10(found.search.train), np.log10(found.found_sharpness)
        across, along = (x.mean(axis=1) for x in (losses, curvatures))
        ends.plot(across, along, linestyle="", **style(name))
    entitle(ends, "at every rate that was tried", "log10 of training loss", "log10 of sharpness")
    names = list(trained)
    draw_differences(flat, trained, names, sharper)
    draw_differences(good, trained, names, better)
    flat.set_yticks(range(len(names)), names)
    good.set_yticks(range(len(names)), [""] * len(names))
    entitle(flat, "difference from control:\nleft is flatter", "log10 of sharpness", "")
    entitle(good, "difference from control:\nright is better", "test accuracy (points)", "")
    tidy(ends)
    return figure


def draw_differences(
    axes: Axes, trained: Mapping[str, Judged], names: Sequence[str], difference: Difference
) -> None:
    axes.axvline(0, color="0.6", linewidth=1)
    for i, name in enumerate(names):
        found = difference(trained[name], trained[TRAINING[name].control], TUNED)
        look = {**style(name), "markersize": 5}
        draw_estimates(axes, [i], [estimates.mean(found)], across=True, **look)
    axes.invert_yaxis()
    tidy(axes, grid="x")


def style(name: str) -> dict[str, Any]:
    """Return the look of the dots: those of a control are open and larger, around its method's."""
    control = "warm-up" in name
    return {
        "color": TRAINING[name].colour,
        "marker": "s" if TRAINING[name].steps == LONG else "o",
        "markersize": 8 if control else 4,
        "fillstyle": "none" if control else "full",
    }


if __name__ == "__main__":
    main()
