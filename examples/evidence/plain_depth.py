"""NOVAK: does it train deep plain networks more reliably, and which of its parts does?

    python examples/evidence/plain_depth.py

Narrow ReLU networks of four depths, without skip connections or normalization, on the digits. A
training counts as one if in the end half of its training images are classified rightly: those that
fail stay at a tenth. At each depth AdamW, RAdam, and NOVAK, in the deepest network also NOVAK with
one part changed, all try the same rates on the same seeds, and are judged on others. All decay
weights alike.

What this can't show: a VGG-16, and trainings in which the steps that rectification and lookahead
cost are few among many; nor what decay does for generalization, for the deepest of these networks
has trouble to fit the images at all.
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

import _evidence as evidence
from _command_line import progress_bar
from _digits import CLASSES, SEARCH_SEED, Factory, Network, Runs, best, train
from _evidence import Estimate, Finding, Verdict
from _figures import BLUE, GREEN, ORANGE, entitle, log_ticks, tidy
from optax_ext import novak

# The networks have so many hidden layers, twice, three times … as many.
SHALLOWEST = 8
WIDTH = 16
RATES = np.geomspace(5e-4, 6.4e-2, 8)
# Strong enough for 600 steps to tell how it is coupled.
DECAY = 0.1
# Per cent of the training images that are classified rightly.
TRAINED = 50


def radam(rate: Any) -> optax.GradientTransformation:
    """RAdam, with AdamW's decay."""
    return optax.chain(
        optax.scale_by_radam(),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(rate),
    )


def novak_with(**changes: Any) -> Factory:
    return partial(novak, weight_decay=DECAY, **changes)


ADAMW, RADAM, NOVAK, EFFECTIVE = "AdamW", "RAdam", "NOVAK", "effective decay"
CONTENDERS: dict[str, Factory] = {
    ADAMW: partial(optax.adamw, weight_decay=DECAY),
    RADAM: radam,
    NOVAK: novak_with(),
    "no rectification": novak_with(rectify=False),
    "RAdam's fallback": novak_with(rectify_fallback="momentum"),
    EFFECTIVE: novak_with(decay_coupling="effective"),
    "Nesterov: nadam": novak_with(nesterov="nadam"),
    "Nesterov: classical": novak_with(nesterov="classical"),
    "no lookahead": novak_with(lookahead="none"),
    "rotating lookahead": novak_with(lookahead="rotating"),
}
# Of those that run at every depth.
COLOURS = {ADAMW: "0.2", RADAM: BLUE, NOVAK: ORANGE}


def network(depth: int) -> Network:
    """So many hidden layers."""
    he = jax.nn.initializers.he_normal()

    def init(key: jax.Array) -> Any:
        first, hidden, last = jax.random.split(key, 3)
        return {
            "first": layer(he, first, 64, WIDTH),
            "hidden": jax.vmap(lambda key: layer(he, key, WIDTH, WIDTH))(
                jax.random.split(hidden, depth - 1)
            ),
            "last": layer(he, last, WIDTH, CLASSES),
        }

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = jax.nn.relu(affine(params["first"], x))
        x, _ = lax.scan(lambda x, p: (jax.nn.relu(affine(p, x)), None), x, params["hidden"])
        return affine(params["last"], x)

    return Network(init, apply)


def layer(init: Callable[..., jax.Array], key: jax.Array, inputs: int, outputs: int) -> Any:
    return {"kernel": init(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def affine(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None]


class Judged(NamedTuple):
    """A contender at one depth.

    Attributes:
      rate: the best one.
      at_edge: whether it is the least or the largest tried.
      search: the runs that decided, of shape (rates, seeds).
      runs: at the best rate, from other seeds.
    """

    rate: float
    at_edge: bool
    search: Runs
    runs: Runs

    @property
    def trained(self) -> Any:
        """Which of the runs did."""
        return self.runs.train_accuracy > TRAINED

    @property
    def trained_at_all_rates(self) -> Any:
        """Share of the rates at which each seed of the search trained."""
        return np.mean(self.search.train_accuracy > TRAINED, axis=0)


# By depth and name.
Outcomes = Mapping[int, Mapping[str, Judged]]


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    depths = [SHALLOWEST * (i + 1) for i in range(options.depths)]
    outcomes: dict[int, dict[str, Judged]] = {depth: {} for depth in depths}
    parts = len(CONTENDERS) - len(COLOURS)
    with progress_bar(2 * (len(depths) * len(COLOURS) + parts)) as on_progress:
        for depth in depths:
            plain = network(depth)
            for name in CONTENDERS if depth == depths[-1] else COLOURS:
                advance = partial(on_progress, f"{name}, {depth} layers")
                outcomes[depth][name] = judge_one(plain, CONTENDERS[name], options, advance)
    tables = {
        f"{depth} hidden layers; − is less another's, seed by seed": {
            name: row(found, by_name) for name, found in by_name.items()
        }
        for depth, by_name in outcomes.items()
    }
    evidence.publish(
        "plain_depth", options, judge(outcomes), tables, {"plain_depth": draw(outcomes)}
    )


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        depths=(4, f"of {SHALLOWEST}, {2 * SHALLOWEST}, … hidden layers"),
        seeds=(64, "initial weights and orders of the images"),
        trials=(8, f"seeds apart on which each of {len(RATES)} rates is tried"),
        steps=(600, "of each training"),
    )


def judge_one(
    plain: Network,
    factory: Factory,
    options: argparse.Namespace,
    on_progress: Callable[[float], object],
) -> Judged:
    train_on = partial(train, plain, factory, steps=options.steps)
    search = train_on(RATES[:, None], SEARCH_SEED + np.arange(options.trials))
    on_progress(1)
    chosen = best(search)
    runs = train_on(RATES[chosen], np.arange(options.seeds))
    on_progress(1)
    return Judged(float(RATES[chosen]), chosen in (0, len(RATES) - 1), search, runs)


def row(found: Judged, by_name: Mapping[str, Judged]) -> dict[str, Estimate | float | str]:
    return {
        "rate": f"{found.rate:.3g}{', the last' if found.at_edge else ''}",
        "trained": evidence.share(found.trained),
        "at all rates": evidence.mean(found.trained_at_all_rates),
        "accuracy, %": evidence.mean(found.runs.accuracy),
        "− AdamW": more_accurate(found, by_name[ADAMW]),
        "− RAdam": more_accurate(found, by_name[RADAM]),
        "− NOVAK": more_accurate(found, by_name[NOVAK]),
        "at all rates, − NOVAK": more_accurate_anywhere(found, by_name[NOVAK]),
    }


def more_accurate(found: Judged, other: Judged) -> Estimate:
    """In points on the test images, seed by seed; those that did not train included."""
    return evidence.mean(found.runs.accuracy - other.runs.accuracy)


def more_accurate_anywhere(found: Judged, other: Judged) -> Estimate:
    """Likewise for the mean over all rates, on the seeds of the search."""
    return evidence.mean((found.search.accuracy - other.search.accuracy).mean(axis=0))


MEASURES = more_accurate, more_accurate_anywhere


def more_often(found: Judged, other: Judged) -> Estimate:
    """What more of the seeds train."""
    return evidence.mean(found.trained.astype(float) - other.trained)


def more_rates(found: Judged, other: Judged) -> Estimate:
    """At what more of the rates a seed trains."""
    return evidence.mean(found.trained_at_all_rates - other.trained_at_all_rates)


def judge(outcomes: Outcomes) -> list[Finding]:
    deepest = max(outcomes)
    return [judge_whole(deepest, outcomes[deepest]), judge_parts(deepest, outcomes[deepest])]


def judge_whole(depth: int, deepest: Mapping[str, Judged]) -> Finding:
    """Beside both controls."""
    controls = {name: deepest[name] for name in (ADAMW, RADAM)}

    def better(measure: Callable[[Judged, Judged], Estimate]) -> bool:
        return all(measure(deepest[NOVAK], other).low > 0 for other in controls.values())

    shares = ", ".join(
        f"{name} {evidence.share(deepest[name].trained)}" for name in (NOVAK, *controls)
    )
    at_all = ", ".join(
        f"{evidence.mean(deepest[name].trained_at_all_rates)}" for name in (NOVAK, *controls)
    )
    verdict = Verdict.NOT_SEEN
    if better(more_often):
        verdict = Verdict.HOLDS
    elif better(more_rates):
        verdict = Verdict.ONLY_UNTUNED
    return Finding(
        "NOVAK: it trains deep plain networks more reliably",
        verdict,
        f"Of {depth} layers, at the best rate of each, so many seeds train: {shares}; at so"
        f" many of the rates tried: {at_all}.",
    )


def judge_parts(depth: int, deepest: Mapping[str, Judged]) -> Finding:
    """The claim with a number: what decay at the effective rate costs.

    All changes are measured in two ways, for a rate that was chosen unluckily tells of no part.
    """
    novak = deepest[NOVAK]
    at_best, anywhere = (measure(novak, deepest[EFFECTIVE]) for measure in MEASURES)
    clear = {
        name: [measure(found, novak) for measure in MEASURES]
        for name, found in deepest.items()
        if name not in (ADAMW, RADAM, NOVAK, EFFECTIVE)
    }
    better = [name for name, found in clear.items() if all(x.low > 0 for x in found)]
    worse = [name for name, found in clear.items() if all(x.high < 0 for x in found)]
    return Finding(
        "NOVAK: decay has to stay at the base rate",
        Verdict.HOLDS if min(at_best.low, anywhere.low) > 0 else Verdict.NOT_SEEN,
        f"Of {depth} layers, decay {DECAY}: in points of test accuracy it is worth {at_best} there"
        f" at the best rates, {anywhere} over all rates. Of the other {len(clear)} changes these"
        f" are clearly better in both ways: {', '.join(better) or 'none'}; worse:"
        f" {', '.join(worse) or 'none'}.",
    )


def draw(outcomes: Outcomes) -> Figure:
    figure = Figure(figsize=(evidence.WIDTH, 3.7), layout="constrained")
    depths, rates, parts = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    deepest = outcomes[max(outcomes)]
    for i, (name, colour) in enumerate(COLOURS.items()):
        shares = [evidence.share(by_name[name].trained) for by_name in outcomes.values()]
        centers, *ends = 100 * np.array(shares).T
        dots = {"color": colour, "marker": "o", "markersize": 4, "label": name}
        shifted = np.add(list(outcomes), 0.5 * (i - 1))
        depths.errorbar(shifted, centers, abs(centers - ends), capsize=2, linewidth=1.2, **dots)
        at_rate = 100 * np.mean(deepest[name].search.train_accuracy > TRAINED, axis=1)
        rates.plot(RATES, at_rate, color=colour, marker="o", markersize=4, linewidth=1.2)
    depths.set_xticks(list(outcomes))
    entitle(depths, "at the best rate", "hidden layers", "seeds that train (%)")
    rates.set_xscale("log")
    log_ticks(rates.xaxis, at=[1])
    entitle(rates, f"{max(outcomes)} layers, at each rate", "rate", "seeds that train (%)")
    draw_parts(parts, deepest)
    for axes in (depths, rates):
        axes.set_ylim(-4, 104)
        tidy(axes)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_parts(axes: Axes, deepest: Mapping[str, Judged]) -> None:
    """What each change makes of NOVAK."""
    axes.axvline(0, color="0.6", linewidth=1)
    others = [name for name in deepest if name != NOVAK]
    for i, name in enumerate(others):
        for shift, measure, fill in zip((-0.15, 0.15), MEASURES, ("full", "none"), strict=True):
            center, low, high = measure(deepest[name], deepest[NOVAK])
            dots = {"color": COLOURS.get(name, GREEN), "marker": "o", "markersize": 4}
            across = [[center - low], [high - center]]
            axes.errorbar(center, i + shift, xerr=across, capsize=2, fillstyle=fill, **dots)
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    tidy(axes, grid="x")
    title = "there, less NOVAK's: at the\nbest rate, all rates (open)"
    entitle(axes, title, "test accuracy (points)", "")


if __name__ == "__main__":
    main()
