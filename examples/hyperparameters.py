"""Many learning rates and seeds at once, each run's rate a number in the state of its optimizer.

    python examples/hyperparameters.py
    python examples/hyperparameters.py --rates 5 --seeds 20 --data mine.npz
    python examples/hyperparameters.py --checkpoints run1

`optax.inject_hyperparams` keeps the rate in the state, so the training loop changes it whenever it
likes, and one compiled step serves all rates. Here the loop restarts the rates warm (SGDR), and
each new round of trainings looks closer around the rate that was best. All runs of a round train
side by side, by `vmap`. After Ctrl-C, the same line goes on from its `--checkpoints`, to the bit.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.typing import ArrayLike
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

import optax_ext
from _command_line import add_data, add_numbers, make_parser, positive
from _data import Dataset, Split, draw, load_data
from _resume import open_checkpoints, steps_to

MIDDLE, REACH = 5e-3, 27.0  # the first round's rates: from MIDDLE / REACH to MIDDLE * REACH


class Sweep(NamedTuple):
    """All that a checkpoint holds.

    Attributes:
      runs: of the current round, stacked by rate and seed.
      rates: of each round.
      scores: accuracy on the validation images, by round, rate and seed.
    """

    runs: TrainState
    rates: jax.Array
    scores: jax.Array


def main(argv: Sequence[str] | None = None) -> None:
    options, data = parse(argv)
    new_runs = make_runs(data, options.rates, options.seeds)
    rates = jnp.zeros((options.rounds, options.rates))
    sweep = Sweep(new_runs, rates, jnp.zeros((*rates.shape, options.seeds)))
    restarts = warm_restarts(options.steps)

    with open_checkpoints("hyperparameters", options) as checkpoints:
        sweep = checkpoints.restore(sweep) or sweep
        with steps_to(options.rounds * options.steps, checkpoints) as steps:
            for step_of_all in steps:
                number, step = divmod(step_of_all, options.steps)
                if step == 0:
                    rates = sweep.rates.at[number].set(choose_rates(sweep, number))
                    sweep = sweep._replace(runs=new_runs, rates=rates)
                    steps.note(f"rates {rates[number, 0]:.2g} to {rates[number, -1]:.2g}")

                batches = draw_batches(step, data.train, options)
                runs = set_rates(sweep.runs, sweep.rates[number] * restarts(step))
                sweep = sweep._replace(runs=train_step(runs, data.train, batches))

                if step + 1 == options.steps:
                    scores = sweep.scores.at[number].set(accuracy(sweep.runs, data.validation))
                    sweep = sweep._replace(scores=scores)
                checkpoints.save(step_of_all + 1, sweep, force=steps.ending)
    print_results(sweep, accuracy(sweep.runs, data.test))


def make_runs(data: Dataset, rates: int, seeds: int) -> TrainState:
    """New networks and states: another for each seed, the same for each rate."""
    flatten = partial(jnp.reshape, shape=(-1, data.train.images[0].size))
    layers = (flatten, nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(data.classes))
    network = nn.Sequential(layers)
    tx = optax.inject_hyperparams(optax_ext.fame)(learning_rate=0.0)  # the loop sets it

    def make_run(seed: jax.Array) -> TrainState:
        params = network.init(jax.random.key(seed), data.train.images[:1])["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    of_seeds = jax.vmap(make_run)(jnp.arange(seeds))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rates, *x.shape)), of_seeds)


def warm_restarts(steps: int) -> optax.Schedule:
    """From the whole rate to nothing, three times, each time twice as slowly as before."""
    ends = [round(steps * share / 7) for share in (0, 1, 3, 7)]
    cycles = [
        {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": end - begin}
        for begin, end in pairwise(ends)
        if end > begin
    ]
    return jax.jit(optax.sgdr_schedule(cycles))


def choose_rates(sweep: Sweep, number: int) -> jax.Array:
    """Those of a round, at equal ratios around the best rate of the round before."""
    middle = best(sweep, number - 1)[1] if number else MIDDLE
    half = sweep.rates.shape[1] // 2
    return middle * REACH ** (np.arange(-half, half + 1) / max(half, 1) / 3**number)


def best(sweep: Sweep, number: int) -> tuple[int, jax.Array]:
    """The place and the value of the rate that scored best in a round, on average."""
    i = int(sweep.scores[number].mean(axis=1).argmax())
    return i, sweep.rates[number, i]


def set_rates(runs: TrainState, rates: jax.Array) -> TrainState:
    """The same runs with other rates: no shape changes, so nothing is compiled anew."""
    old = optax.tree.get(runs.opt_state, "learning_rate")
    new = jnp.broadcast_to(rates[:, None], old.shape)
    return runs.replace(opt_state=optax.tree.set(runs.opt_state, learning_rate=new))


def draw_batches(step: int, data: Split, options: argparse.Namespace) -> np.ndarray:
    """Which images each seed takes."""
    images = len(data.labels)
    return np.stack([draw(step, images, options.batch, seed) for seed in range(options.seeds)])


@jax.jit
def train_step(runs: TrainState, data: Split, batches: ArrayLike) -> TrainState:
    def step(run: TrainState, batch: ArrayLike) -> TrainState:
        def loss_of(params: optax.Params) -> jax.Array:
            logits = run.apply_fn({"params": params}, data.images[batch])
            labels = data.labels[batch]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return run.apply_gradients(grads=jax.grad(loss_of)(run.params))

    of_seeds = jax.vmap(step)
    return jax.vmap(of_seeds, in_axes=(0, None))(runs, batches)


@jax.jit
def accuracy(runs: TrainState, data: Split) -> jax.Array:
    """The share of images that each run is right about."""

    def of_run(run: TrainState) -> jax.Array:
        logits = run.apply_fn({"params": run.params}, data.images)
        return (logits.argmax(axis=-1) == data.labels).mean()

    return jax.vmap(jax.vmap(of_run))(runs)


def print_results(sweep: Sweep, test: jax.Array) -> None:
    rounds, _, seeds = sweep.scores.shape
    table = Table(box=SIMPLE_HEAD, caption=f"Mean and 95 % interval over {seeds} seeds.")
    for title in ("rate", "validation accuracy", "behind the round's best"):
        table.add_column(title, justify="right")
    for number in range(rounds):
        leader, _ = best(sweep, number)
        for i, (rate, scores) in enumerate(
            zip(sweep.rates[number], sweep.scores[number], strict=True)
        ):
            # Seed by seed: their luck is the same at all rates.
            behind = "" if i == leader else percent(sweep.scores[number, leader] - scores)
            table.add_row(f"{rate:.2g}", percent(scores), behind, style="bold" * (i == leader))
        table.add_section()
    Console().print(table)
    winner, rate = best(sweep, rounds - 1)
    print(f"rate {rate:.2g} won; on the test images, which had no say: {percent(test[winner])}")


def percent(shares: jax.Array) -> str:
    """Mean and 95 % interval, by Student's distribution."""
    values = 100 * np.asarray(shares)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f} %"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Dataset]:
    parser = make_parser(__doc__)
    add_data(parser)
    add_numbers(
        parser,
        ("--rates", positive, 7, "in a round, an odd number"),
        ("--seeds", positive, 8, "of each rate, 2 or more"),
        ("--rounds", positive, 2, "each closer around the best rate"),
        ("--steps", positive, 210, "of a training"),
        ("--batch", positive, 64, "images in a step"),
    )
    options = parser.parse_args(argv)
    if options.rates % 2 == 0:
        parser.error(f"--rates must be odd, so that one is in the middle, got {options.rates}")
    if options.seeds < 2:
        parser.error(f"--seeds must be 2 or more for an interval, got {options.seeds}")
    return options, load_data(parser, options)


if __name__ == "__main__":
    main()
