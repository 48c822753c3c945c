"""quantize_state: does training end at the loss of float32 state?

    python examples/evidence/low_precision_training.py

A transformer learns the bytes of Python's standard library, and a convnet learns scikit-learn's
digits. Each optimizer trains twice from the same initial weights on the same batches: with its
state in float32, and with its state stored by `quantize_state`. The loss at the end is that of
held-out text or images. The claim is that the mean difference is less than half of the spread, the
standard deviation over seeds with state in float32. It holds if all intervals of mean differences
are within half a spread, and does not hold if one is beyond it, or if a training diverged.

Differences of single seeds are as large as the spread, because two trainings drift apart; so the
mean of eight seeds can be half a spread or more by chance. An optimizer whose mean difference is
larger trains again with four times as many other seeds, and these alone decide. Only these
optimizers do, which favors the claim.

Two trainings whose weights differ in a last bit end at different losses, too. Two controls show how
much: AdamW and NOVAK in float32, where the initial weights of the second training are one unit in
the last place larger. Two rows also store AdamW's weights: in 24 bits, or in bfloat16 with random
rounding. They compute in float32.

Learning rates were chosen for float32 state, by another seed and a fourth of the steps. They warm
up and then follow a cosine.

This script shows nothing about larger networks or longer trainings.
"""

import argparse
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

import _command_line as command_line
import _digits as digits
import _estimates as estimates
import _networks as networks
import _results as results
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _estimates import Estimate
from _networks import CLASSES, Network, Split
from _progress import two_at_a_time
from _tuning import Factory
from _verdicts import Finding, Verdict
from optax_ext import (
    bfloat16_weights,
    caadam,
    dualadam,
    fame,
    invadam,
    master_weights,
    novak,
    quantize_state,
    stochastic_rounding,
    vradam,
)

WIDTH, HEADS, LENGTH = 64, 4, 32
CHANNELS = 32, 64, 64
# Sequences or images in a step.
BATCHES = {"transformer": 8, "convnet": 32}
# The share of the text, at its end, that is held out, and the number of its sequences in use.
HELD_OUT, HELD_OUT_SEQUENCES = 0.05, 512
WARM_UP = 0.1
# The largest mean difference that the claim allows, in spreads.
ALLOWED = 0.5
# The factor of the number of seeds that decide if the first seeds' difference is larger.
MORE_SEEDS = 4
# The number of steps that a point of a curve averages.
SMOOTHED = 50

# The best of a grid of ratio 3 for float32 state, with another seed and 500 steps.
RATES = {
    "AdamW": {"transformer": 1e-2, "convnet": 3e-3},
    "FAME": {"transformer": 1e-2, "convnet": 1e-2},
    "VRAdam": {"transformer": 1e-2, "convnet": 3e-3},
    "InvAdam": {"transformer": 10.0, "convnet": 10.0},
    "DualAdam": {"transformer": 1e-2, "convnet": 1e-2},
    "NOVAK": {"transformer": 1e-1, "convnet": 1e-2},
    "CaAdam": {"transformer": 1e-2, "convnet": 3e-3},
    "Lion": {"transformer": 1e-3, "convnet": 3e-4},
}
FACTORIES: dict[str, Factory] = {
    "AdamW": optax.adamw,
    "FAME": fame,
    "VRAdam": vradam,
    "InvAdam": invadam,
    "DualAdam": dualadam,
    "NOVAK": novak,
    "CaAdam": caadam,
    "Lion": optax.lion,
}
# Recorded with the results, which depend on them.
CONSTANTS = {
    "WIDTH": WIDTH,
    "HEADS": HEADS,
    "LENGTH": LENGTH,
    "CHANNELS": CHANNELS,
    "BATCHES": list(BATCHES.values()),
    "HELD_OUT": HELD_OUT,
    "HELD_OUT_SEQUENCES": HELD_OUT_SEQUENCES,
    "WARM_UP": WARM_UP,
    "ALLOWED": ALLOWED,
    "MORE_SEEDS": MORE_SEEDS,
    "RATES": [list(rates.values()) for rates in RATES.values()],
}


class Task(NamedTuple):
    """A network, the data that it learns, and the data that it is judged by."""

    network: Network
    batch: int
    train: Split
    test: Split


# Returns the initial weights of a training, from those in float32.
Prepare = Callable[[Any], Any]


def unchanged(params: Any) -> Any:
    return params


class Contender(NamedTuple):
    """An optimizer, trained twice.

    Attributes:
      name: of the optimizer, whose learning rates it has.
      store: returns the second training's optimizer, from that of the first.
      prepare: returns the second training's initial weights, from those of the first.
    """

    name: str
    store: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    prepare: Prepare = unchanged


class Runs(NamedTuple):
    """Losses of trainings, stacked over seeds.

    Attributes:
      curve: on the batch of each step.
      final: at the end, on data that was not trained on.
    """

    curve: Any
    final: Any


class Judged(NamedTuple):
    """A contender's trainings with state in float32 and as it stores it, and their bytes of state.

    Bytes are per parameter.
    """

    exact: Runs
    stored: Runs
    bytes: float
    bytes_stored: float


def one_unit_larger(params: Any) -> Any:
    """Return the next larger float32 numbers."""
    return jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), params)


# The optimizers whose curves are drawn, and that have a control.
CURVES = {"AdamW": BLUE, "NOVAK": ORANGE}
CONTROLS = [f"control: {name}" for name in CURVES]
CONTENDERS = (
    {name: Contender(name, quantize_state) for name in FACTORIES}
    | {
        "AdamW, 24-bit weights": Contender(
            "AdamW", lambda tx: master_weights(quantize_state(tx), bits=24), bfloat16_weights
        ),
        "AdamW, 16-bit weights": Contender(
            "AdamW", lambda tx: stochastic_rounding(quantize_state(tx)), bfloat16_weights
        ),
    }
    | {f"control: {name}": Contender(name, lambda tx: tx, one_unit_larger) for name in CURVES}
)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    seeds = np.arange(options.seeds)
    others = len(seeds) + np.arange(MORE_SEEDS * len(seeds))
    judged, tables, decisive = {}, {}, {}
    for task in TASKS:
        judged[task] = train_all(task, options.steps, seeds, CONTENDERS)
        first = {name: row(found) for name, found in judged[task].items()}
        doubted = {
            name: contender
            for name, contender in CONTENDERS.items()
            if name in FACTORIES and ratio(first[name]) >= ALLOWED
        }
        second = train_all(task, options.steps, others, doubted)
        again = {name: row(found) for name, found in second.items()}
        tables[f"Losses of the {task} at the end"] = first
        if again:
            tables[f"Losses of the {task} at the end, {len(others)} other seeds"] = again
        decisive[task] = first | again
    tables["Text"] = {"Python's standard library": describe_text()}
    name, figure = "low_precision_training", draw(judged, decisive)
    results.publish(name, options, [judge(decisive)], tables, {name: figure}, CONSTANTS)


def make_parser() -> argparse.ArgumentParser:
    return command_line.make_parser(
        __doc__,
        seeds=(8, "initial weights and orders of the data"),
        steps=(2000, "of each training"),
    )


@cache
def load_text() -> np.ndarray:
    """Return the bytes of the modules of Python's standard library, without its packages."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def describe_text() -> dict[str, float | str]:
    """Return what identifies the text, which differs from one version of Python to the next."""
    text = load_text()
    return {"bytes": float(len(text)), "SHA-256": hashlib.sha256(text.tobytes()).hexdigest()[:16]}


def make_transformer_task() -> Task:
    """Predict each byte of a sequence from those before it."""
    text = load_text()
    train, test = map(cut, np.split(text, [int((1 - HELD_OUT) * len(text))]))
    chosen = np.linspace(0, len(test.labels) - 1, HELD_OUT_SEQUENCES).astype(int)
    test = jax.tree.map(lambda x: x[chosen], test)
    network = Network(initialize_transformer, apply_transformer)
    return Task(network, BATCHES["transformer"], *jax.device_put((train, test)))


def cut(text: np.ndarray) -> Split:
    """Return sequences of `LENGTH` bytes, and for each byte the one that follows it."""
    end = (len(text) - 1) // LENGTH * LENGTH
    parts = (text[begin : begin + end].reshape(-1, LENGTH) for begin in (0, 1))
    return Split(*(part.astype(np.int32) for part in parts))


def initialize_transformer(key: jax.Array) -> Any:
    """Return the weights of one layer, an embedding and an output layer."""
    shapes = {
        "query, key, value": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "logits": (WIDTH, 256),
    }
    first, second, *keys = jax.random.split(key, 2 + len(shapes))
    normal = jax.nn.initializers.lecun_normal()
    params = {
        name: {"kernel": normal(k, shape)}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    bytes_ = jax.random.normal(first, (256, WIDTH))
    positions = 0.02 * jax.random.normal(second, (LENGTH, WIDTH))
    return params | {"bytes": {"embedding": bytes_}, "positions": {"embedding": positions}}


def apply_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """Return logits of the next byte at each place of sequences of shape (N, LENGTH)."""
    x = params["bytes"]["embedding"][tokens] + params["positions"]["embedding"][None]
    projected = normalize(x) @ params["query, key, value"]["kernel"]
    query, key, value = jnp.split(projected.reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + attended.reshape(x.shape) @ params["out"]["kernel"]
    x = x + jax.nn.gelu(normalize(x) @ params["up"]["kernel"]) @ params["down"]["kernel"]
    return normalize(x) @ params["logits"]["kernel"]


def normalize(x: jax.Array) -> jax.Array:
    """Divide by the root mean square over the last axis."""
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def make_convnet_task() -> Task:
    """Recognize digits."""
    data = digits.load_digits()
    network = Network(initialize_convnet, apply_convnet)
    return Task(network, BATCHES["convnet"], data.train, data.test)


def initialize_convnet(key: jax.Array) -> Any:
    """Return weights after He et al."""
    he = jax.nn.initializers.he_normal()
    shapes: list[tuple[int, ...]] = [
        (3, 3, n, m) for n, m in zip((1, *CHANNELS), CHANNELS, strict=False)
    ]
    shapes.append((CHANNELS[-1], CLASSES))
    keys = jax.random.split(key, len(shapes))
    return [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def apply_convnet(params: Any, images: jax.Array) -> jax.Array:
    """Apply convolutions, all but the first with a stride of 2, and a dense layer."""
    *convolutions, head = params
    x = images
    for i, layer in enumerate(convolutions):
        stride = 1 if i == 0 else 2
        x = networks.convolve(x, layer["kernel"], (stride, stride), ((1, 1), (1, 1)))
        x = jax.nn.relu(x + layer["bias"][None, None, None])
    return x.mean((1, 2)) @ head["kernel"] + head["bias"][None]


TASKS = {"transformer": make_transformer_task, "convnet": make_convnet_task}


@cache
def make_task(name: str) -> Task:
    return TASKS[name]()


def train_all(
    task: str, steps: int, seeds: np.ndarray, contenders: Mapping[str, Contender]
) -> dict[str, Judged]:
    return two_at_a_time(partial(compare, task, steps, seeds), contenders)


def compare(task: str, steps: int, seeds: np.ndarray, contender: Contender) -> Judged:
    """Train with each seed, with state in float32 and as the contender stores it."""
    exact = make_optimizer(contender.name, RATES[contender.name][task], steps)
    pair = (exact, unchanged), (contender.store(exact), contender.prepare)
    exact_runs, stored_runs = (train(task, *one, seeds, steps) for one in pair)
    exact_bytes, stored_bytes = (bytes_of_state(task, *one) for one in pair)
    return Judged(exact_runs, stored_runs, exact_bytes, stored_bytes)


def make_optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    warm_up = int(WARM_UP * steps)
    return FACTORIES[name](optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, steps))


def train(
    task: str, tx: optax.GradientTransformation, prepare: Prepare, seeds: np.ndarray, steps: int
) -> Runs:
    """Return the losses of trainings whose seeds decide initial weights and batches."""
    network, batch, data, test = make_task(task)
    chosen = [networks.draw_batches(seed, steps, len(data.labels), batch) for seed in seeds]
    params = jax.vmap(prepare)(networks.initialize(network.init, seeds))
    found = descend(network.apply, tx, params, np.stack(chosen), data, test)
    return jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnames=("apply", "tx"))
def descend(
    apply: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    params: Any,
    batches: jax.Array,
    data: Split,
    test: Split,
) -> Runs:
    """Train from each of the stacked parameters."""

    def loss_of(params: Any, split: Split) -> jax.Array:
        # Weights may be stored in bfloat16.
        return networks.cross_entropy(apply, optax.tree.cast(params, jnp.float32), split)

    def step(run: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, state = run
        drawn = jax.tree.map(lambda x: x[batch], data)
        loss, gradient = jax.value_and_grad(loss_of)(params, drawn)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def run(params_and_batches: Any) -> Runs:
        params, batches = params_and_batches
        (params, _), curve = lax.scan(step, (params, tx.init(params)), batches)
        return Runs(curve, loss_of(params, test))

    return lax.map(run, (params, batches))


def bytes_of_state(task: str, tx: optax.GradientTransformation, prepare: Prepare) -> float:
    """Return the bytes of the state per parameter."""
    key = jax.eval_shape(partial(jax.random.key, impl="rbg"), 0)
    params = jax.eval_shape(lambda key: prepare(make_task(task).network.init(key)), key)
    state = jax.eval_shape(tx.init, params)
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return bytes_ / sum(leaf.size for leaf in jax.tree.leaves(params))


DIFFERENCE, SPREAD = "difference", "spread of seeds"


def row(found: Judged) -> dict[str, Any]:
    return {
        "loss, float32": estimates.mean(found.exact.final),
        "loss, stored": estimates.mean(found.stored.final),
        DIFFERENCE: estimates.mean(found.stored.final - found.exact.final),
        SPREAD: float(np.std(found.exact.final, ddof=1)),
        "bytes of state, float32": found.bytes,
        "stored": found.bytes_stored,
    }


def ratio(cells: Mapping[str, Any]) -> float:
    """Return the mean difference in spreads; infinite if a training diverged."""
    difference = abs(cells[DIFFERENCE].mean) / cells[SPREAD]
    return difference if np.isfinite(difference) else np.inf


def reach(cells: Mapping[str, Any]) -> tuple[float, float]:
    """Return the interval of the difference in spreads; infinite if a training diverged."""
    low, high = (x / cells[SPREAD] for x in cells[DIFFERENCE][1:])
    return (low, high) if np.isfinite(ratio(cells)) else (np.inf, np.inf)


def wide(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Iterable[str]) -> str:
    """Return how many of the intervals reach beyond what the claim allows."""
    chosen = [*names]
    ends = [reach(found[name]) for found in rows.values() for name in chosen if name in found]
    return f"{sum(not _within(*each) for each in ends)} of {len(ends)}"


def _within(low: float, high: float) -> bool:
    return low > -ALLOWED and high < ALLOWED


def judge(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Finding:
    """Compare the intervals of the differences with the spread of seeds."""
    found = {
        f"{name}, {task}": cells
        for task, of_task in rows.items()
        for name, cells in of_task.items()
        if name in FACTORIES
    }
    worst = sorted(found, key=lambda name: ratio(found[name]))[-3:]
    shown = ", ".join(f"{name} {ratio(found[name]):.3f}" for name in reversed(worst))
    intervals = [reach(cells) for cells in found.values()]
    verdict = Verdict.NOT_SEEN
    if all(_within(*each) for each in intervals):
        verdict = Verdict.HOLDS
    elif any(low > ALLOWED or high < -ALLOWED for low, high in intervals):
        verdict = Verdict.REFUTED
    return Finding(
        "quantize_state: training ends at the loss of float32 state, within half of the spread of"
        " seeds",
        verdict,
        f"The largest mean differences, in spreads: {shown}. Intervals that reach beyond {ALLOWED}:"
        f" {wide(rows, FACTORIES)}; of the controls: {wide(rows, CONTROLS)}.",
    )


def draw(
    judged: Mapping[str, Mapping[str, Judged]],
    decisive: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 6.0), layout="constrained")
    grid: Any = figure.subplots(2, 2)
    for (curves, differences), (task, found) in zip(grid, judged.items(), strict=True):
        draw_curves(curves, task, found)
        draw_differences(differences, decisive[task])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_curves(axes: Axes, task: str, judged: Mapping[str, Judged]) -> None:
    """Draw the training losses of some optimizers, with state in float32 and in 8 bits."""
    wide: Any = {"linewidth": 4, "alpha": 0.35}
    narrow: Any = {"linewidth": 1}
    for name, colour in CURVES.items():
        found = judged[name]
        for runs, label, look in ((found.exact, "float32", wide), (found.stored, "8 bits", narrow)):
            curve = uniform_filter1d(runs.curve.mean(axis=0), SMOOTHED)
            axes.plot(curve, color=colour, label=f"{name}, {label}", **look)
    axes.set_yscale("log")
    log_ticks(axes.yaxis)
    entitle(axes, f"{task}, mean over seeds", "step", "training loss, nats")
    tidy(axes)


def draw_differences(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the mean differences of the losses at the end, and those that the claim allows."""
    axes.axvspan(-ALLOWED, ALLOWED, color="0.93")
    axes.axvline(0, color="0.6", linewidth=1)
    for place, cells in enumerate(rows.values()):
        difference = Estimate(*(x / cells[SPREAD] for x in cells[DIFFERENCE]))
        draw_estimates(axes, [place], [difference], across=True, color=BLUE)
    entitle(axes, "stored less float32, at the end", "difference / spread of seeds", "")
    tidy(axes, "x")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
