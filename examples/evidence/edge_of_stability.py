"""VRAdam: what does its gate do at the edge of stability?

    python examples/evidence/edge_of_stability.py

A small network is trained on all of its images at once. Adam's steps α with momentum b1 are stable
while the curvature that they see, the largest eigenvalue of the preconditioned Hessian P^-1 H, is
below (2 + 2 b1) / ((1 - b1) α): 38 / α at b1 = .9 (Cohen et al. 2022, arXiv 2207.14484). Training
increases the curvature up to there. VRAdam divides α by 1 + min(beta3 |u|², cutoff). No optimizer
decays weights.

*At one α.* Three controls start at the rate of the gated run: AdamW, AdamW at the gated run's mean
rate, and AdamW with the rates that the gate made in the training of another seed, which is the
schedule without the feedback. Three more controls have a low rate late in training: AdamW with a
cosine decay from α to 0, and AdamW at a quarter and at an eighth of α.

*The loss.* AdamW and VRAdam are tuned by the same number of trials, on other seeds than they are
judged by. The untuned baseline is AdamW at the default rate. VRAdam runs at its defaults, at the
setting that its authors published for CIFAR-10 (rate .0846, cutoff 29, beta3 1.015), and as in
their figure of the edge.

*The authors' figure of the edge.* It compares VRAdam at rate .002, with cutoff 19 and the
gradient's norm in the gate, with Adam at rate .001. For VRAdam it shows the largest eigenvalue of
H, for Adam that of P^-1 H. This script repeats that comparison, and makes it again with one rate
and one measure for both.

In the tables, a curvature is the largest eigenvalue of P^-1 H divided by the edge 38 / α, or by the
run's own edge, 38 / its rate at that time, gate and schedule included. The highest is that of the
whole training. The curvature of H is the eigenvalue itself. A peak is the distance in decades from
the median loss of 50 steps to the largest, on average. Steps uphill are the share of steps at which
the loss rises. All these are of the second half of the steps; the loss is of the last tenth.

The rate α, the squared error and the larger beta3 were chosen to make an edge and a gate visible.
With cross-entropy the curvature falls instead, which the tables show. The share of steps uphill was
the first measure of steadiness. Peaks were added after curves were seen, and the slow controls
after results were seen. So all results are from seeds that were not used for these choices.

In a larger network the same beta3 closes the gate further, because the norm is a sum over all
parameters. The authors' code takes one norm for each group of parameters, which is
`optax.partition` with one `vradam` for each. Their sweeps searched the rate, beta3, the cutoff and
the measure of the gate for VRAdam, and only the rate for Adam. Their baseline is torch's Adam with
an L2 decay of 1e-5, where the paper says AdamW.
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

import _command_line as command_line
import _estimates as estimates
import _results as results
import _verdicts as verdicts
from _command_line import side_by_side
from _curvature import apply_smooth, initialize_smooth, scale_of_adam, sharpness
from _drawing import (
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
from _training import load_digits
from _verdicts import Finding, Verdict
from optax_ext import vradam

B1, B2, EPS = 0.9, 0.999, 1e-8
HIDDEN, MEASURED_EVERY = 32, 50
RATE = 0.02
# The largest curvatures at which steps of 1 are stable: of gradient descent, and of Adam.
OF_DESCENT, OF_ADAM = 2, (2 + 2 * B1) / (1 - B1)
# The default, and a value at which the gate closes in this network.
DEFAULT, STRONG = 1.0, 3000.0
STRENGTHS = (DEFAULT, 50.0, STRONG)
LOWEST_RATE, HIGHEST_RATE = 2e-3, 0.3
# The rate of those who do not tune: the default of both.
UNTUNED = 1e-3
FIRST_SEED, FIRST_SEARCH_SEED = 200, 1000
ADAMW, VRADAM, STRONGER = "AdamW", "VRAdam", f"VRAdam, beta3 {STRONG:.0f}"
MEAN_RATE, REPLAYED = "AdamW, mean rate", "AdamW, replayed gate"
COSINE, QUARTER, EIGHTH = "AdamW, cosine", "AdamW, α / 4", "AdamW, α / 8"
CROSS_ENTROPY = "AdamW, cross-entropy"
# Where the labels of points are, in points from them.
ABOVE: dict[str, Any] = {"xytext": (5, 4), "ha": "left", "va": "bottom"}
LABELS: dict[str, dict[str, Any]] = {
    ADAMW: {"xytext": (-5, 4), "ha": "right", "va": "bottom"},
    MEAN_RATE: {"xytext": (5, -6), "ha": "left", "va": "top"},
}
SLOW = {COSINE: "with the cosine", QUARTER: "at a quarter of α", EIGHTH: "at an eighth"}
# Columns that the findings read.
OF_EDGE, OF_OWN_EDGE, HIGHEST = "curvature / edge", "curvature / own edge", "highest / edge"
OF_H = "curvature of H"
CURVATURES = (OF_EDGE, OF_OWN_EDGE, HIGHEST, OF_H)
PEAKS, LOSS = "peaks, decades", "log10 of loss"
FROM_UNTUNED, FROM_TUNED = f"from AdamW at {UNTUNED}", "from AdamW at its best"
STYLES: dict[str, dict[str, Any]] = {
    ADAMW: {"color": "0.2", "marker": "o"},
    VRADAM: {"color": BLUE, "marker": "o", "linestyle": "--"},
    STRONGER: {"color": ORANGE, "marker": "o"},
    MEAN_RATE: {"color": GREEN, "marker": "s"},
    REPLAYED: {"color": PINK, "marker": "s", "linestyle": "--"},
    COSINE: {"color": "0.4", "marker": "^", "linestyle": "-."},
    QUARTER: {"color": "0.4", "marker": "<", "linestyle": "none"},
    EIGHTH: {"color": "0.4", "marker": "v", "linestyle": "none"},
}
Cells = dict[str, Estimate]


class Gate(NamedTuple):
    """The arguments of VRAdam's gate."""

    beta3: float
    cutoff: float = 10.0
    norm_of: str = "velocity"


class Setting(NamedTuple):
    """A rate, and a gate for VRAdam; without one it is AdamW."""

    rate: float
    gate: Gate | None = None


# The two settings of the authors' figure of the edge, and AdamW at the gated one's rate.
FIGURE_ADAM, SAME_RATE = f"AdamW, rate {UNTUNED}", "AdamW, rate 0.002"
FIGURE = "VRAdam, rate 0.002, gradient's norm"
AT_DEFAULTS, CIFAR = f"VRAdam, rate {UNTUNED}", "VRAdam, setting for CIFAR-10"
BEST_ADAMW, BEST_VRADAM = "AdamW, best trial", "VRAdam, best trial"
SETTINGS = {
    FIGURE_ADAM: Setting(UNTUNED),
    SAME_RATE: Setting(2e-3),
    FIGURE: Setting(2e-3, Gate(1.0, 19.0, "gradient")),
    AT_DEFAULTS: Setting(UNTUNED, Gate(DEFAULT)),
    CIFAR: Setting(0.0846, Gate(1.015, 29.0)),
}


class Run(NamedTuple):
    """The curves of one run.

    Attributes:
      loss: the loss before each step.
      rate: the rate of each step, the gate's factor included.
      sharpness: the largest eigenvalue of the Hessian, after every `MEASURED_EVERY` steps.
      preconditioned: the largest eigenvalue of P^-1 H, likewise.
    """

    loss: Any
    rate: Any
    sharpness: Any
    preconditioned: Any

    @property
    def late_loss(self) -> float:
        """Mean logarithm of the loss over the last tenth, because a loss at the edge jumps."""
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

    run = jax.jit(partial(run_training, loss), static_argnames=("norm_of", "measured"))

    def train(seed: int, rates: ArrayLike, gate: Gate | None = None, measured=True) -> Run:
        params = initialize_smooth(jax.random.key(seed), [x.shape[1], HIDDEN, HIDDEN, 10])
        rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (options.steps,))
        beta3, cutoff, norm_of = gate or (0.0, 0.0, None)
        found = run(params, rates, beta3, cutoff, norm_of=norm_of, measured=measured)
        return jax.tree.map(np.asarray, found)

    return train


def run_training(loss, params, rates, beta3, cutoff, *, norm_of: str | None, measured: bool) -> Run:
    make = optax.adamw
    if norm_of:
        make = partial(vradam, beta3=beta3, lr_cutoff=cutoff, norm_of=norm_of)
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
    """Planned runs: for each seed one rate, or one for each step; with a gate or without."""

    rates: Sequence[ArrayLike]
    gate: Gate | None = None
    train: Train | None = None


# The constants that decide the results, which contain them.
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
    "SETTINGS": [[rate, *(gate[:2] if gate else (0, 0))] for rate, gate in SETTINGS.values()],
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
    compared, settings = compare(train, options)
    losses = {name: np.array([run.late_loss for run in x]) for name, x in compared.items()}
    curvatures = {name: curvatures_of(compared[name]) for name in (FIGURE_ADAM, SAME_RATE, FIGURE)}
    tables = {
        f"Curvature and rate, at α = {RATE}": columns(edge, "mean rate / α", *CURVATURES),
        f"Loss, at α = {RATE}": columns(edge, "steps uphill", PEAKS, LOSS),
        "Curvature, as in the authors' figure and at one rate": {
            name: {key: estimates.mean(x) for key, x in found.items()}
            for name, found in curvatures.items()
        },
        f"Loss at published settings, and at the best of {len(STRENGTHS) * options.rates} trials": {
            name: row_of_loss(settings[name], losses, name) for name in losses
        },
    }
    figures = {
        "edge_of_stability": draw_curves(runs),
        "edge_of_stability-comparisons": draw_comparisons(edge, curvatures, losses),
    }
    findings = [
        *judge_edges(edge),
        judge_steadiness(edge),
        judge_curvature(curvatures),
        *judge_losses(losses, settings),
    ]
    results.publish("edge_of_stability", options, findings, tables, figures, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        seeds=(10, "initial weights"),
        trials=(10, "other seeds, on which each rate is tried"),
        steps=(2000, "steps of each training"),
        images=(256, "images to train on"),
        rates=(
            6,
            f"rates that VRAdam tries with {len(STRENGTHS)} strengths; AdamW tries thrice as"
            " many rates",
        ),
    )


def at_the_edge(
    train: Train, train_other: Train, options: argparse.Namespace
) -> dict[str, list[Run]]:
    """Return a run of every contender for each seed."""
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def run(plan: Plan) -> list[Run]:
        of_one = partial(plan.train or train, gate=plan.gate)
        return [of_one(seed, rates) for seed, rates in zip(seeds, plan.rates, strict=True)]

    def alike(rates: ArrayLike, *args: Any) -> Plan:
        return Plan([rates] * len(seeds), *args)

    cosine = optax.cosine_decay_schedule(RATE, options.steps)(np.arange(options.steps))
    plans = {
        ADAMW: alike(RATE),
        VRADAM: alike(RATE, Gate(DEFAULT)),
        STRONGER: alike(RATE, Gate(STRONG)),
        COSINE: alike(cosine),
        QUARTER: alike(RATE / 4),
        EIGHTH: alike(RATE / 8),
        CROSS_ENTROPY: alike(RATE, None, train_other),
    }
    runs = side_by_side(run, plans)
    gated = [found.rate for found in runs[STRONGER]]
    plans = {
        MEAN_RATE: Plan([rates.mean() for rates in gated]),
        REPLAYED: Plan(gated[-1:] + gated[:-1]),
    }
    runs |= side_by_side(run, plans)
    return {name: runs[name] for name in (*STYLES, CROSS_ENTROPY)}


def compare(
    train: Train, options: argparse.Namespace
) -> tuple[dict[str, list[Run]], dict[str, Setting]]:
    """Return the runs at the published settings and at the best trials, and all settings."""
    settings = SETTINGS | tune(train, options)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def run(setting: Setting) -> list[Run]:
        # Only the authors' figure is about curvatures.
        measured = setting in (SETTINGS[FIGURE_ADAM], SETTINGS[SAME_RATE], SETTINGS[FIGURE])
        return [train(seed, *setting, measured=measured) for seed in seeds]

    return side_by_side(run, settings), settings


def tune(train: Train, options: argparse.Namespace) -> dict[str, Setting]:
    """Return the best trial of AdamW and of VRAdam, by seeds that judge nothing."""
    seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + options.trials)

    def late_loss(setting: Setting) -> float:
        runs = (train(seed, *setting, measured=False) for seed in seeds)
        return float(np.mean([run.late_loss for run in runs]))

    trials = {
        BEST_ADAMW: [Setting(x) for x in grid(len(STRENGTHS) * options.rates)],
        BEST_VRADAM: [Setting(x, Gate(beta3)) for beta3 in STRENGTHS for x in grid(options.rates)],
    }
    best = {}
    for name, settings in trials.items():
        numbered = {f"{name}, {i}": setting for i, setting in enumerate(settings)}
        losses = list(side_by_side(late_loss, numbered).values())
        best[name] = settings[int(np.nanargmin(losses))]
    return best


def grid(rates: int) -> list[float]:
    return np.geomspace(LOWEST_RATE, HIGHEST_RATE, rates).tolist()


def row(runs: Sequence[Run]) -> Cells:
    """Return the table's cells, over seeds."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_edge = np.array([run.preconditioned * RATE / OF_ADAM for run in runs])
    of_own = np.array([run.preconditioned * thin(run.rate) / OF_ADAM for run in runs])
    return {
        "mean rate / α": estimates.mean([run.rate.mean() / RATE for run in runs]),
        OF_EDGE: estimates.mean(np.median(of_edge[:, late], axis=1)),
        OF_OWN_EDGE: estimates.mean(np.median(of_own[:, late], axis=1)),
        HIGHEST: estimates.mean(of_edge.max(axis=1)),
        OF_H: estimates.mean([np.median(run.sharpness[late]) for run in runs]),
        "steps uphill": estimates.mean([rises(run.loss) for run in runs]),
        PEAKS: estimates.mean([peaks(run.loss)[late].mean() for run in runs]),
        LOSS: estimates.mean([run.late_loss for run in runs]),
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


def curvatures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the medians over the second half, for each seed; those of loss are logarithms."""
    late = slice(len(runs[0].sharpness) // 2, None)
    of_own = [run.preconditioned * thin(run.rate) / OF_ADAM for run in runs]
    return {
        "mean rate": [float(run.rate.mean()) for run in runs],
        "log10 of H's": np.array([np.log10(np.median(run.sharpness[late])) for run in runs]),
        "log10 of P^-1 H's": np.array(
            [np.log10(np.median(run.preconditioned[late])) for run in runs]
        ),
        OF_OWN_EDGE: [float(np.median(x[late])) for x in of_own],
        LOSS: [run.late_loss for run in runs],
    }


def row_of_loss(setting: Setting, losses: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the row of one setting; differences are paired, seed by seed."""
    return {
        "rate": in_words(setting.rate) if "best" in name else f"{setting.rate:g}",
        "beta3": f"{setting.gate.beta3:g}" if setting.gate else "-",
        LOSS: estimates.mean(losses[name]),
        FROM_UNTUNED: estimates.mean(losses[name] - losses[FIGURE_ADAM]),
        FROM_TUNED: estimates.mean(losses[name] - losses[BEST_ADAMW]),
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
    """Judge whether VRAdam is steadier than AdamW at the same rates and than slow AdamW.

    Against slow AdamW it needs smaller peaks and a lower loss.
    """
    gated, published = edge[STRONGER], edge[VRADAM]
    measures = PEAKS, LOSS
    slow = {name: [edge[name][x].minus(gated[x]) for x in measures] for name in SLOW}
    alike = [edge[name][PEAKS].minus(gated[PEAKS]) for name in (ADAMW, MEAN_RATE, REPLAYED)]

    def shown(name: str) -> str:
        return f"{edge[name][PEAKS].mean:.2g} ({edge[name][LOSS].mean:.2f})"

    def less(name: str) -> str:
        return f"peaks {gated[PEAKS].mean - edge[name][PEAKS].mean:+.2f} decades"

    said = ", ".join(f"{how} {shown(name)}" for name, how in SLOW.items())
    worse = sum(all(x.low > 0 for x in differences) for differences in slow.values())
    better = sum(all(x.high < 0 for x in differences) for differences in slow.values())
    return Finding(
        "VRAdam: a gate below 1 makes training at that edge steadier, and a lower rate does not",
        verdicts.judge([*alike, *(x for each in slow.values() for x in each)], alike),
        f"Peaks of the loss in decades, and the logarithm of the loss in the end: VRAdam with"
        f" beta3 = {STRONG:.0f} {shown(STRONGER)}, at {gated[OF_OWN_EDGE].mean:.2f} of the edge of"
        f" its gated rate; VRAdam as published, where the gate's mean is"
        f" {published['mean rate / α'].mean:.3f}, {shown(VRADAM)}; AdamW at α {shown(ADAMW)}, at"
        f" the gated run's mean rate {shown(MEAN_RATE)}, at the rates of another seed's gate"
        f" {shown(REPLAYED)}. AdamW that is slow late: {said}. In both measures {worse} of these"
        f" {len(SLOW)} are worse than the gate, and {better} better.",
        untuned=less(ADAMW),
        tuned=f"{less(COSINE)} (AdamW with a cosine)",
    )


def judge_curvature(curvatures: Mapping[str, Mapping[str, Any]]) -> Finding:
    as_shown, fair = compare_curvatures(curvatures)
    of_h, of_both = fair.values()
    seen = curvatures[FIGURE_ADAM][OF_OWN_EDGE], curvatures[FIGURE][OF_OWN_EDGE]
    at = [f"{estimates.mean(x).mean:.2g}" for x in seen]
    return Finding(
        "VRAdam: it trains at a lower curvature than Adam",
        verdicts.judge([-of_h, -of_both], [-as_shown]),
        f"Difference from Adam in decades. As in the authors' figure, VRAdam's H at rate .002"
        f" and Adam's P^-1 H at .001: {decades(as_shown)}. Both at .002: {decades(of_h)} of H,"
        f" {decades(of_both)} of P^-1 H. Neither is near its edge here: Adam at {at[0]} of it,"
        f" VRAdam at {at[1]}. {estimates.sensitivity(of_h, ' decades', 2)}",
        untuned=f"curvature {decades(as_shown)} decades, with two measures",
        tuned=f"curvature {decades(of_h)} decades of H, {decades(of_both)} of P^-1 H",
    )


def compare_curvatures(
    curvatures: Mapping[str, Mapping[str, Any]],
) -> tuple[Estimate, dict[str, Estimate]]:
    """Return VRAdam's difference from Adam as the authors show it, and at one rate by measure."""
    of_h, of_both = "log10 of H's", "log10 of P^-1 H's"
    gated = curvatures[FIGURE]
    as_shown = estimates.mean(gated[of_h] - curvatures[FIGURE_ADAM][of_both])
    fair = {x: estimates.mean(gated[x] - curvatures[SAME_RATE][x]) for x in (of_h, of_both)}
    return as_shown, fair


def judge_losses(losses: Mapping[str, Any], settings: Mapping[str, Setting]) -> list[Finding]:
    """Judge VRAdam tuned, and at two settings of its authors."""

    def finding(claim: str, untuned: str, tuned: str) -> Finding:
        """Judge one setting of VRAdam against untuned AdamW, and one against tuned AdamW."""
        from_untuned = estimates.mean(losses[untuned] - losses[FIGURE_ADAM])
        from_tuned = estimates.mean(losses[tuned] - losses[BEST_ADAMW])
        extra = ""
        if untuned == FIGURE:
            at_one = estimates.mean(losses[FIGURE] - losses[SAME_RATE])
            extra = f" From AdamW at the same rate: {decades(at_one)}."
        if tuned == BEST_VRADAM:
            found = settings[BEST_VRADAM]
            beta3 = found.gate.beta3 if found.gate else 0.0
            extra = f" VRAdam's best trial is rate {in_words(found.rate)} with beta3 {beta3:g}."
        return Finding(
            claim,
            verdicts.judge([-from_tuned], [-from_untuned]),
            f"Difference in decades of the loss: {decades(from_untuned)} from AdamW at rate"
            f" {UNTUNED}; {decades(from_tuned)} from AdamW at its best rate,"
            f" {in_words(settings[BEST_ADAMW].rate)}.{extra}"
            f" {estimates.sensitivity(from_tuned, ' decades', 2)}",
            untuned=f"loss {decades(from_untuned)} decades",
            tuned=f"loss {decades(from_tuned)} decades",
        )

    claim = "VRAdam: it trains to a lower loss than AdamW"
    return [
        finding(claim, AT_DEFAULTS, BEST_VRADAM),
        finding(f"{claim}, at twice Adam's rate as in the authors' figure", FIGURE, FIGURE),
        finding(f"{claim}, at the authors' setting for CIFAR-10", CIFAR, CIFAR),
    ]


def decades(x: Estimate) -> str:
    return estimates.signed(x, 2)


def thin(curve: Any) -> Any:
    """Return means over the steps between two measurements."""
    return curve.reshape(*curve.shape[:-1], -1, MEASURED_EVERY).mean(axis=-1)


def draw_curves(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Draw medians over the seeds with their range."""
    figure = Figure(figsize=(FIGURE_WIDTH, 5.8), layout="constrained")
    panels: Any = figure.subplot_mosaic([["edge", "H"], ["rate", "loss"]])
    for name in STYLES:
        if name in (QUARTER, EIGHTH):
            continue
        curves = Run(*(np.stack(curve) for curve in zip(*runs[name], strict=True)))
        draw_curve(panels["edge"], name, curves.preconditioned)
        draw_curve(panels["H"], name, curves.sharpness)
        draw_curve(panels["rate"], name, thin(curves.rate))
        draw_curve(panels["loss"], name, thin(curves.loss))
    for axes, level, text in (
        (panels["edge"], OF_ADAM, "38 / α"),
        (panels["H"], OF_DESCENT, "2 / α"),
    ):
        axes.axhline(level / RATE, color="black", linestyle=":", linewidth=1)
        beside = {"xycoords": axes.get_yaxis_transform(), "ha": "left", "va": "center"}
        axes.annotate(text, (1.01, level / RATE), fontsize=9, **beside)
    title = "curvature that Adam sees, and its edge"
    entitle(panels["edge"], title, "steps", "top eigenvalue of $P^{-1} H$")
    title = "curvature of the loss, and gradient descent's edge"
    entitle(panels["H"], title, "steps", "top eigenvalue of H")
    entitle(panels["rate"], "rate, with gate and schedule", "steps", "rate")
    entitle(panels["loss"], f"loss, means of {MEASURED_EVERY} steps", "steps", "squared error")
    for name, axes in panels.items():
        axes.set_yscale("log")
        tidy(axes)
        log_ticks(axes.yaxis, (1,) if name == "loss" else (1, 2, 5))
    panels["rate"].set_ylim(bottom=RATE / 20)
    handles, _ = panels["edge"].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8.5, frameon=False)
    return figure


def draw_comparisons(
    edge: Mapping[str, Cells],
    curvatures: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, Any],
) -> Figure:
    """Draw peaks against losses, and the differences from AdamW that decide."""
    figure = Figure(figsize=(FIGURE_WIDTH, 6.6), layout="constrained")
    panels: Any = figure.subplot_mosaic([["peaks", "peaks"], ["H", "loss"]], height_ratios=(1.3, 1))
    draw_peaks(panels["peaks"], edge)
    draw_loss_differences(panels["loss"], losses)
    axes = panels["H"]
    as_shown, fair = compare_curvatures(curvatures)
    rows = {
        "as in the authors' figure:\nVRAdam's H, Adam's $P^{-1} H$": as_shown,
        "at one rate: both H": fair["log10 of H's"],
        "at one rate: both $P^{-1} H$": fair["log10 of P^-1 H's"],
    }
    axes.axvline(0, color="0.6", linewidth=1)
    draw_estimates(axes, [0], [as_shown], across=True, color=ORANGE)
    draw_estimates(
        axes, [1, 2], list(fair.values()), across=True, color=BLUE, linestyle="", fillstyle="none"
    )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(2.6, -0.6)
    tidy(axes, grid="x")
    entitle(axes, "curvature: VRAdam's difference from Adam", "decades (left is lower)", "")
    return figure


def draw_peaks(axes: Axes, edge: Mapping[str, Cells]) -> None:
    for name, style in STYLES.items():
        draw_point(axes, edge[name], style)
        at = edge[name][LOSS].mean, edge[name][PEAKS].mean
        place = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
        axes.annotate(name, at, **place, **LABELS.get(name, ABOVE))
    axes.set_yscale("log")
    tidy(axes)
    log_ticks(axes.yaxis)
    axes.margins(0.1, 0.15)
    title = f"steadiness and loss at α = {RATE}: lower is steadier, left is a lower loss"
    entitle(axes, title, "log10 of the loss in the end", "peaks of the loss (decades)")


def draw_loss_differences(axes: Axes, losses: Mapping[str, Any]) -> None:
    rows = {
        "both tuned, or\nboth at the default rate": (AT_DEFAULTS, BEST_VRADAM),
        "as in the authors' figure": (FIGURE, FIGURE),
        "setting for CIFAR-10": (CIFAR, CIFAR),
    }
    axes.axvline(0, color="0.6", linewidth=1)
    kinds = (
        (FIGURE_ADAM, ORANGE, "full", f"from AdamW at {UNTUNED}"),
        (BEST_ADAMW, BLUE, "none", "from AdamW at its best"),
    )
    for which, (baseline, colour, fill, label) in enumerate(kinds):
        found = [estimates.mean(losses[x[which]] - losses[baseline]) for x in rows.values()]
        places = np.arange(len(rows)) + 0.3 * (which - 0.5)
        look = {"color": colour, "fillstyle": fill, "linestyle": "", "label": label}
        draw_estimates(axes, places, found, across=True, **look)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, grid="x")
    entitle(axes, "loss: VRAdam's difference from AdamW", "decades (left is lower)", "")
    below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.2), "ncols": 1}
    axes.legend(fontsize=8, frameon=False, **below)


def draw_curve(axes: Axes, name: str, each: Any) -> None:
    style = STYLES[name]
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
