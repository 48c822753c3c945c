"""InvAdam: does gradient noise drive it out of sharp minima sooner than out of wide ones?

    python examples/evidence/escapes.py

The wells have one depth and several widths. The gradient's noise has the variance H / B, as the
noise of batches of B has at a minimum of curvature H. Each method has the rate at which the widest
well holds all methods for equally long, so that no method gains by a larger rate. By the diffusion
theory of Xie et al. (arXiv 2006.15815) a barrier ΔL delays the escape by exp(ΔL / T) with T =
α' H / 2B, where α' is the rate after the division or multiplication by sqrt(v) = sqrt(H / B):

    ΔL / T = 2 B ΔL / (α H) of SGD, 2 B^½ ΔL / (α H^½) of Adam, 2 B^1.5 ΔL / (α H^1.5) of InvAdam

The verdict is on the power p in ΔL / T ~ H^-p: InvAdam's has to exceed SGD's and Adam's.

This script has batches of one. InvAdam's steps grow with the squared gradient, so with the noise of
larger batches its escapes become rare unless its rate grows too.
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
from _drawing import BLUE, FIGURE_WIDTH, GREEN, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _estimates import Estimate
from _progress import progress_bar
from _tuning import Factory
from _verdicts import Finding
from optax_ext import dualadam, invadam

# Depth of all wells, their curvatures, and B.
BARRIER, CURVATURES, BATCH = 0.02, np.geomspace(1, 2.5, 6), 1.0
# ΔL / T in the widest well.
LONGEST = 5.5
# A trajectory has left when it is half a hill's width behind the top, from where few return.
PASSED = 1.5 * np.pi


class Escaping(NamedTuple):
    """A method in a well.

    Attributes:
      factory: makes it for a rate.
      gain: α' / α, for the noise's deviation.
      power: the theory's p in ΔL / T ~ H^-p; `None` for a blend, whose p depends on H.
      colour: the colour of its curve.
    """

    factory: Factory
    gain: Callable[[Any], Any]
    power: float | None
    colour: str


def half_dualadam(rate: Any) -> optax.GradientTransformation:
    """Return DualAdam with an equal share of both terms at all steps."""
    return dualadam(rate, switch_rate=lambda count: jnp.full_like(count, 0.5, jnp.float32))


ESCAPING = {
    "SGD": Escaping(optax.sgd, np.ones_like, 1.0, "0.2"),
    "Adam": Escaping(optax.adam, lambda s: 1 / s, 0.5, BLUE),
    "InvAdam": Escaping(invadam, lambda s: s, 1.5, ORANGE),
    "DualAdam, half and half": Escaping(half_dualadam, lambda s: (s + 1 / s) / 2, None, GREEN),
}
# Recorded with the results, which depend on them.
CONSTANTS = {
    "BARRIER": BARRIER,
    "CURVATURES": CURVATURES,
    "BATCH": BATCH,
    "LONGEST": LONGEST,
    "PASSED": PASSED,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    escapes = {}
    with progress_bar(len(ESCAPING)) as on_progress:
        for name, method in ESCAPING.items():
            escapes[name] = escape(method, options.groups, options.trajectories, options.patience)
            on_progress(name, 1)
    title = "ΔL / T from the times in the widest and in the sharpest well, and the power p"
    rows = {name: row(ESCAPING[name], found) for name, found in escapes.items()}
    results.publish(
        "escapes", options, [judge(escapes)], {title: rows}, {"escapes": draw(escapes)}, CONSTANTS
    )


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        groups=(10, "groups of trajectories, over which the intervals are"),
        trajectories=(100, "trajectories in each group and well"),
        patience=(60000, "steps after which the simulation ends"),
    )


class Escape(NamedTuple):
    """The escapes of one method, for each well (and each group of trajectories).

    Attributes:
      times: mean number of steps until a trajectory has left.
      barriers: ΔL / T, computed from the times.
      theory: ΔL / T by the closed form.
      powers: p of each group.
    """

    times: Any
    barriers: Any
    theory: Any
    powers: Any


def escape(method: Escaping, groups: int, trajectories: int, steps: int) -> Escape:
    deviation = np.sqrt(CURVATURES / BATCH)
    gains = method.gain(deviation)
    rate = 2 * BATCH * BARRIER / (LONGEST * CURVATURES[0] * gains[0])
    theory = 2 * BATCH * BARRIER / (rate * gains * CURVATURES)
    left, time = leave(method.factory, rate, groups * trajectories, steps)
    # The estimate of the mean of exponential times that are cut off at `steps`.
    total, count = (np.reshape(x, (-1, groups, trajectories)).sum(-1) for x in (time, left))
    if not count.all():
        raise SystemExit(f"--patience {steps}: of a group of {trajectories}, none left its well")
    times = total / count
    barriers = barrier_of(times * (rate * gains * CURVATURES)[:, None])
    powers = -np.polyfit(np.log(CURVATURES), np.log(barriers), 1)[0]
    return Escape(times, barriers, theory, powers)


@partial(jax.jit, static_argnames=("factory", "number", "steps"))
def leave(factory: Factory, rate: Any, number: int, steps: int) -> tuple[Any, Any]:
    """Return whether each trajectory leaves its well, and its steps until then or until the end.

    The wells are those of ΔL (1 - cos(x / w)) / 2, of curvature ΔL / 2 w² at their bottom; all
    methods here are elementwise, so that all trajectories are one vector of parameters.
    """
    tx = factory(rate)
    curvatures = jnp.asarray(CURVATURES, jnp.float32)[:, None]
    width = jnp.sqrt(BARRIER / 2 / curvatures)
    deviation = jnp.sqrt(curvatures / BATCH)

    def step(run: Any, t: Any) -> tuple[Any, None]:
        x, state, inside, time = run
        noise = deviation * jax.random.normal(jax.random.fold_in(key, t), x.shape)
        gradient = BARRIER / 2 / width * jnp.sin(x / width) + noise
        updates, state = tx.update(gradient, state, x)
        x = x + updates
        return (x, state, inside & (abs(x / width) < PASSED), time + inside), None

    key = jax.random.key(0, impl="rbg")
    x = jnp.zeros((len(CURVATURES), number))
    begin = x, tx.init(x), jnp.ones(x.shape, bool), jnp.zeros(x.shape)
    (_, _, inside, time), _ = lax.scan(step, begin, jnp.arange(steps))
    return ~inside, time


def barrier_of(times: Any) -> Any:
    """Return ΔL / T from mean times, in units of the time 1 / (α' H) in which a well relaxes.

    The mean time of y = x / w, whose diffusion D is 2 T / ΔL, is the integral over 0 < z < y <
    `PASSED` of exp((U(y) - U(z)) / D) / D with U = 1 - cos. It is exact for low barriers too.
    """
    y = np.linspace(0, PASSED, 2001)
    exponents = np.linspace(0.05, 12, 400)

    def passage(exponent: float) -> float:
        weight = np.exp((1 - np.cos(y)) * exponent / 2)
        inner = np.cumsum(1 / weight) * (y[1] - y[0])
        return float(np.sum(weight * inner) * (y[1] - y[0]) * exponent / 2)

    passages = [passage(exponent) for exponent in exponents]
    return np.exp(np.interp(np.log(times), np.log(passages), np.log(exponents)))


def row(method: Escaping, found: Escape) -> dict[str, Estimate | float | str]:
    return {
        "widest": estimates.mean(found.barriers[0]),
        "widest, theory": float(found.theory[0]),
        "sharpest": estimates.mean(found.barriers[-1]),
        "sharpest, theory": float(found.theory[-1]),
        "steps in the widest": estimates.mean(found.times[0]),
        "in the sharpest": estimates.mean(found.times[-1]),
        "p": estimates.mean(found.powers),
        "p, theory": "-" if method.power is None else method.power,
    }


def judge(escapes: Mapping[str, Escape]) -> Finding:
    p = {name: estimates.mean(found.powers) for name, found in escapes.items()}
    more = {
        name: estimates.mean(escapes["InvAdam"].powers - escapes[name].powers)
        for name in ("SGD", "Adam")
    }
    times = {name: found.times.mean(axis=1) for name, found in escapes.items()}
    sooner = {name: time[0] / time[-1] for name, time in times.items()}
    return Finding(
        "InvAdam: under gradient noise it leaves sharp minima first",
        verdicts.judge(list(more.values())),
        f"The barrier falls with curvature as H^-p with p = {p['InvAdam']} (in theory 1.5, if"
        f" barriers are high). SGD's p is {p['SGD']} (1), Adam's {p['Adam']} (½). InvAdam leaves a"
        f" well that is {CURVATURES[-1] / CURVATURES[0]:.1f} times as sharp"
        f" {sooner['InvAdam']:.0f} times sooner, SGD {sooner['SGD']:.0f} and Adam"
        f" {sooner['Adam']:.0f} times sooner.",
        tuned=f"p {estimates.signed(more['SGD'], 2)} against SGD's",
    )


def draw(escapes: Mapping[str, Escape]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
    steps, barriers = figure.subplots(1, 2)
    for name, found in escapes.items():
        colour = ESCAPING[name].colour
        draw_groups(steps, found.times, colour, linewidth=1)
        draw_groups(barriers, found.barriers, colour, linestyle="", label=name)
        barriers.plot(CURVATURES, found.theory, color=colour, linewidth=1)
    log_ticks(steps.yaxis, at=[1], form="{x:,.0f}")
    log_ticks(barriers.yaxis, at=[1, 1.5, 2, 3, 4, 5])
    entitle(steps, "time in a well", "curvature H of the well", "steps until the escape")
    entitle(
        barriers, "barrier (lines: diffusion theory)", "curvature H of the well", "barrier ΔL / T"
    )
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_groups(axes: Axes, values: Any, colour: str, **look: Any) -> None:
    """Draw the mean over the groups in each well, with its interval."""
    found = [estimates.mean(of_groups) for of_groups in values]
    draw_estimates(axes, CURVATURES, found, color=colour, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis, at=[1, 1.5, 2, 3])
    tidy(axes)


if __name__ == "__main__":
    main()
