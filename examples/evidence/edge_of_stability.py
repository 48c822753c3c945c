"""VRAdam: what does its gate do at the edge of stability?

    python examples/evidence/edge_of_stability.py

A small network is trained on all of its images at once. Adam's steps α with momentum b1 are stable
while the curvature that they see, the largest eigenvalue of the preconditioned Hessian P^-1 H, is
below (2 + 2 b1) / ((1 - b1) α): 38 / α at b1 = .9 (Cohen et al. 2022, arXiv 2207.14484). Training
drives it up to there. VRAdam divides α by 1 + min(beta3 |u|², 10).

Its controls that start at the same rate are AdamW, AdamW at the gated run's mean rate, and AdamW
that replays the rates that the gate made in the training of another seed: the same schedule without
the feedback. Three more are slow late: AdamW with a cosine decay from the same rate to 0, and at a
quarter and an eighth of it. Then both are tuned by as many trials, on other seeds than they are
judged by; and both are run at the default rate, which is not tuned. There is no weight decay.

In the tables, a curvature is the largest eigenvalue of P^-1 H divided by the edge, 38 / α, or by
its own edge, 38 / the run's rate at that time, gate and schedule included: at 1 it is at the edge.
The highest is of the whole training. That of H is the eigenvalue itself. A peak is how far the
worst of 50 steps is above their median, in decades (1 is ten times the loss), on average. Steps
uphill are the share of those in which the loss rises. All this is of the second half of the steps,
the loss of the last tenth.

The rate, the squared error and the larger beta3 were chosen to make an edge and a gate visible:
with cross-entropy, in the table too, the curvature falls instead. Of the two measures of
steadiness, how often the loss rises came first; how far it peaks was added on seeing curves, and
the slow controls on seeing results. So what is shown is of seeds that nothing was chosen by.

What so small a network can't show is how far the gate of a large one closes: beta3 weighs a sum
over all parameters. The authors' code takes one norm for each group of parameters, which is
`optax.partition` with one `vradam` for each.

What the authors compared differs. Their sweeps searched the rate, beta3, the cutoff and the measure
of the gate for VRAdam, and the rate alone for Adam. Their baseline is torch's Adam with an L2 decay
of 1e-5, where the paper says AdamW. Their figure of the edge compares VRAdam at lr .002, gated by
the gradient (`normgrad`) with cutoff 19, with Adam at lr .001; and of VRAdam it shows the largest
eigenvalue of H, of Adam that of P^-1 H.
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
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import _evidence as evidence
from _evidence import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    Estimate,
    Finding,
    Verdict,
    apply_smooth,
    entitle,
    initialize_smooth,
    load_digits,
    log_ticks,
    scale_of_adam,
    sharpness,
    tidy,
)
from optax_ext import vradam

B1, B2, EPS = 0.9, 0.999, 1e-8
HIDDEN, MEASURED_EVERY = 32, 50
RATE = 0.02
# Curvatures that steps of 1 are still stable at: of gradient descent, and of Adam after P.
OF_DESCENT, OF_ADAM = 2, (2 + 2 * B1) / (1 - B1)
# The default, and one that makes this network's gate bite.
DEFAULT, STRONG = 1.0, 3000.0
STRENGTHS = (DEFAULT, 50.0, STRONG)
LOWEST_RATE, HIGHEST_RATE = 2e-3, 0.3
# What one takes who doesn't tune.
UNTUNED = 1e-3
FIRST_SEED, FIRST_SEARCH_SEED = 200, 1000
ADAMW, VRADAM, STRONGER = "AdamW", "VRAdam", f"VRAdam, beta3 {STRONG:.0f}"
MEAN_RATE, REPLAYED = "AdamW, mean rate", "AdamW, replayed gate"
COSINE, QUARTER, EIGHTH = "AdamW, cosine", "AdamW, α / 4", "AdamW, α / 8"
CROSS_ENTROPY = "AdamW, cross-entropy"
SLOW = {COSINE: "with the cosine", QUARTER: "at a quarter of α", EIGHTH: "at an eighth"}
# Columns that the findings read.
OF_EDGE, OF_OWN_EDGE, HIGHEST = "curvature / edge", "curvature / own edge", "highest / edge"
OF_H = "curvature of H"
CURVATURES = (OF_EDGE, OF_OWN_EDGE, HIGHEST, OF_H)
PEAKS, LOSS, LESS = "peaks, decades", "log10 of loss", "less AdamW's"
STYLES: dict[str, dict[str, Any]] = {
    ADAMW: {"color": "0.2", "marker": "o"},
    VRADAM: {"color": BLUE, "marker": "o", "linestyle": "--"},
    STRONGER: {"color": ORANGE, "marker": "o"},
    MEAN_RATE: {"color": GREEN, "marker": "s"},
    REPLAYED: {"color": PINK, "marker": "s", "linestyle": "--"},
    COSINE: {"color": "0.55", "marker": "^", "linestyle": "-."},
    QUARTER: {"color": "0.55", "marker": "<", "linestyle": "none"},
    EIGHTH: {"color": "0.55", "marker": "v", "linestyle": "none"},
}
Cells = dict[str, Estimate]


class Run(NamedTuple):
    """The curves of one run.

    Attributes:
      loss: before each step.
      rate: of each step, the gate's factor included.
      sharpness: largest eigenvalue of the Hessian, after every `MEASURED_EVERY` steps.
      preconditioned: likewise of P^-1 H.
    """

    loss: Any
    rate: Any
    sharpness: Any
    preconditioned: Any

    @property
    def late_loss(self) -> float:
        """Decimal logarithm; the mean over the last tenth, since a loss at the edge jumps."""
        return float(np.log10(self.loss[-len(self.loss) // 10 :]).mean())


Train = Callable[..., Run]


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum((outputs - jax.nn.one_hot(labels, 10)) ** 2, axis=-1).mean() / 2


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def trainer(error: Callable[[Any, Any], jax.Array], options: argparse.Namespace) -> Train:
    """Return a function that trains with AdamW or VRAdam, at one rate or at one for each step."""
    data = load_digits().train
    x, labels = data.images[: options.images].reshape(-1, 64), data.labels[: options.images]

    def loss(params):
        return error(apply_smooth(params, x), labels)

    run = jax.jit(partial(run_training, loss), static_argnames=("gated", "measured"))

    def train(seed: int, rates: ArrayLike, beta3: float | None = None, measured=True) -> Run:
        params = initialize_smooth(jax.random.key(seed), [x.shape[1], HIDDEN, HIDDEN, 10])
        rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (options.steps,))
        gated = beta3 is not None
        found = run(params, rates, beta3 or 0.0, gated=gated, measured=measured)
        return jax.tree.map(np.asarray, found)

    return train


def run_training(loss, params, rates, beta3, *, gated: bool, measured: bool) -> Run:
    make = partial(vradam, beta3=beta3) if gated else optax.adamw
    tx = make(lambda count: rates[count], b1=B1, b2=B2, eps=EPS, weight_decay=0.0)

    def step(run, rate):
        params, state = run
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        gate = optax.tree.get(state, "gate", 1.0)
        return (optax.apply_updates(params, updates), state), (value, gate * rate)

    def interval(run, inputs):
        rates, count = inputs
        run, curves = lax.scan(step, run, rates)
        params, state = run
        if not measured:
            return run, (curves, (jnp.nan, jnp.nan))
        scale = scale_of_adam(optax.tree.get(state, "nu"), count, b1=B1, b2=B2, eps=EPS)
        return run, (curves, (sharpness(loss, params), sharpness(loss, params, scale)))

    counts = jnp.arange(MEASURED_EVERY, len(rates) + 1, MEASURED_EVERY)
    inputs = rates.reshape(-1, MEASURED_EVERY), counts
    _, ((losses, rates), found) = lax.scan(interval, (params, tx.init(params)), inputs)
    return Run(losses.ravel(), rates.ravel(), *found)


class Plan(NamedTuple):
    """Planned runs: for each seed one rate, or one for each step; gated if there is a beta3."""

    rates: Sequence[ArrayLike]
    beta3: float | None = None
    train: Train | None = None


class Tuned(NamedTuple):
    """The best of a search, and the late losses of the seeds that judge it."""

    rate: float
    beta3: float | None
    losses: Any


# They decide the results, and are recorded with them.
CONSTANTS = {
    "B1": B1,
    "MEASURED_EVERY": MEASURED_EVERY,
    "RATE": RATE,
    "OF_DESCENT": OF_DESCENT,
    "OF_ADAM": OF_ADAM,
    "DEFAULT": DEFAULT,
    "STRONG": STRONG,
    "LOWEST_RATE": LOWEST_RATE,
    "HIGHEST_RATE": HIGHEST_RATE,
    "UNTUNED": UNTUNED,
    "FIRST_SEED": FIRST_SEED,
    "FIRST_SEARCH_SEED": FIRST_SEARCH_SEED,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.steps % MEASURED_EVERY:
        parser.error(f"--steps must be a multiple of {MEASURED_EVERY}, got {options.steps}")
    train, train_other = trainer(squared_error, options), trainer(cross_entropy, options)
    runs = at_the_edge(train, train_other, options)
    edge = {name: row(found) for name, found in runs.items()}
    tuned, untuned = tune(train, options)
    best, default = compare(*tuned), compare(*untuned)
    tables = {
        f"Curvature and rate, at α = {RATE}": columns(edge, "mean rate / α", *CURVATURES),
        f"Loss, at α = {RATE}": columns(edge, "steps uphill", PEAKS, LOSS),
        f"At the best of {len(STRENGTHS) * options.rates} trials": best,
        f"At the default rate, {UNTUNED}": default,
    }
    figures = {"edge_of_stability": draw(runs, edge)}
    findings = [*judge_edges(edge), judge_steadiness(edge), judge_losses(best, default)]
    evidence.publish("edge_of_stability", options, findings, tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        seeds=(10, "initial weights"),
        trials=(10, "seeds apart on which each rate is tried"),
        steps=(2000, "of each training"),
        images=(256, "to train on"),
        rates=(6, f"that VRAdam tries with {len(STRENGTHS)} strengths; AdamW as many in all"),
    )


def at_the_edge(
    train: Train, train_other: Train, options: argparse.Namespace
) -> dict[str, list[Run]]:
    """Return a run of every contender for each seed."""
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def run(plan: Plan) -> list[Run]:
        of_one = partial(plan.train or train, beta3=plan.beta3)
        return [of_one(seed, rates) for seed, rates in zip(seeds, plan.rates, strict=True)]

    def alike(rates: ArrayLike, *args: Any) -> Plan:
        return Plan([rates] * len(seeds), *args)

    cosine = optax.cosine_decay_schedule(RATE, options.steps)(np.arange(options.steps))
    plans = {
        ADAMW: alike(RATE),
        VRADAM: alike(RATE, DEFAULT),
        STRONGER: alike(RATE, STRONG),
        COSINE: alike(cosine),
        QUARTER: alike(RATE / 4),
        EIGHTH: alike(RATE / 8),
        CROSS_ENTROPY: alike(RATE, None, train_other),
    }
    runs = evidence.side_by_side(run, plans)
    gated = [found.rate for found in runs[STRONGER]]
    plans = {
        MEAN_RATE: Plan([rates.mean() for rates in gated]),
        REPLAYED: Plan(gated[-1:] + gated[:-1]),
    }
    runs |= evidence.side_by_side(run, plans)
    return {name: runs[name] for name in (*STYLES, CROSS_ENTROPY)}


def tune(
    train: Train, options: argparse.Namespace
) -> tuple[tuple[Tuned, Tuned], tuple[Tuned, Tuned]]:
    """Return AdamW and VRAdam at the best trial of each, then both without a search."""

    def late_losses(first_seed: int, seeds: int, trial: tuple[float, float | None]) -> Any:
        rate, beta3 = trial
        runs = (train(first_seed + i, rate, beta3, measured=False) for i in range(seeds))
        return np.array([run.late_loss for run in runs])

    without = [(x, None) for x in grid(len(STRENGTHS) * options.rates)]
    gated = [(x, beta3) for beta3 in STRENGTHS for x in grid(options.rates)]
    trials = {f"trial {i}": trial for i, trial in enumerate(without + gated)}
    search = partial(late_losses, FIRST_SEARCH_SEED, options.trials)
    losses = [found.mean() for found in evidence.side_by_side(search, trials).values()]
    best = (
        without[int(np.nanargmin(losses[: len(without)]))],
        gated[int(np.nanargmin(losses[len(without) :]))],
    )

    def judged(rate: float, beta3: float | None) -> Tuned:
        return Tuned(rate, beta3, late_losses(FIRST_SEED, options.seeds, (rate, beta3)))

    return (
        (judged(*best[0]), judged(*best[1])),
        (judged(UNTUNED, None), judged(UNTUNED, DEFAULT)),
    )


def grid(rates: int) -> list[float]:
    return np.geomspace(LOWEST_RATE, HIGHEST_RATE, rates).tolist()


def row(runs: Sequence[Run]) -> Cells:
    """Return the table's cells, over seeds."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_edge = np.array([run.preconditioned * RATE / OF_ADAM for run in runs])
    of_own = np.array([run.preconditioned * thin(run.rate) / OF_ADAM for run in runs])
    return {
        "mean rate / α": evidence.mean([run.rate.mean() / RATE for run in runs]),
        OF_EDGE: evidence.mean(np.median(of_edge[:, late], axis=1)),
        OF_OWN_EDGE: evidence.mean(np.median(of_own[:, late], axis=1)),
        HIGHEST: evidence.mean(of_edge.max(axis=1)),
        OF_H: evidence.mean([np.median(run.sharpness[late]) for run in runs]),
        "steps uphill": evidence.mean([rises(run.loss) for run in runs]),
        PEAKS: evidence.mean([peaks(run.loss)[late].mean() for run in runs]),
        LOSS: evidence.mean([run.late_loss for run in runs]),
    }


def columns(rows: Mapping[str, Cells], *names: str) -> dict[str, Cells]:
    return {name: {column: cells[column] for column in names} for name, cells in rows.items()}


def rises(loss: Any) -> float:
    """Return the share of the second half's steps in which the loss grows."""
    return float((np.diff(loss[len(loss) // 2 :]) > 0).mean())


def peaks(loss: Any) -> Any:
    """Return the decades from the median to the worst loss between two measurements, on average."""
    parts = np.log10(loss).reshape(-1, MEASURED_EVERY)
    return parts.max(axis=1) - np.median(parts, axis=1)


def compare(adamw: Tuned, vradam: Tuned) -> dict[str, dict[str, Any]]:
    """Return the table of both; differences are paired, seed by seed."""
    return {
        name: {
            "rate": in_words(found.rate),
            "beta3": "-" if found.beta3 is None else f"{found.beta3:g}",
            LOSS: evidence.mean(found.losses),
            LESS: evidence.mean(found.losses - adamw.losses),
        }
        for name, found in {ADAMW: adamw, VRADAM: vradam}.items()
    }


def in_words(rate: float) -> str:
    at_edge = np.isclose(rate, (LOWEST_RATE, HIGHEST_RATE)).any()
    return f"{rate:.2g}{' (the last tried)' if at_edge else ''}"


def judge_edges(edge: Mapping[str, Cells]) -> list[Finding]:
    def finding(error: str, cells: Cells) -> Finding:
        at, highest = cells[OF_EDGE], cells[HIGHEST]
        stays = at.low > 0.9 and at.high < 1.1
        return Finding(
            f"VRAdam: with {error}, Adam trains at the edge of stability, 38 / α",
            Verdict.HOLDS if stays else Verdict.REFUTED,
            f"The largest eigenvalue of P^-1 H is {at.mean:.3g} of 38 / α"
            f" [{at.low:.3g}, {at.high:.3g}] in the second half of the steps, and at most"
            f" {highest.mean:.3g} of it on the way; that of H is"
            f" {cells[OF_H].mean:.2g}, and gradient descent's edge 2 / α ="
            f" {OF_DESCENT / RATE:.0f}.",
        )

    return [
        finding("squared error", edge[ADAMW]),
        finding("cross-entropy", edge[CROSS_ENTROPY]),
    ]


def judge_steadiness(edge: Mapping[str, Cells]) -> Finding:
    """Judge whether VRAdam is steadier than its controls, and than slow ones of no higher loss."""
    gated, published = edge[STRONGER], edge[VRADAM]

    def beats(one: Cells, other: Cells, columns: Sequence[str] = (PEAKS, LOSS)) -> bool:
        return all(one[column].high < other[column].low for column in columns)

    steadier = all(beats(gated, edge[name], [PEAKS]) for name in (ADAMW, MEAN_RATE, REPLAYED))
    beaten = [name for name in SLOW if beats(gated, edge[name])]
    better = [name for name in SLOW if beats(edge[name], gated)]
    verdict = Verdict.NOT_SEEN
    if steadier:
        verdict = Verdict.HOLDS if len(beaten) == len(SLOW) else Verdict.ONLY_UNTUNED

    def shown(name: str) -> str:
        return f"{edge[name][PEAKS].mean:.2g} ({edge[name][LOSS].mean:.2f})"

    slow = ", ".join(f"{how} {shown(name)}" for name, how in SLOW.items())
    return Finding(
        "VRAdam: a gate below 1 makes training at that edge steadier, and a lower rate does not",
        verdict,
        f"With beta3 = {STRONG:.0f} the loss peaks by {gated[PEAKS].mean:.2g} decades (its"
        f" logarithm is {gated[LOSS].mean:.2f} in the end), at {gated[OF_OWN_EDGE].mean:.2f} of"
        f" the edge of the gated rate; as published, where the gate's mean is"
        f" {published['mean rate / α'].mean:.3f} here, by {shown(VRADAM)}. AdamW at α peaks by"
        f" {shown(ADAMW)}, at the gated run's mean rate {shown(MEAN_RATE)}, at the rates of"
        f" another seed's gate {shown(REPLAYED)}. AdamW that is slow late: {slow}. In both"
        f" peaks and loss the gate is better than {len(beaten)} of these {len(SLOW)}, and"
        f" {len(better)} better than the gate.",
    )


def judge_losses(best: Mapping[str, Any], default: Mapping[str, Any]) -> Finding:
    verdict = Verdict.NOT_SEEN
    if best[VRADAM][LESS].high < 0:
        verdict = Verdict.HOLDS
    elif default[VRADAM][LESS].high < 0:
        verdict = Verdict.ONLY_UNTUNED

    def shown(cells: Mapping[str, Any]) -> str:
        return f"{cells[LOSS].mean:.2f} at rate {cells['rate']}"

    def less(cells: Mapping[str, Any]) -> str:
        return f"{cells[LESS].mean:+.3f} [{cells[LESS].low:+.3f}, {cells[LESS].high:+.3f}]"

    return Finding(
        "VRAdam: it trains to a lower loss than AdamW",
        verdict,
        f"Logarithm of the loss, each at the best of as many trials: AdamW {shown(best[ADAMW])},"
        f" VRAdam {shown(best[VRADAM])} and beta3 {best[VRADAM]['beta3']}, a difference of"
        f" {less(best[VRADAM])}. Both at the default rate: AdamW {shown(default[ADAMW])}, VRAdam's"
        f" difference {less(default[VRADAM])}.",
    )


def thin(curve: Any) -> Any:
    """Return means over the steps between two measurements."""
    return curve.reshape(*curve.shape[:-1], -1, MEASURED_EVERY).mean(axis=-1)


def draw(runs: Mapping[str, Sequence[Run]], edge: Mapping[str, Cells]) -> Figure:
    """Draw medians over the seeds with their range, and points with intervals."""
    figure = Figure(figsize=(evidence.WIDTH, 7.8), layout="constrained")
    panels: Any = figure.subplot_mosaic(
        [["edge", "H"], ["rate", "loss"], ["peaks", "peaks"]], height_ratios=[1, 1, 1.15]
    )
    for name, style in STYLES.items():
        curves = Run(*(np.stack(curve) for curve in zip(*runs[name], strict=True)))
        draw_curve(panels["edge"], name, curves.preconditioned)
        draw_curve(panels["H"], name, curves.sharpness)
        draw_curve(panels["rate"], name, thin(curves.rate))
        draw_curve(panels["loss"], name, thin(curves.loss))
        draw_point(panels["peaks"], edge[name], style)
    for axes, level, text in (
        (panels["edge"], OF_ADAM, "38 / α"),
        (panels["H"], OF_DESCENT, "2 / α"),
    ):
        axes.axhline(level / RATE, color="black", linestyle=":", linewidth=1)
        beside = {"xycoords": axes.get_yaxis_transform(), "ha": "left", "va": "center"}
        axes.annotate(text, (1.01, level / RATE), fontsize=9, **beside)
    entitle(panels["edge"], "curvature that Adam sees", "steps", "top eigenvalue of $P^{-1} H$")
    entitle(panels["H"], "curvature of the loss", "steps", "top eigenvalue of H")
    entitle(panels["rate"], "rate, with gate and schedule", "steps", "rate")
    entitle(panels["loss"], f"loss, means of {MEASURED_EVERY} steps", "steps", "squared error")
    title = "lower is steadier, left is a lower loss (means and intervals over seeds)"
    entitle(panels["peaks"], title, "log10 of the loss in the end", "peaks of the loss, decades")
    for name, axes in panels.items():
        axes.set_yscale("log")
        tidy(axes)
        log_ticks(axes.yaxis, (1,) if name == "loss" else (1, 2, 5))
    panels["rate"].set_ylim(bottom=RATE / 20)
    handles, _ = panels["edge"].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def draw_curve(axes: Axes, name: str, each: Any) -> None:
    """Draw a line, or only the entry of the legend for a style without one."""
    style = STYLES[name]
    if style.get("linestyle") == "none":
        axes.plot([], [], label=name, markersize=4, **style)
        return
    steps = MEASURED_EVERY * np.arange(1, each.shape[1] + 1)
    axes.plot(
        steps,
        np.median(each, axis=0),
        **style,
        markevery=(0.1, 0.2),
        markersize=4,
        linewidth=1.3,
        label=name,
    )
    low, high = each.min(axis=0), each.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.1, linewidth=0)


def draw_point(axes: Axes, cells: Cells, style: Mapping[str, Any]) -> None:
    x, y = cells[LOSS], cells[PEAKS]
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=[[x.mean - x.low], [x.high - x.mean]],
        yerr=[[y.mean - y.low], [y.high - y.mean]],
        color=style["color"],
        marker=style["marker"],
        markersize=5,
        capsize=2,
        linewidth=1.2,
    )


if __name__ == "__main__":
    main()
