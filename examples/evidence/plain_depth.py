"""NOVAK: does it train deep plain networks more reliably, and which of its parts does?

    python examples/evidence/plain_depth.py

Convnets of three depths, without skip connections or normalization, are trained on the digits. A
training succeeds if the network classifies more than half of its training images in the end. Those
that fail stay at a tenth. AdamW, RAdam and NOVAK train each network from the same seeds at the same
rates, from rates too small for 500 steps to rates too large. Variants of NOVAK
with one part changed train only the deepest network. All use the same weight decay.

"Reliably" is measured by the width of the range of rates that succeed, in decades. Accuracy is
measured at the best rate: that of a seed is the rate that is best on all other seeds. The untuned
baseline is AdamW where both have one rate, that of the sweep next to the usual .001.

Depths and batches were chosen on the seeds 0 to 11, so that some trainings fail and others do not.
The results are from seeds from 100 on.

NOVAK's authors published no code. The optimizer here is a reconstruction from the paper's abstract
and from a summary of its equations, so a verdict is on this reconstruction. Widths are multiples of
half a decade, the spacing of the rates.

This script shows nothing about networks as large as VGG-16, nor about trainings so long that the
first steps, which rectification slows, are few of them. It shows little about decay, since the
deepest of these networks barely fits the images. The claim that decay at the effective rate costs
4 to 8 points on CIFAR-100 is second-hand and weak: it is only in machine-written tables, and no
code is public.
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
import _results as results
import _verdicts as verdicts
from _digits import Runs, train
from _drawing import BLUE, FIGURE_WIDTH, GREEN, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _estimates import Estimate
from _networks import CLASSES, Network
from _progress import two_at_a_time
from _tuning import Factory, best_on_others
from _verdicts import Finding
from optax_ext import novak

FROM_NOVAK = "from NOVAK"
# The first layer makes this number of channels from 2 × 2 pixels; the others keep the shape.
CHANNELS, STEM, SIDE = 4, 2, 4
FEATURES = SIDE * SIDE * CHANNELS
# The networks have this number of convolutions, twice the number, three times the number, ….
SHALLOWEST = 6
RATES = np.geomspace(5e-5, 0.3, 9)
SPACING = float(np.log10(RATES[1] / RATES[0]))
BATCH = 16
FIRST_SEED = 100
# Strong enough that 500 steps show how the decay is coupled.
DECAY = 0.1
# A training succeeds above this accuracy on its images, in per cent.
TRAINED = 50
# The index of the rate next to .001, the usual one of those who do not tune.
UNTUNED = int(np.abs(np.log(RATES / 1e-3)).argmin())


def make_network(depth: int) -> Network:
    """Return a network of `depth` convolutions with ReLU and a dense layer, not normalized."""
    return Network(partial(initialize, depth), apply)


def initialize(depth: int, key: jax.Array) -> Any:
    """Return weights after He et al.; all 3 × 3 kernels are one leaf."""
    first, hidden, last = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    kernels = [he(k, (3, 3, CHANNELS, CHANNELS)) for k in jax.random.split(hidden, depth - 1)]
    return {
        "first": {"kernel": he(first, (STEM, STEM, 1, CHANNELS)), "bias": jnp.zeros(CHANNELS)},
        "hidden": {"kernel": jnp.stack(kernels), "bias": jnp.zeros((depth - 1, CHANNELS))},
        "last": {"kernel": he(last, (FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Return the logits of images of shape (N, 8, 8, 1)."""
    x = jax.nn.relu(embed(params["first"], images))
    x, _ = lax.scan(lambda x, layer: (jax.nn.relu(convolve(layer, x)), None), x, params["hidden"])
    return x.reshape(len(x), -1) @ params["last"]["kernel"] + params["last"]["bias"][None]


def embed(params: Any, images: jax.Array) -> jax.Array:
    """Convolve with a stride of the kernel's side; the result is (N, pixels, channels)."""
    patches = images.reshape(-1, SIDE, STEM, SIDE, STEM).swapaxes(2, 3)
    kernel = params["kernel"].reshape(STEM * STEM, CHANNELS)
    return patches.reshape(-1, SIDE * SIDE, STEM * STEM) @ kernel + params["bias"][None, None]


def convolve(params: Any, x: jax.Array) -> jax.Array:
    """Convolve with a 3 × 3 kernel and zero padding, by a matrix between all pixels and channels.

    XLA's convolutions, of many networks with a kernel each, take a CPU ten times as long.
    """
    kernel = params["kernel"].reshape(9, CHANNELS, CHANNELS)
    matrix = jnp.einsum("kpq,kio->piqo", TAPS, kernel).reshape(FEATURES, FEATURES)
    return (x.reshape(-1, FEATURES) @ matrix).reshape(x.shape) + params["bias"][None, None]


def find_taps() -> np.ndarray:
    """Return 1 where a tap of the kernel reads pixel p for pixel q: (taps, pixels, pixels)."""
    shifts = [np.eye(SIDE, k=-offset, dtype=np.float32) for offset in (-1, 0, 1)]
    return np.stack([np.kron(down, across) for down in shifts for across in shifts])


TAPS = find_taps()


def radam(rate: Any) -> optax.GradientTransformation:
    """Return RAdam with AdamW's decay."""
    return optax.chain(
        optax.scale_by_radam(),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(rate),
    )


def novak_with(**changes: Any) -> Factory:
    return partial(novak, weight_decay=DECAY, **changes)


ADAMW, RADAM, NOVAK = "AdamW", "RAdam", "NOVAK"
FALLBACK, EFFECTIVE = "RAdam's fallback", "effective decay"
CONTENDERS: dict[str, Factory] = {
    ADAMW: partial(optax.adamw, weight_decay=DECAY),
    RADAM: radam,
    NOVAK: novak_with(),
    "no rectification": novak_with(rectify=False),
    FALLBACK: novak_with(rectify_fallback="momentum"),
    EFFECTIVE: novak_with(decay_coupling="effective"),
    "Nesterov: nadam": novak_with(nesterov="nadam"),
    "Nesterov: scheduled": novak_with(nesterov="nadam_scheduled"),
    "Nesterov: classical": novak_with(nesterov="classical"),
    "Nesterov: hybrid": novak_with(nesterov="hybrid"),
    "no lookahead": novak_with(lookahead="none"),
    "rotating lookahead": novak_with(lookahead="rotating"),
}
# The colours of the contenders that run at every depth.
COLOURS = {ADAMW: "0.2", RADAM: BLUE, NOVAK: ORANGE}


class Cell(NamedTuple):
    """A contender's name, and the network that it trains."""

    network: Network
    depth: int
    name: str


class Judged(NamedTuple):
    """A contender at one depth.

    Attributes:
      runs: the runs, of shape (rates, seeds).
      chosen: for each seed, the index of the rate that is best on the other seeds.
    """

    runs: Runs
    chosen: Any

    def at_best(self, values: Any) -> Any:
        """Return the values of shape (rates, seeds) for each seed's rate."""
        return values[self.chosen, np.arange(len(self.chosen))]

    @property
    def trained(self) -> Any:
        """Whether each run succeeded, of shape (rates, seeds)."""
        return self.runs.train_accuracy > TRAINED

    @property
    def decades(self) -> Any:
        """The width of the rates that succeed for each seed, in decades."""
        return SPACING * self.trained.sum(axis=0)


# The outcomes by depth and name.
Outcomes = Mapping[int, Mapping[str, Judged]]
# Recorded with the results, which depend on them.
CONSTANTS = {
    "SHALLOWEST": SHALLOWEST,
    "RATES": RATES,
    "SPACING": SPACING,
    "BATCH": BATCH,
    "FIRST_SEED": FIRST_SEED,
    "DECAY": DECAY,
    "TRAINED": TRAINED,
    "UNTUNED": UNTUNED,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.seeds == 1:
        parser.error("--seeds must be 2 or more, because other seeds choose a rate, got 1")
    depths = [SHALLOWEST * (i + 1) for i in range(options.depths)]
    cells = {
        f"{name}, {depth} layers": Cell(make_network(depth), depth, name)
        for depth in depths
        for name in (CONTENDERS if depth == depths[-1] else COLOURS)
    }
    judged = two_at_a_time(partial(judge_one, options), cells)
    outcomes: dict[int, dict[str, Judged]] = {depth: {} for depth in depths}
    for label, (_, depth, name) in cells.items():
        outcomes[depth][name] = judged[label]
    tables = {
        f"{depth} convolutions; differences of the accuracy are seed by seed": {
            name: row(found, by_name) for name, found in by_name.items()
        }
        for depth, by_name in outcomes.items()
    }
    results.publish(
        "plain_depth", options, judge(outcomes), tables, {"plain_depth": draw(outcomes)}, CONSTANTS
    )


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        depths=(3, f"networks, of {SHALLOWEST}, {2 * SHALLOWEST}, … convolutions"),
        seeds=(10, f"initial weights and orders of the images, at each of {len(RATES)} rates"),
        steps=(500, f"steps of each training, with {BATCH} images each"),
    )


def judge_one(options: argparse.Namespace, cell: Cell) -> Judged:
    rates, seeds = RATES[:, None], FIRST_SEED + np.arange(options.seeds)
    factory = CONTENDERS[cell.name]
    runs = train(cell.network, factory, rates, seeds, steps=options.steps, batch=BATCH)
    return Judged(runs, best_on_others(runs.validation))


def row(found: Judged, by_name: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
    return {
        "best rate": rates_in_words(found.chosen),
        "trained": estimates.share(found.at_best(found.trained)),
        "decades of rates": estimates.mean(found.decades),
        "accuracy, %": estimates.mean(found.at_best(found.runs.accuracy)),
        "from AdamW": more_accurate(found, by_name[ADAMW]),
        "from RAdam": more_accurate(found, by_name[RADAM]),
        FROM_NOVAK: more_accurate(found, by_name[NOVAK]),
        "from NOVAK, all rates": more_accurate_anywhere(found, by_name[NOVAK]),
    }


def rates_in_words(chosen: Any) -> str:
    """Return the range of the rates chosen for the seeds."""
    indices = np.unique(chosen)
    text = " to ".join(f"{RATES[i]:.2g}" for i in sorted({indices[0], indices[-1]}))
    return text + ", the last" * bool({0, len(RATES) - 1}.intersection(indices))


def more_accurate(found: Judged, other: Judged) -> Estimate:
    """Return the difference in points of test accuracy, of all seeds."""
    return estimates.mean(found.at_best(found.runs.accuracy) - other.at_best(other.runs.accuracy))


def more_accurate_anywhere(found: Judged, other: Judged) -> Estimate:
    """Return the same difference for the mean over all rates."""
    return estimates.mean((found.runs.accuracy - other.runs.accuracy).mean(axis=0))


def more_accurate_untuned(found: Judged, other: Judged) -> Estimate:
    """Return the same difference where both have the untuned rate."""
    return estimates.mean(found.runs.accuracy[UNTUNED] - other.runs.accuracy[UNTUNED])


MEASURES = more_accurate, more_accurate_anywhere


def more_often_untuned(found: Judged, other: Judged) -> Estimate:
    """Return the difference of the shares of seeds that succeed at the untuned rate."""
    return estimates.mean(np.subtract(found.trained[UNTUNED], other.trained[UNTUNED], dtype=float))


def wider(found: Judged, other: Judged) -> Estimate:
    """Return the difference in decades of rates."""
    return estimates.mean(found.decades - other.decades)


def judge(outcomes: Outcomes) -> list[Finding]:
    deepest = max(outcomes)
    return [judge_whole(deepest, outcomes[deepest]), judge_parts(deepest, outcomes[deepest])]


def judge_whole(depth: int, deepest: Mapping[str, Judged]) -> Finding:
    """Judge by the width of the rates that succeed, against both controls."""
    labels = {NOVAK: NOVAK, FALLBACK: f"NOVAK with {FALLBACK}", ADAMW: ADAMW, RADAM: RADAM}

    def listed(shares: Callable[[Judged], Estimate]) -> str:
        return ", ".join(f"{label} {shares(deepest[name])}" for name, label in labels.items())

    decades = listed(lambda x: estimates.mean(x.decades))
    at_best = listed(lambda x: estimates.share(x.at_best(x.trained)))
    at_untuned = listed(lambda x: estimates.share(x.trained[UNTUNED]))
    wide = {name: wider(deepest[NOVAK], deepest[name]) for name in (ADAMW, RADAM)}
    untuned = more_often_untuned(deepest[NOVAK], deepest[ADAMW])
    differences = ", ".join(f"{estimates.signed(x, 2)} from {name}" for name, x in wide.items())
    return Finding(
        "NOVAK: it trains deep plain networks more reliably",
        verdicts.judge(list(wide.values()), [untuned]),
        f"Width of the rates at which {depth} convolutions train, in decades: {decades}. NOVAK's"
        f" difference: {differences}. Share of the seeds that train at the best rate of each:"
        f" {at_best}; all at rate {RATES[UNTUNED]:.2g}: {at_untuned}.",
        untuned=f"share that trains {estimates.signed(untuned, 2)}",
        tuned=f"width of rates {estimates.signed(wide[ADAMW], 2)} decades",
    )


def judge_parts(depth: int, deepest: Mapping[str, Judged]) -> Finding:
    """Judge the claim that has a number: the cost of decay at the effective rate.

    All changes are measured at the best rates and over all rates: many parts do equally well at
    their best rates.
    """
    novak = deepest[NOVAK]
    at_best, anywhere = (measure(novak, deepest[EFFECTIVE]) for measure in MEASURES)
    untuned = more_accurate_untuned(novak, deepest[EFFECTIVE])
    clear = {
        name: [measure(found, novak) for measure in MEASURES]
        for name, found in deepest.items()
        if name not in (ADAMW, RADAM, NOVAK, EFFECTIVE)
    }
    better = [name for name, found in clear.items() if all(x.low > 0 for x in found)]
    worse = [name for name, found in clear.items() if all(x.high < 0 for x in found)]
    return Finding(
        "NOVAK: decay has to stay at the base rate",
        verdicts.judge([at_best, anywhere], [untuned]),
        f"{depth} convolutions, decay {DECAY}. Decay at the base rate instead of the effective one"
        f" changes the test accuracy by {points(at_best)} at the best rates, {points(anywhere)}"
        f" over all rates, and {points(untuned)} at rate {RATES[UNTUNED]:.2g}. Of the other"
        f" {len(clear)} changes of NOVAK these are better in both ways:"
        f" {'; '.join(better) or 'none'}; worse: {'; '.join(worse) or 'none'}."
        f" {estimates.sensitivity(anywhere, ' points over all rates', 1)}",
        untuned=f"test accuracy {points(untuned)}",
        tuned=f"test accuracy {points(at_best)}",
    )


def points(x: Estimate) -> str:
    return f"{estimates.signed(x, 1)} points"


def draw(outcomes: Outcomes) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 4.3), layout="constrained")
    depths, rates, parts = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    draw_depths(depths, outcomes)
    deepest = outcomes[max(outcomes)]
    draw_rates(rates, deepest)
    title = f"trainings that succeed,\n{max(outcomes)} convolutions"
    entitle(rates, title, "rate", "share of the seeds (%)")
    draw_parts(parts, deepest)
    title = f"difference from NOVAK,\n{max(outcomes)} convolutions"
    entitle(parts, title, "test accuracy (points)", "")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_depths(axes: Axes, outcomes: Outcomes) -> None:
    for i, (name, colour) in enumerate(COLOURS.items()):
        widths = [estimates.mean(by_name[name].decades) for by_name in outcomes.values()]
        shifted = np.add(list(outcomes), 0.2 * (i - 1))
        draw_estimates(axes, shifted, widths, color=colour, label=name)
    axes.set_xticks(list(outcomes))
    axes.set_ylim(0)
    title = "width of the rates that\ntrain, by depth"
    entitle(axes, title, "convolutions", "decades of rates")
    tidy(axes)


def draw_rates(axes: Axes, deepest: Mapping[str, Judged]) -> None:
    for name, colour in {**COLOURS, FALLBACK: GREEN}.items():
        shares = 100 * deepest[name].trained.mean(axis=1)
        label = None if name in COLOURS else f"{NOVAK} with {name}"
        look = {"marker": "o", "markersize": 4, "linewidth": 1.2, "label": label}
        axes.plot(RATES, shares, color=colour, **look)
    axes.set_xscale("log")
    log_ticks(axes.xaxis, at=[1])
    axes.set_ylim(-4, 104)
    tidy(axes)


def draw_parts(axes: Axes, deepest: Mapping[str, Judged]) -> None:
    """Draw the difference of each contender and of each changed part from NOVAK."""
    axes.axvline(0, color="0.6", linewidth=1)
    others = [name for name in deepest if name != NOVAK]
    for i, name in enumerate(others):
        colour = {**COLOURS, FALLBACK: GREEN}.get(name, "0.5")
        for shift, measure, fill in zip((-0.15, 0.15), MEASURES, ("full", "none"), strict=True):
            change = [measure(deepest[name], deepest[NOVAK])]
            look = {"color": colour, "fillstyle": fill}
            draw_estimates(axes, [i + shift], change, across=True, **look)
    for fill, label in (("full", "at the best rates"), ("none", "mean over all rates")):
        axes.plot([], [], "o", color="0.5", markersize=4, fillstyle=fill, label=label)
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    tidy(axes, grid="x")


if __name__ == "__main__":
    main()
