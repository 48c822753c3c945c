"""CaAdam: is there more to its scales than a larger rate?

    python examples/evidence/connections.py

A residual convnet of 5,000 parameters, whose tensors differ in connections and in depth, is trained
for 18 epochs of the digits with the scales of the authors' three formulas:

- *as it ran*: the scales that the authors' kernels got in their ResNet-20. Keras 3 gives all
  kernels the same name, so their code scaled every kernel like the last layer: × 1.92 (additive) or
  × 4.75 (multiplicative) on CIFAR-10, × 1.18 or × 1.36 on CIFAR-100, the setting that they report.
  Biases got × 2.0 or × 5.6 on CIFAR-10 and × 2.0 or × 5.5 on CIFAR-100;
- *as written*: the formula for each tensor of this network, which decides about the formula;
- *by module*: ours, where a bias has the scale of its kernel; *by computation*: also with the depth
  that is read from the network's computation; *signed*: the multiplicative formula as its authors'
  comment promises it.

The authors ran all optimizers at rate .001, untuned. That is the untuned baseline. All contenders
are then tuned by the same number of rates, and judged on other seeds. A second control has the same
mean rate: Adam at the chosen rate times the mean scale, weighted by parameters. A claim holds
if the test loss is lower than those of tuned Adam and of this control. No interval is corrected for
the number of comparisons.

This script shows nothing about networks whose tensors differ by more, nor about long trainings.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _command_line as command_line
import _estimates as estimates
import _networks as networks
import _results as results
import _verdicts as verdicts
from _digits import Runs, train
from _drawing import (
    AMBER,
    BLUE,
    FIGURE_WIDTH,
    GREEN,
    ORANGE,
    PINK,
    draw_estimates,
    entitle,
    log_ticks,
    tidy,
)
from _estimates import Estimate
from _networks import CLASSES, Network
from _progress import two_at_a_time
from _tuning import SEARCH_SEED, Factory, best
from _verdicts import Finding
from optax_ext import architecture, caadam, connection_table

RATES = np.geomspace(5e-4, 6.4e-2, 8)
# Keras' rate, at which the authors compare all optimizers.
UNTUNED = 1e-3
# The scales of kernels and of biases in the authors' ResNet-20, by formula and data set. Those of
# the biases on CIFAR-10 follow from their formula with 0 connections.
RAN = {
    "additive": {"CIFAR-10": (1.92, 2.0), "CIFAR-100": (1.18, 2.0)},
    "multiplicative": {"CIFAR-10": (4.75, 5.6), "CIFAR-100": (1.36, 5.5)},
}
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
            networks.convolve(x, kernel, (stride, stride), (around, around))
            + bias[None, None, None]
        )

    x = jax.nn.relu(conv("stem", images))
    x = x + conv("block1/conv2", jax.nn.relu(conv("block1/conv1", x))) / 2
    branch = conv("block2/conv2", jax.nn.relu(conv("block2/conv1", x))) / 2
    x = jax.nn.relu(conv("block2/shortcut", x) + branch).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


NETWORK = Network(initialize, apply)
ADAM = "Adam"
# Indices of the two rates at which every contender runs.
TUNED, AT_UNTUNED = 0, 1
SCALINGS = {
    "additive": "additive scales",
    "multiplicative": "multiplicative scales",
    "depth": "scales by depth",
}
WRITTEN = "as written"
FROM_ADAM, FROM_CONTROL = "difference from Adam", "from control"
CONTROL_LABEL = "from the control: Adam at the rate times the mean scale"
# The limits of the drawn validation losses.
LEAST_LOSS, LARGEST_LOSS = 0.1, 10.0
LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False}
COLOURS = {
    "as it ran, CIFAR-10": PINK,
    "as it ran, CIFAR-100": AMBER,
    WRITTEN: ORANGE,
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
      mean_scale: the contender's mean scale, weighted by parameters.
      search: the runs that decided, of shape (rates, seeds).
      runs: at the best rate and at the untuned one, of shape (2, seeds).
      control: the runs of Adam at these rates times the mean scale.
    """

    rate: float
    mean_scale: float
    search: Runs
    runs: Runs
    control: Runs


# Recorded with the results, which depend on them.
CONSTANTS = {
    "CLASSES": CLASSES,
    "SEARCH_SEED": SEARCH_SEED,
    "RATES": RATES,
    "UNTUNED": UNTUNED,
    "RAN": [list(of_data.values()) for of_data in RAN.values()],
    "FEATURES": FEATURES,
    "TUNED": TUNED,
    "AT_UNTUNED": AT_UNTUNED,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    judged = two_at_a_time(partial(judge_one, options), make_contenders())
    tables = {
        f"{title}; differences of the test loss are seed by seed": {
            name: row(found, judged[ADAM], which) for name, found in judged.items()
        }
        for which, title in enumerate(("Tuned", f"At rate {UNTUNED}"))
    }
    figures = {"connections": draw(judged)}
    results.publish("connections", options, judge(judged), tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        seeds=(16, "initial weights and orders of the images"),
        trials=(4, f"other seeds, on which each of {len(RATES)} rates is tried"),
        steps=(300, "steps of each training"),
    )


def make_contenders() -> dict[str, Contender]:
    params = jax.eval_shape(initialize, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    by_computation = architecture(apply, params, image)
    # The order in which Keras creates variables. The default is the order of their names.
    leaves = [f"{layer}/{leaf}" for layer in LAYERS for leaf in ("kernel", "bias")]
    created = {leaf: {"depth": float(i)} for i, leaf in enumerate(leaves)}
    written: dict[str, Any] = {"units": "leaf"}

    def by(scaling: str, **how: Any) -> Contender:
        table = connection_table(params, scaling=scaling, **how)
        return Contender(partial(caadam, scaling=scaling, **how), table.mean_scale)

    def as_it_ran(scaling: str, data: str) -> Contender:
        kernel, bias = RAN[scaling][data]
        scales = {x: {"scale": kernel if x.endswith("kernel") else bias} for x in leaves}
        return by(scaling, overrides=scales, **written)

    return {
        ADAM: Contender(optax.adam, 1.0),
        "additive, as it ran, CIFAR-10": as_it_ran("additive", "CIFAR-10"),
        "additive, as it ran, CIFAR-100": as_it_ran("additive", "CIFAR-100"),
        "additive, as written": by("additive", **written),
        "additive, by module": by("additive"),
        "multiplicative, as it ran, CIFAR-10": as_it_ran("multiplicative", "CIFAR-10"),
        "multiplicative, as it ran, CIFAR-100": as_it_ran("multiplicative", "CIFAR-100"),
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
    rate = float(RATES[best(search.validation)])
    rates = np.array([[rate], [UNTUNED]])
    runs = train_on(contender.factory, rates, np.arange(options.seeds))
    control = train_on(optax.adam, contender.mean_scale * rates, np.arange(options.seeds))
    return Judged(rate, contender.mean_scale, search, runs, control)


def differences(found: Runs, other: Runs, which: int) -> Any:
    """Return the differences of the test losses, seed by seed."""
    return found.test[which] - other.test[which]


def row(found: Judged, adam: Judged, which: int) -> dict[str, Estimate | float | str]:
    return {
        "mean scale": found.mean_scale,
        "rate": (found.rate, UNTUNED)[which],
        "test loss": estimates.mean(found.runs.test[which]),
        "accuracy, %": estimates.mean(found.runs.accuracy[which]),
        FROM_ADAM: estimates.mean(differences(found.runs, adam.runs, which)),
        FROM_CONTROL: estimates.mean(differences(found.runs, found.control, which)),
    }


def judge(judged: Mapping[str, Judged]) -> list[Finding]:
    as_they_ran = [
        finding(
            judged,
            scaling,
            f"CaAdam: {SCALINGS[scaling]} train better than Adam, as the authors' code ran",
            [how for how in with_scaling(judged, scaling) if is_as_it_ran(how)],
        )
        for scaling in RAN
    ]
    formulas = [
        finding(judged, scaling, f"CaAdam: {in_words} train better than Adam", [WRITTEN])
        for scaling, in_words in SCALINGS.items()
    ]
    return as_they_ran + formulas


def finding(
    judged: Mapping[str, Judged], scaling: str, claim: str, deciding: Sequence[str]
) -> Finding:
    """Judge the mean over the deciding contenders; the text has the others of this scaling too."""
    mine = with_scaling(judged, scaling)
    adam = judged[ADAM].runs
    shown = list(deciding) + [x for x in mine if WRITTEN in deciding and not is_as_it_ran(x)]

    def from_adam(how: str, which: int) -> Any:
        return differences(mine[how].runs, adam, which)

    def from_control(how: str, which: int) -> Any:
        return differences(mine[how].runs, mine[how].control, which)

    def over_deciding(difference: Callable[[str, int], Any], which: int) -> Estimate:
        return estimates.mean(np.mean([difference(how, which) for how in deciding], axis=0))

    def listed(difference: Callable[[str, int], Any], which: int) -> str:
        each = {how: estimates.mean(difference(how, which)) for how in dict.fromkeys(shown)}
        return ", ".join(f"{how} {estimates.signed(x)}" for how, x in each.items())

    tuned, control = (over_deciding(x, TUNED) for x in (from_adam, from_control))
    untuned = over_deciding(from_adam, AT_UNTUNED)
    return Finding(
        claim,
        verdicts.judge([-tuned, -control], [-untuned]),
        f"Differences of the test loss. From Adam, both at rate {UNTUNED}"
        f" ({adam.test[AT_UNTUNED].mean():.3f}): {listed(from_adam, AT_UNTUNED)}; from Adam at"
        f" that rate times the mean scale: {listed(from_control, AT_UNTUNED)}. From Adam, both"
        f" tuned ({adam.test[TUNED].mean():.3f}): {listed(from_adam, TUNED)}; from Adam at the"
        f" tuned rate times the mean scale: {listed(from_control, TUNED)}."
        f" {estimates.sensitivity(tuned)}",
        untuned=f"test loss {estimates.signed(untuned)}",
        tuned=f"test loss {estimates.signed(tuned)}",
    )


def is_as_it_ran(how: str) -> bool:
    return how.startswith("as it ran")


def with_scaling(judged: Mapping[str, Judged], scaling: str) -> dict[str, Judged]:
    """Return the contenders with this scaling, by the rest of their names."""
    return {
        name.partition(", ")[2]: found for name, found in judged.items() if name.startswith(scaling)
    }


def draw(judged: Mapping[str, Judged]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 8.2), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    above, below = rows
    panels: Any = above.subplots(1, 3, sharey=True)
    labels: dict[str, Any] = {}
    for axes, scaling in zip(panels, SCALINGS, strict=True):
        labels |= draw_searches(axes, {ADAM: judged[ADAM], **with_scaling(judged, scaling)})
        entitle(axes, SCALINGS[scaling], "rate × mean scale", "")
    panels[0].set_ylabel("validation loss", fontsize=9)
    above.legend(labels.values(), labels, loc="outside upper center", ncols=4, **LEGEND)
    untuned, tuned = below.subplots(1, 2, sharey=True)
    draw_differences(untuned, judged, AT_UNTUNED)
    draw_differences(tuned, judged, TUNED)
    entitle(untuned, f"difference from Adam, both at rate {UNTUNED}", "test loss", "")
    entitle(tuned, "difference from Adam, both tuned", "test loss", "")
    handles, _ = tuned.get_legend_handles_labels()
    below.legend(handles=handles, loc="outside lower center", ncols=2, **LEGEND)
    return figure


def draw_searches(axes: Axes, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Draw losses and their intervals at equivalent rates of Adam.

    Where a curve lies on Adam's, the scales only change the rate.
    """
    lines = {}
    for how, found in judged.items():
        losses = [estimates.mean(np.minimum(x, LARGEST_LOSS)) for x in found.search.validation]
        # On a logarithmic axis an interval cannot reach 0.
        drawn = [x._replace(low=max(x.low, LEAST_LOSS)) for x in losses]
        places, look = RATES * found.mean_scale, {"color": COLOURS.get(how, "0.2"), "markersize": 3}
        draw_estimates(axes, places, drawn, linestyle="", alpha=0.45, elinewidth=0.7, **look)
        (lines[how],) = axes.plot(places, [x.mean for x in losses], marker="o", **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(LEAST_LOSS, 1)
    log_ticks(axes.xaxis, at=[1])
    log_ticks(axes.yaxis, at=[1, 2, 3, 5])
    tidy(axes)
    return lines


def draw_differences(axes: Axes, judged: Mapping[str, Judged], which: int) -> None:
    """Draw the differences of the test loss from Adam and from the control, with intervals."""
    axes.axvline(0, color="0.6", linewidth=1)
    adam = judged[ADAM].runs
    names = [name for name in judged if name != ADAM]
    for i, name in enumerate(names):
        found, colour = judged[name], COLOURS[name.partition(", ")[2]]
        for shift, other, fill in ((-0.17, adam, "full"), (0.17, found.control, "none")):
            gain = [estimates.mean(differences(found.runs, other, which))]
            look = {"color": colour, "fillstyle": fill}
            draw_estimates(axes, [i + shift], gain, across=True, **look)
    for fill, label in (("full", "from Adam"), ("none", CONTROL_LABEL)):
        axes.plot([], [], "o", color="0.2", markersize=4, fillstyle=fill, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    tidy(axes, grid="x")


if __name__ == "__main__":
    main()
