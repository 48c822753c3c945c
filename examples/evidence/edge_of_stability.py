"""VRAdam: what does its gate do at the edge of stability?

    python examples/evidence/edge_of_stability.py

A small network is trained on all of its images at once. Adam's steps α with momentum b1 are stable
while the curvature that they see, the largest eigenvalue of the preconditioned Hessian P^-1 H, is
below (2 + 2 b1) / ((1 - b1) α): 38 / α at b1 = .9 (Cohen et al. 2022, arXiv 2207.14484). Training
drives it up to there. VRAdam divides α by 1 + min(beta3 |u|², 10).

Its controls at the same rate are AdamW, AdamW at the gated run's mean rate, and AdamW at the rates
that the gate made in the training of another seed: the same schedule without the feedback. Then
both are tuned by as many trials. There is no weight decay.

The rate, the squared error and the larger beta3 were chosen to make an edge and a gate visible:
with cross-entropy, in the table too, the curvature falls instead. Of the two measures of
steadiness, how often the loss rises came first; how far it peaks was added on seeing the curves of
seeds 0 to 9. So what is shown is of seeds that nothing was chosen by.

What so small a network can't show is how far the gate of a large one closes: beta3 weighs a sum
over all parameters.
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
import _smooth as smooth
from _command_line import progress_bar
from _curvature import scale_of_adam, sharpness
from _data import load
from _evidence import Estimate, Finding, Verdict
from _figures import BLUE, GREEN, ORANGE, PINK, entitle, log_ticks, tidy
from optax_ext import vradam

RATE = 0.02
B1, B2, EPS = 0.9, 0.999, 1e-8
# Curvatures that steps of 1 are still stable at: of gradient descent, and of Adam after P.
OF_DESCENT, OF_ADAM = 2, (2 + 2 * B1) / (1 - B1)
# The default, and one that makes this network's gate bite.
DEFAULT, STRONG = 1.0, 3000.0
STRENGTHS = (DEFAULT, 50.0, STRONG)
LOWEST_RATE, HIGHEST_RATE = 2e-3, 0.3
HIDDEN, MEASURED_EVERY = 32, 50
FIRST_SEED = 100
SEARCH_SEEDS = (1000, 1001, 1002)
CROSS_ENTROPY = "AdamW, cross-entropy"
STRONGER = f"VRAdam, beta3 {STRONG:.0f}"
COLOURS = {
    "AdamW": "0.2",
    "VRAdam": BLUE,
    STRONGER: ORANGE,
    "AdamW, mean rate": GREEN,
    "AdamW, other's gate": PINK,
}


class Run(NamedTuple):
    """A training.

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


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.steps % MEASURED_EVERY:
        parser.error(f"--steps must be a multiple of {MEASURED_EVERY}, got {options.steps}")
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    train = trainer(squared_error, options)
    work = (len(COLOURS) + 1) * options.seeds + 2 * (len(STRENGTHS) * options.rates) + 1
    with progress_bar(work) as on_progress:
        runs = at_the_edge(train, seeds, on_progress)
        train_other = trainer(cross_entropy, options)
        other = [train_other(seed, RATE) for seed in seeds]
        on_progress(CROSS_ENTROPY, options.seeds)
        losses = tune(train, options.rates, seeds, on_progress)
    edge = {name: row(found) for name, found in (runs | {CROSS_ENTROPY: other}).items()}
    best = compare(losses)
    tables = {
        f"At rate {RATE}, second half of {options.steps} steps": edge,
        f"At the best of {len(STRENGTHS) * options.rates} trials": best,
    }
    figures = {"edge_of_stability": draw(runs)}
    evidence.publish("edge_of_stability", options, judge(edge, best), tables, figures)


def make_parser() -> argparse.ArgumentParser:
    return evidence.make_parser(
        __doc__,
        seeds=(10, "initial weights"),
        steps=(2000, "of each training"),
        images=(256, "to train on"),
        rates=(6, f"that VRAdam tries with {len(STRENGTHS)} strengths; AdamW as many in all"),
    )


Train = Callable[..., Run]
Cells = dict[str, Estimate]


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum((outputs - jax.nn.one_hot(labels, 10)) ** 2, axis=-1).mean() / 2


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def trainer(error: Callable[[Any, Any], jax.Array], options: argparse.Namespace) -> Train:
    """What trains with AdamW, or VRAdam, at a rate or at one for each step."""
    data = load(None).train
    x, labels = data.images[: options.images].reshape(-1, 64), data.labels[: options.images]

    def loss(params):
        return error(smooth.apply(params, x), labels)

    run = jax.jit(partial(run_training, loss), static_argnames=("gated", "measured"))

    def train(seed: int, rates: ArrayLike, beta3: float | None = None, measured=True) -> Run:
        params = smooth.initialize(jax.random.key(seed), [x.shape[1], HIDDEN, HIDDEN, 10])
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


def at_the_edge(train: Train, seeds: Sequence[int], on_progress) -> dict[str, list[Run]]:
    """Of every contender at the same rate, a run for each seed."""
    runs: dict[str, list[Run]] = {name: [] for name in COLOURS}

    def add(name: str, seed: int, rates: ArrayLike, beta3: float | None = None) -> None:
        runs[name].append(train(seed, rates, beta3))
        on_progress(name, 1)

    for seed in seeds:
        add("AdamW", seed, RATE)
        add("VRAdam", seed, RATE, DEFAULT)
        add(STRONGER, seed, RATE, STRONG)
    gated = runs[STRONGER]
    for i, seed in enumerate(seeds):
        add("AdamW, mean rate", seed, gated[i].rate.mean())
        add("AdamW, other's gate", seed, gated[i - 1].rate)
    return runs


def tune(train: Train, rates: int, seeds: Sequence[int], on_progress) -> dict[str, list[float]]:
    """The late losses of each at its best trial, one for each seed; its name says which that is.

    The last is AdamW as it would be without a search of its own.
    """

    def late_losses(seeds: Sequence[int], rate: float, beta3: float | None) -> list[float]:
        return [train(seed, rate, beta3, measured=False).late_loss for seed in seeds]

    def search(name: str, trials: Sequence[tuple[float, float | None]]) -> Any:
        scores = []
        for trial in trials:
            scores.append(np.mean(late_losses(SEARCH_SEEDS, *trial)))
            on_progress(f"{name}, tuning", 1)
        return trials[int(np.nanargmin(scores))]

    adamw = search("AdamW", [(x, None) for x in grid(len(STRENGTHS) * rates)])
    gated = search("VRAdam", [(x, beta3) for beta3 in STRENGTHS for x in grid(rates)])
    contenders = {
        f"AdamW at {in_words(adamw[0])}": adamw,
        f"VRAdam at {in_words(gated[0])} and beta3 {gated[1]:g}": gated,
        "AdamW at VRAdam's rate": (gated[0], None),
    }
    found = {x: late_losses(seeds, *trial) for x, trial in contenders.items()}
    on_progress("at the best", 1)
    return found


def in_words(rate: float) -> str:
    at_edge = np.isclose(rate, (LOWEST_RATE, HIGHEST_RATE)).any()
    return f"{rate:.2g}{' (the last tried)' if at_edge else ''}"


def grid(rates: int) -> list[float]:
    return np.geomspace(LOWEST_RATE, HIGHEST_RATE, rates).tolist()


def row(runs: Sequence[Run]) -> Cells:
    """Over seeds; but for the rate and the loss of the second half, when the edge is reached."""
    late = slice(len(runs[0].sharpness) // 2, None)
    at_base = [run.preconditioned[late] * RATE / OF_ADAM for run in runs]
    at_own = [(run.preconditioned * thin(run.rate))[late] / OF_ADAM for run in runs]
    return {
        "mean rate / α": evidence.mean([run.rate.mean() / RATE for run in runs]),
        "P^-1 H, of edge": evidence.mean(np.median(at_base, axis=1)),
        "of own rate's": evidence.mean(np.median(at_own, axis=1)),
        "H": evidence.mean([np.median(run.sharpness[late]) for run in runs]),
        "steps uphill": evidence.mean([rises(run.loss) for run in runs]),
        "peaks": evidence.mean([peaks(run.loss)[late].mean() for run in runs]),
        "log10 of loss": evidence.mean([run.late_loss for run in runs]),
    }


def rises(loss: Any) -> float:
    """In which share of the steps of the second half the loss grows."""
    return float((np.diff(loss[len(loss) // 2 :]) > 0).mean())


def peaks(loss: Any) -> Any:
    """Decades from the median of as many steps as lie between two measurements to their worst."""
    parts = np.log10(loss).reshape(-1, MEASURED_EVERY)
    return parts.max(axis=1) - np.median(parts, axis=1)


def compare(losses: Mapping[str, list[float]]) -> dict[str, Cells]:
    """Differences are paired, seed by seed."""
    adamw, *_ = losses.values()
    return {
        name: {
            "log10 of loss": evidence.mean(found),
            "less AdamW's": evidence.mean(np.subtract(found, adamw)),
        }
        for name, found in losses.items()
    }


def judge(edge: Mapping[str, Cells], best: Mapping[str, Cells]) -> list[Finding]:
    adamw, gated, strong, slower, replayed, other = edge.values()
    at, own = adamw["P^-1 H, of edge"], strong["of own rate's"]
    elsewhere = other["P^-1 H, of edge"]
    controls = [cells["peaks"] for cells in (adamw, slower, replayed)]
    steadier = strong["peaks"].high < min(control.low for control in controls)
    worse = strong["log10 of loss"].mean - adamw["log10 of loss"].mean
    _, found, untuned = (cells["less AdamW's"] for cells in best.values())
    lower = Verdict.HOLDS if found.high < 0 else Verdict.NOT_SEEN
    if found.high >= 0 and found.high < untuned.low:
        lower = Verdict.ONLY_UNTUNED
    losses = [f"{name}: {cells['log10 of loss'].mean:.2f}" for name, cells in best.items()]
    return [
        Finding(
            "VRAdam: Adam trains at the edge of stability, 38 / α",
            Verdict.HOLDS if at.low > 0.9 and at.high < 1.1 else Verdict.REFUTED,
            f"The largest eigenvalue of P^-1 H rises to {at.mean:.2f} of 38 / α and stays there;"
            f" that of H, {adamw['H'].mean:.0f}, is far from 2 / α = {OF_DESCENT / RATE:.0f}. This"
            " is with squared error; with cross-entropy it falls to"
            f" {elsewhere.mean:.2g} of 38 / α.",
        ),
        Finding(
            "VRAdam: a gate that bites steadies training at that edge",
            Verdict.HOLDS if steadier else Verdict.NOT_SEEN,
            f"As published it is {gated['mean rate / α'].mean:.3f} on average here, and the loss"
            f" peaks by {gated['peaks'].mean:.2f} decades, AdamW's by {adamw['peaks'].mean:.2f}."
            f" With beta3 = {STRONG:.0f} by {strong['peaks'].mean:.2f}, at the edge of the gated"
            f" rate ({own.mean:.2f} of it), with a loss {worse:.2f} decades higher; AdamW at its"
            f" mean rate by {slower['peaks'].mean:.2f}, at the rates of another seed's gate by"
            f" {replayed['peaks'].mean:.2f}. The loss rises in {strong['steps uphill'].mean:.0%} of"
            f" steps, AdamW's {adamw['steps uphill'].mean:.0%}.",
        ),
        Finding(
            "VRAdam: it trains to a lower loss than AdamW",
            lower,
            f"The decimal logarithm of the loss: {', '.join(losses)}. The first two are each the"
            " best of as many trials.",
        ),
    ]


def thin(curve: Any) -> Any:
    """Means over as many steps as lie between two measurements."""
    return curve.reshape(*curve.shape[:-1], -1, MEASURED_EVERY).mean(axis=-1)


def draw(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Medians over the seeds, in their range."""
    figure = Figure(figsize=(evidence.WIDTH, 5.2), layout="constrained")
    edge, hessian, rate, loss = figure.subplots(2, 2, sharex=True).ravel()
    for name, found in runs.items():
        curves = Run(*(np.stack(curve) for curve in zip(*found, strict=True)))
        draw_curve(edge, name, curves.preconditioned)
        draw_curve(hessian, name, curves.sharpness)
        draw_curve(rate, name, thin(curves.rate))
        draw_curve(loss, name, thin(curves.loss))
    for axes, level, text in ((edge, OF_ADAM, "38 / α"), (hessian, OF_DESCENT, "2 / α")):
        axes.axhline(level / RATE, color="black", linestyle=":", linewidth=1)
        right = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "top"}
        axes.annotate(text, (1, level / RATE), fontsize=9, **right)
    entitle(edge, "largest eigenvalue of $P^{-1} H$", "", "")
    entitle(hessian, "largest eigenvalue of H", "", "")
    entitle(rate, "rate, with the gate", "steps", "")
    entitle(loss, "loss", "steps", "")
    for axes in figure.axes:
        axes.set_yscale("log")
        tidy(axes)
        log_ticks(axes.yaxis, (1,) if axes is loss else (1, 2, 5))
    handles, _ = edge.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8.5, frameon=False)
    return figure


def draw_curve(axes: Axes, name: str, each: Any) -> None:
    steps = MEASURED_EVERY * np.arange(1, each.shape[1] + 1)
    colour = COLOURS[name]
    axes.plot(steps, np.median(each, axis=0), color=colour, linewidth=1.3, label=name)
    low, high = each.min(axis=0), each.max(axis=0)
    axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    main()
