"""quantize_state: does an update stay the same if the optimizer's state is stored in 8 bits?

    python examples/evidence/low_precision.py

Gradients are lognormal over rows and over columns, so that elements that share a scale differ by
orders of magnitude. In a second phase half of the columns fall tenfold. An average of b2 = .999
follows slowly: it changes by .1 % in a step, and two neighbouring 8-bit codes differ by more. Each
optimizer takes the same gradients twice, with its state in float32 and with its state stored in a
format. An error is the RMS of the difference of their updates, divided by the RMS of float32's
updates, over the last steps of a phase. "Largest" is the largest element of the updates, divided by
the largest of float32's.

In this script, the published formats round the state after each step:

- *FlashOptim* (arXiv 2602.23349): m in int8 by a softsign, sqrt(v) in uint8 with linear codes,
  groups of 32 elements with scales in float16. One row has its scales in float32, which shows the
  error of the codes alone.
- *bitsandbytes* (Dettmers et al., arXiv 2110.02861): the 256 numbers of the "dynamic" map, for m
  and for v, blocks of 256 elements with scales in float32.

This script does not show how an error of the update changes a training: its gradients do not depend
on the updates, and the parameters stay 0.
"""

import argparse
import warnings
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
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _estimates import Estimate
from _progress import two_at_a_time
from _results import Rows
from _verdicts import Finding, Verdict
from optax_ext import caadam, dualadam, fame, formats, invadam, novak, quantize_state, vradam

SHAPE = 32, 256
# Typical size of a gradient, and the deviations of its logarithm over rows and over columns.
SIZE, ROWS, COLUMNS = 1e-4, 1.5, 1.0
# The factor of half of the columns in the second phase.
FALL = 0.1
# The number of steps at the end of a phase in which errors are measured.
MEASURED = 200
# The error that the claim allows.
ALLOWED = 0.13
# Recorded with the results, which depend on them.
CONSTANTS = {
    "SHAPE": SHAPE,
    "SIZE": SIZE,
    "ROWS": ROWS,
    "COLUMNS": COLUMNS,
    "FALL": FALL,
    "MEASURED": MEASURED,
    "ALLOWED": ALLOWED,
}

# A function from an array to the array that is read after it was stored.
Rounding = Callable[[jax.Array], jax.Array]


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    # CaAdam is Adam on a single array.
    warnings.filterwarnings("ignore", ".*nothing will be scaled", UserWarning)
    # All formats of Adam in one program, which draws the gradients and runs float32's Adam once.
    races = {"Adam": Race(ADAM, tuple(stored.tx for stored in STORED.values()))}
    races |= {name: Race(tx, (quantize_state(tx),)) for name, tx in OPTIMIZERS.items()}
    compare_one = partial(compare, seeds=options.seeds, steps=options.steps)
    found = two_at_a_time(compare_one, races)
    of_adam = {
        name: {"bytes": stored.bytes} | row(phases)
        for (name, stored), phases in zip(STORED.items(), found["Adam"], strict=True)
    }
    of_all = {name: row(*found[name]) for name in OPTIMIZERS}
    tables = {
        "Adam with its state in several formats, bytes of the state per parameter": of_adam,
        "Optimizers with their state in the default formats of quantize_state": of_all,
    }
    figure = draw(of_adam, of_all)
    results.publish(
        "low_precision", options, [judge(of_adam)], tables, {"low_precision": figure}, CONSTANTS
    )


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__, seeds=(8, "series of gradients"), steps=(1000, "in each of the two phases")
    )


def round_adam(
    mu: Rounding = lambda x: x, nu: Rounding = lambda x: x
) -> optax.GradientTransformation:
    """Return Adam, whose first and second moment are rounded after each step."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = ADAM.update(updates, state, params)
        return updates, state._replace(mu=mu(state.mu), nu=nu(state.nu))

    return optax.GradientTransformation(ADAM.init, update)


def in_groups(
    x: jax.Array, size: int, codes: Rounding, scale_dtype: Any = jnp.float32
) -> jax.Array:
    """Divide groups by their largest absolute value, apply `codes`, and multiply again."""
    groups = x.reshape(-1, size)
    scales = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
    normalized = groups / jnp.where(scales > 0, scales, 1)
    return (codes(normalized) * scales.astype(scale_dtype).astype(jnp.float32)).reshape(x.shape)


def linear_codes(y: jax.Array) -> jax.Array:
    """Round numbers in [0, 1] to multiples of 1 / 255."""
    return jnp.round(y * 255) / 255


def softsign_codes(y: jax.Array) -> jax.Array:
    """Round 2 y / (1 + |y|) to multiples of 1 / 127, and return the y of the result."""
    z = jnp.round(2 * y / (1 + jnp.abs(y)) * 127) / 127
    return z / (2 - jnp.abs(z))


def flash_first(m: jax.Array, scale_dtype: Any = jnp.float16) -> jax.Array:
    """Round a first moment as FlashOptim does (arXiv 2602.23349)."""
    return in_groups(m, 32, softsign_codes, scale_dtype)


def flash_second(v: jax.Array, scale_dtype: Any = jnp.float16) -> jax.Array:
    """Round a second moment as FlashOptim does (arXiv 2602.23349)."""
    return in_groups(jnp.sqrt(v), 32, linear_codes, scale_dtype) ** 2


def dynamic_map(*, signed: bool) -> np.ndarray:
    """Return the numbers of the dynamic map (Dettmers et al., arXiv 2110.02861) in order.

    The decade below 10^-e has half as many numbers as the one above it: 128 in the highest, or 64
    of each sign. They are the centers of equal parts of a decade. 0 and 1 are added.
    """
    highest = 6 if signed else 7
    decades = []
    for exponent in range(7):
        parts = 2 ** (highest - exponent)
        centers = 0.1 + 0.9 * (np.arange(parts) + 0.5) / parts
        decades.append(10.0**-exponent * centers)
    positive = np.concatenate(decades)
    negative = -positive if signed else positive[:0]
    return np.sort(np.concatenate([negative, positive, [0, 1]])).astype(np.float32)


def dynamic(x: jax.Array, *, signed: bool) -> jax.Array:
    """Round to the nearest number of the dynamic map, as bitsandbytes does."""
    numbers = dynamic_map(signed=signed)
    borders = (numbers[1:] + numbers[:-1]) / 2

    def codes(y: jax.Array) -> jax.Array:
        return jnp.asarray(numbers)[jnp.searchsorted(jnp.asarray(borders), y)]

    return in_groups(x, 256, codes)


def to_bfloat16(x: jax.Array) -> jax.Array:
    """Round to the nearest bfloat16."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def by(format_: Any) -> Rounding:
    """Return the rounding of a format of ours, to the nearest code."""
    return lambda x: format_.encode(x).decode()


def only_second_in_bfloat16(field: Any, parameter: Any, leaf: Any) -> formats.BFloat16 | None:
    """Return the format of Adam's second moment; no other leaf has one."""
    del parameter, leaf
    is_second = any(getattr(key, "name", None) == "nu" for key in field)
    return formats.BFloat16() if is_second else None


class Stored(NamedTuple):
    """Adam with its state in a format.

    Attributes:
      tx: the optimizer.
      bytes: of the two moments per parameter, with their scales.
    """

    tx: optax.GradientTransformation
    bytes: float


ADAM = optax.scale_by_adam()
OURS, FLASH, DYNAMIC = "ours", "FlashOptim", "bitsandbytes"
STORED = {
    OURS: Stored(quantize_state(ADAM), 2 + 8 / 64),
    "ours, both to nearest": Stored(
        round_adam(by(formats.SignedRoot()), by(formats.FourthRoot())), 2 + 8 / 64
    ),
    "v in bfloat16, nearest": Stored(round_adam(nu=to_bfloat16), 4 + 2),
    "v in bfloat16, stochastic": Stored(quantize_state(ADAM, only_second_in_bfloat16), 4 + 2),
    FLASH: Stored(round_adam(flash_first, flash_second), 2 + 4 / 32),
    "FlashOptim, float32 scales": Stored(
        round_adam(
            partial(flash_first, scale_dtype=jnp.float32),
            partial(flash_second, scale_dtype=jnp.float32),
        ),
        2 + 8 / 32,
    ),
    DYNAMIC: Stored(
        round_adam(partial(dynamic, signed=True), partial(dynamic, signed=False)), 2 + 8 / 256
    ),
    "bitsandbytes, v only": Stored(round_adam(nu=partial(dynamic, signed=False)), 5 + 4 / 256),
    "v in linear uint8": Stored(
        round_adam(nu=partial(in_groups, size=64, codes=linear_codes)), 5 + 4 / 64
    ),
}
# DualAdam has become Adam after 100 steps.
OPTIMIZERS = {
    "AdamW": optax.adamw(1.0),
    "FAME": fame(1.0),
    "VRAdam": vradam(1.0),
    "InvAdam": invadam(1.0),
    "DualAdam": dualadam(1.0),
    "NOVAK": novak(1.0),
    "CaAdam": caadam(1.0),
    "Lion": optax.lion(1.0),
}


class Race(NamedTuple):
    """An optimizer with its state in float32, and with its state stored in some formats."""

    exact: optax.GradientTransformation
    stored: tuple[optax.GradientTransformation, ...]


class Phase(NamedTuple):
    """Updates at the end of a phase, relative to float32's, for each seed.

    Attributes:
      error: RMS of the difference.
      largest: the largest element.
    """

    error: Any
    largest: Any


def compare(race: Race, seeds: int, steps: int) -> list[tuple[Phase, Phase]]:
    """Return for each format the steady phase and the one after the fall."""
    found = [run(race, seed, *draw_sizes(seed), steps) for seed in range(seeds)]
    return jax.tree.map(lambda *x: np.stack(x), *found)


def draw_sizes(seed: int) -> tuple[Any, Any]:
    """Return the sizes of gradients, and what they are multiplied by in the second phase."""
    random = np.random.default_rng(seed)
    rows, columns = random.normal(0, ROWS, (SHAPE[0], 1)), random.normal(0, COLUMNS, SHAPE[1])
    falls = np.where(random.random(SHAPE[1]) < 0.5, FALL, 1.0)
    return np.float32(SIZE * np.exp(rows + columns)), np.float32(falls[None])


@partial(jax.jit, static_argnames=("race", "steps"))
def run(
    race: Race, seed: jax.Array, size: jax.Array, falls: jax.Array, steps: int
) -> list[tuple[Phase, Phase]]:
    """Return both phases of one seed for each format."""
    params = jnp.zeros(SHAPE)

    def step(states: tuple[Any, ...], key_and_phase: Any) -> Any:
        key, has_fallen = key_and_phase
        gradient = jax.random.normal(key, SHAPE) * size * jnp.where(has_fallen, falls, 1)
        (exact, state), *stored = [
            tx.update(gradient, state, params)
            for tx, state in zip((race.exact, *race.stored), states, strict=True)
        ]
        measured = [measure(ours, exact) for ours, _ in stored]
        return (state, *(state for _, state in stored)), measured

    # JAX's default generator takes most of the time to compile.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2 * steps)
    states = tuple(tx.init(params) for tx in (race.exact, *race.stored))
    _, found = lax.scan(step, states, (keys, jnp.arange(2 * steps) >= steps))
    return [
        (summarize(*(x[:steps] for x in one)), summarize(*(x[steps:] for x in one)))
        for one in found
    ]


def measure(ours: Any, exact: Any) -> tuple[jax.Array, ...]:
    """Return what `summarize` takes, for one step."""
    squares = jnp.sum((ours - exact) ** 2), jnp.sum(exact**2)
    return *squares, jnp.max(jnp.abs(ours)), jnp.max(jnp.abs(exact))


def summarize(
    difference: jax.Array, squares: jax.Array, ours: jax.Array, exact: jax.Array
) -> Phase:
    """Return what a phase ends in, from sums of squares and largest elements in each step."""
    end = slice(-MEASURED, None)
    error = jnp.sqrt(jnp.sum(difference[end]) / jnp.sum(squares[end]))
    return Phase(error, jnp.max(ours[end]) / jnp.max(exact[end]))


STEADY, FALLEN, WITHIN = "error, steady", "error, fallen", f"share within {ALLOWED}"


def row(found: tuple[Phase, Phase]) -> dict[str, Estimate | float | str]:
    steady, fallen = found
    return {
        STEADY: estimates.mean(steady.error),
        FALLEN: estimates.mean(fallen.error),
        WITHIN: estimates.share(np.maximum(steady.error, fallen.error) < ALLOWED),
        "largest, steady": estimates.mean(steady.largest),
        "largest, fallen": estimates.mean(fallen.largest),
    }


def judge(rows: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Compare shares of seeds: the errors themselves have heavy tails where elements become 0."""
    ours, *published = (rows[name][WITHIN] for name in (OURS, FLASH, DYNAMIC))
    verdict = Verdict.NOT_SEEN
    if ours.mean < 1:
        verdict = Verdict.REFUTED
    elif all(share.high < ours.low for share in published):
        verdict = Verdict.HOLDS
    shown = "; ".join(
        f"{name} {cells[STEADY].mean:.3f} and {cells[FALLEN].mean:.3f},"
        f" {100 * cells[WITHIN].mean:.0f} %"
        for name, cells in rows.items()
        if name in (OURS, FLASH, DYNAMIC)
    )
    return Finding(
        f"quantize_state: 8-bit state keeps Adam's update within {ALLOWED} of float32's, steady and"
        " after gradients fall, where published formats do not",
        verdict,
        f"Mean errors in the steady phase and after the fall, and the share of seeds in which both"
        f" are within {ALLOWED}: {shown}.",
    )


def draw(of_adam: Rows, of_all: Rows) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), layout="constrained")
    formats_, optimizers = figure.subplots(1, 2, width_ratios=(1, 1))
    draw_errors(formats_, of_adam, "Adam with its state in several formats", (1,))
    draw_errors(optimizers, of_all, "ours, for several optimizers", (1, 2, 5))
    handles, labels = formats_.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_errors(
    axes: Axes, rows: Mapping[str, Mapping[str, Any]], title: str, ticks: Sequence[float]
) -> None:
    places = np.arange(len(rows))[::-1]
    for column, colour, shift in ((STEADY, BLUE, 0.12), (FALLEN, ORANGE, -0.12)):
        found = [cells[column] for cells in rows.values()]
        look = {"color": colour, "linestyle": "", "label": column}
        draw_estimates(axes, places + shift, found, across=True, **look)
    axes.axvline(ALLOWED, color="0.6", linewidth=1, label=f"{ALLOWED}")
    axes.set_xscale("log")
    log_ticks(axes.xaxis, at=ticks)
    entitle(axes, title, "error of the update, relative", "")
    tidy(axes, "x")
    axes.set_yticks(places, list(rows))


if __name__ == "__main__":
    main()
