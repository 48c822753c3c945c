"""CaAdam: is there more to its scales than a larger rate?

    python examples/evidence/connections.py

A residual convnet, whose tensors differ in connections and in depth, is trained by the authors'
three formulas as they ran (Keras 3 names all kernels alike, so that each was scaled like the last),
by these as written, by ours for whole modules, by ours with the depth that is read from the
computation, and by the multiplicative one as its authors' comment promises it, signed. Each tries
the same rates, as Adam does, and is judged by other seeds. A control trains along: Adam at the rate
times the mean of the scales, weighted by parameters. What ran is but another rate, and decides
nothing; the intervals of the others are not corrected for their number.

In the authors' own ResNet-20, what ran multiplied the rate of all kernels by 1.92 (additive) or
4.75 (multiplicative) on CIFAR-10, and by 1.18 or 1.36 on CIFAR-100, the setting that they report;
biases and normalizations got 2.0 or 5.5 times the rate. All their optimizers ran at .001, untuned.

What some 4,000 parameters and 18 epochs can't show: the scales of networks whose tensors differ by
more, and what is gained late in a long training.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _evidence as evidence
from _evidence import (
    BLUE,
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
    best,
    entitle,
    log_ticks,
    tidy,
    train,
)
from optax_ext import architecture, caadam, connection_table

RATES = np.geomspace(5e-4, 6.4e-2, 8)
# The authors compare all optimizers at Keras' rate, tuning none.
UNTUNED = 1e-3
# Window, inputs, outputs, stride, in the order of creation, which is Keras'.
CONVOLUTIONS = {
    "stem": (3, 1, 8, 2),
    "block1/conv1": (3, 8, 8, 1),
    "block1/conv2": (3, 8, 8, 1),
    "block2/shortcut": (1, 8, 16, 2),
    "block2/conv1": (3, 8, 16, 2),
    "block2/conv2": (3, 16, 16, 1),
}
LAYERS = (*CONVOLUTIONS, "head")
FEATURES = 16


def initialize(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, len(LAYERS))
    shapes = {name: (n, n, *channels) for name, (n, *channels, _) in CONVOLUTIONS.items()}
    shapes["head"] = (FEATURES, CLASSES)
    he = jax.nn.initializers.he_normal()
    return {
        name: {"kernel": he(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Apply two residual blocks without normalization, the second with a projection shortcut."""

    def conv(name: str, x: jax.Array) -> jax.Array:
        window, *_, stride = CONVOLUTIONS[name]
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        around = (window // 2, window // 2)
        return (
            evidence.convolve(x, kernel, (stride, stride), (around, around))
            + bias[None, None, None]
        )

    x = jax.nn.relu(conv("stem", images))
    x = x + conv("block1/conv2", jax.nn.relu(conv("block1/conv1", x))) / 2
    branch = conv("block2/conv2", jax.nn.relu(conv("block2/conv1", x))) / 2
    x = jax.nn.relu(conv("block2/shortcut", x) + branch).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


NETWORK = Network(initialize, apply)
ADAM = "Adam"
# Each contender runs at both of its rates.
TUNED, AT_UNTUNED = 0, 1
SCALINGS = {
    "additive": "additive scales",
    "multiplicative": "multiplicative scales",
    "depth": "scales by depth",
}
LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False}
COLOURS = {
    "as it ran": PINK,
    "as written": ORANGE,
    "by module": BLUE,
    "signed, by module": "0.6",
    "by computation": GREEN,
}


class Contender(NamedTuple):
    """A method: an optimizer for a rate, and the mean of its scales, weighted by parameters."""

    factory: Factory
    mean_scale: float


class Judged(NamedTuple):
    """The results of one contender.

    Attributes:
      rate: the best one.
      mean_scale: of the contender.
      search: the runs that decided, of shape (rates, seeds).
      runs: at the best rate, and at the untuned one, of shape (2, seeds).
      control: those of Adam at the mean scale times these rates.
    """

    rate: float
    mean_scale: float
    search: Runs
    runs: Runs
    control: Runs


# They decide the results, and are recorded with them.
CONSTANTS = {
    "CLASSES": CLASSES,
    "SEARCH_SEED": SEARCH_SEED,
    "RATES": RATES,
    "UNTUNED": UNTUNED,
    "FEATURES": FEATURES,
    "TUNED": TUNED,
    "AT_UNTUNED": AT_UNTUNED,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    judged = evidence.side_by_side(partial(judge_one, options), make_contenders())
    tables = {
        f"{title}; − is less the test loss of others, seed by seed": {
            name: row(found, judged[ADAM], which) for name, found in judged.items()
        }
        for which, title in enumerate(("Tuned", f"At rate {UNTUNED}"))
    }
    figures = {"connections": draw(judged)}
    evidence.publish("connections", options, judge(judged), tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        seeds=(16, "initial weights and orders of the images"),
        trials=(4, f"seeds apart on which each of {len(RATES)} rates is tried"),
        steps=(300, "of each training"),
    )


def make_contenders() -> dict[str, Contender]:
    params = jax.eval_shape(initialize, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    by_computation = architecture(apply, params, image)
    # Keras counts variables as they were created; without this it would be by name.
    leaves = [f"{layer}/{leaf}" for layer in LAYERS for leaf in ("kernel", "bias")]
    created = {leaf: {"depth": float(i)} for i, leaf in enumerate(leaves)}
    written: dict[str, Any] = {"units": "leaf"}

    def by(scaling: str, **how: Any) -> Contender:
        table = connection_table(params, scaling=scaling, **how)
        return Contender(partial(caadam, scaling=scaling, **how), table.mean_scale)

    def as_it_ran(scaling: str) -> Contender:
        table = connection_table(params, scaling=scaling, **written)
        last = next(unit.scale for unit in table if unit.path == f"{LAYERS[-1]}/kernel")
        alike = {leaf: {"scale": float(last)} for leaf in leaves if leaf.endswith("kernel")}
        return by(scaling, overrides=alike, **written)

    return {
        ADAM: Contender(optax.adam, 1.0),
        "additive, as it ran": as_it_ran("additive"),
        "additive, as written": by("additive", **written),
        "additive, by module": by("additive"),
        "multiplicative, as it ran": as_it_ran("multiplicative"),
        "multiplicative, as written": by("multiplicative", **written),
        "multiplicative, by module": by("multiplicative"),
        "multiplicative, signed, by module": by("signed"),
        "depth, as written": by("depth", overrides=created, **written),
        "depth, by module": by("depth"),
        "depth, by computation": by("depth", architecture=by_computation),
    }


def judge_one(options: argparse.Namespace, contender: Contender) -> Judged:
    train_on = partial(train, NETWORK, steps=options.steps)
    searching = SEARCH_SEED + np.arange(options.trials)
    search = train_on(contender.factory, RATES[:, None], searching)
    rate = float(RATES[best(search)])
    rates = np.array([[rate], [UNTUNED]])
    runs = train_on(contender.factory, rates, np.arange(options.seeds))
    control = train_on(optax.adam, contender.mean_scale * rates, np.arange(options.seeds))
    return Judged(rate, contender.mean_scale, search, runs, control)


def less(found: Runs, other: Runs, which: int) -> Estimate:
    """Return the difference of the test losses, seed by seed."""
    return evidence.mean(found.test[which] - other.test[which])


def row(found: Judged, adam: Judged, which: int) -> dict[str, Estimate | float | str]:
    return {
        "mean scale": found.mean_scale,
        "rate": (found.rate, UNTUNED)[which],
        "test loss": evidence.mean(found.runs.test[which]),
        "accuracy, %": evidence.mean(found.runs.accuracy[which]),
        "− Adam": less(found.runs, adam.runs, which),
        "− control": less(found.runs, found.control, which),
    }


def judge(judged: Mapping[str, Judged]) -> list[Finding]:
    return [
        finding(judged, scaling, f"CaAdam: {in_words} train better than Adam")
        for scaling, in_words in SCALINGS.items()
    ]


def finding(judged: Mapping[str, Judged], scaling: str, claim: str) -> Finding:
    """Judge all contenders with this scaling; the formulas as they ran only change the rate."""
    mine = with_scaling(judged, scaling)
    claimed = [how for how in mine if how != "as it ran"]
    adam = judged[ADAM].runs

    def less_adam(which: int) -> dict[str, Estimate]:
        return {how: less(found.runs, adam, which) for how, found in mine.items()}

    def less_control(which: int) -> dict[str, Estimate]:
        return {how: less(found.runs, found.control, which) for how, found in mine.items()}

    if any(less_adam(TUNED)[how].high < 0 and less_control(TUNED)[how].high < 0 for how in claimed):
        verdict = Verdict.HOLDS
    elif any(less_adam(AT_UNTUNED)[how].high < 0 for how in claimed):
        verdict = Verdict.ONLY_UNTUNED
    else:
        verdict = Verdict.NOT_SEEN
    return Finding(
        claim,
        verdict,
        f"Test loss beside Adam's {adam.test[TUNED].mean():.3f}, both tuned:"
        f" {listed(less_adam(TUNED))}; beside Adam at the mean scale times the rate:"
        f" {listed(less_control(TUNED))}. Beside Adam's {adam.test[AT_UNTUNED].mean():.3f}, both at"
        f" rate {UNTUNED}: {listed(less_adam(AT_UNTUNED))}; beside Adam at the mean scale times"
        f" that: {listed(less_control(AT_UNTUNED))}.",
    )


def with_scaling(judged: Mapping[str, Judged], scaling: str) -> dict[str, Judged]:
    """Return the contenders by what distinguishes them."""
    return {
        name.partition(", ")[2]: found for name, found in judged.items() if name.startswith(scaling)
    }


def listed(differences: Mapping[str, Estimate]) -> str:
    return ", ".join(
        f"{how} {x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]" for how, x in differences.items()
    )


def draw(judged: Mapping[str, Judged]) -> Figure:
    figure = Figure(figsize=(evidence.WIDTH, 6.4), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    above, below = rows
    (additive, multiplicative), (depth, gains) = above.subplots(1, 2), below.subplots(1, 2)
    labels: dict[str, Any] = {}
    for axes, scaling in zip((additive, multiplicative, depth), SCALINGS, strict=True):
        labels |= draw_searches(axes, {ADAM: judged[ADAM], **with_scaling(judged, scaling)})
        axes.sharey(additive)
        entitle(axes, SCALINGS[scaling], "rate × mean scale", "validation loss")
    draw_gains(gains, judged)
    above.legend(labels.values(), labels, loc="outside upper center", ncols=6, **LEGEND)
    return figure


def draw_searches(axes: Axes, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Draw losses at equivalent rates of Adam; its curve is that of a mere change of the rate."""
    lines = {}
    for how, found in judged.items():
        losses = found.search.validation.mean(axis=1)
        dots = {"color": COLOURS.get(how, "0.2"), "marker": "o", "markersize": 3}
        (lines[how],) = axes.plot(RATES * found.mean_scale, losses, **dots)
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis, at=[1])
    log_ticks(axes.yaxis, at=[1, 2, 3, 5])
    tidy(axes)
    return lines


def draw_gains(axes: Axes, judged: Mapping[str, Judged]) -> None:
    """Draw the intervals of the differences that decide."""
    axes.axvline(0, color="0.6", linewidth=1)
    adam = judged[ADAM].runs
    names = [name for name in judged if name != ADAM]
    for i, name in enumerate(names):
        found, colour = judged[name], COLOURS[name.partition(", ")[2]]
        for shift, other, fill in ((-0.15, adam, "full"), (0.15, found.control, "none")):
            gain = [less(found.runs, other, TUNED)]
            look = {"color": colour, "fillstyle": fill}
            evidence.draw_estimates(axes, [i + shift], gain, across=True, **look)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    entitle(axes, "tuned: less Adam's, the control's (open)", "test loss", "")
    tidy(axes, grid="x")


if __name__ == "__main__":
    main()
