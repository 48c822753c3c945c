"""Many learning rates and seeds, trained side by side: copy this file and make it yours.

    python hyperparameters.py
    python hyperparameters.py --rates 5 --seeds 20
    python hyperparameters.py --checkpoints run1

`optax.inject_hyperparams` keeps the learning rate in the optimizer's state. So the training loop
can change it at any step, here for warm restarts (SGDR). One compiled step, mapped by `vmap`,
trains all rates and seeds. Each round of training searches closer around the rate that
was best in the round before. After an interruption, the same command resumes bit-exactly from its
newest checkpoint.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_ext

BATCH = 64
MIDDLE, REACH = 5e-3, 27.0  # the first round's rates: from MIDDLE / REACH to MIDDLE * REACH


class Split(NamedTuple):
    """Images, one a row, and their labels."""

    images: Any
    labels: Any


class Sweep(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      runs: the current round's models, stacked by rate and seed.
      rates: learning rates, by round.
      scores: validation accuracy, by round, rate and seed.
    """

    runs: TrainState
    rates: jax.Array
    scores: jax.Array


def load_data() -> list[Split]:
    """Return images to train on, to choose a rate by, and to test with."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x / 16, y, test_size=0.2, stratify=y, random_state=0)
    x, held_x, y, held_y = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return [Split(x, y), Split(held_x, held_y), Split(test_x, test_y)]


def draw_batches(step: int, images: int, seeds: int) -> np.ndarray:
    """Return the indices of each seed's images, which depend on nothing but the arguments."""
    epoch, i = divmod(step, images // BATCH)
    orders = [np.random.default_rng([seed, epoch]).permutation(images) for seed in range(seeds)]
    return np.stack(orders)[:, i * BATCH : (i + 1) * BATCH]


def make_runs(rates: int, seeds: int) -> TrainState:
    """Return new networks and optimizer states: different for each seed, equal for each rate."""
    network = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    tx = optax.inject_hyperparams(optax_ext.fame)(learning_rate=0.0)  # the loop sets the rate

    def make_run(seed: jax.Array) -> TrainState:
        params = network.init(jax.random.key(seed), jnp.ones((1, 64)))["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    by_seed = jax.vmap(make_run)(jnp.arange(seeds))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rates, *x.shape)), by_seed)


def warm_restarts(steps: int) -> optax.Schedule:
    """Return factors of the rate: three cosines from 1 to 0, of doubling length."""
    ends = [round(steps * share / 7) for share in (0, 1, 3, 7)]
    cycles = [
        {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": end - begin}
        for begin, end in pairwise(ends)
        if end > begin
    ]
    return jax.jit(optax.sgdr_schedule(cycles))


def choose_rates(sweep: Sweep, number: int) -> jax.Array:
    """Return a round's rates, at equal ratios around the best one of the round before."""
    middle = sweep.rates[number - 1, find_best(sweep, number - 1)] if number else MIDDLE
    half = sweep.rates.shape[1] // 2
    return middle * REACH ** (np.arange(-half, half + 1) / max(half, 1) / 3**number)


def find_best(sweep: Sweep, number: int) -> int:
    """Return the index of the rate with a round's highest mean score."""
    return int(sweep.scores[number].mean(axis=1).argmax())


def set_rates(runs: TrainState, rates: jax.Array) -> TrainState:
    """Return the runs with other learning rates; as no shape changes, nothing is recompiled."""
    old = optax.tree.get(runs.opt_state, "learning_rate")
    new = jnp.broadcast_to(rates[:, None], old.shape)
    return runs.replace(opt_state=optax.tree.set(runs.opt_state, learning_rate=new))


@jax.jit
def train_step(runs: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """Return all runs after one step, on a batch for each seed."""

    def step(run: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def loss_of(params: optax.Params) -> jax.Array:
            logits = run.apply_fn({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return run.apply_gradients(grads=jax.grad(loss_of)(run.params))

    return jax.vmap(jax.vmap(step), in_axes=(0, None, None))(runs, images, labels)


@jax.jit
def accuracy(runs: TrainState, data: Split) -> jax.Array:
    """Return the share of images that each run classifies correctly."""

    def accuracy_of(run: TrainState) -> jax.Array:
        logits = run.apply_fn({"params": run.params}, data.images)
        return (logits.argmax(axis=-1) == data.labels).mean()

    return jax.vmap(jax.vmap(accuracy_of))(runs)


def percent(shares: jax.Array) -> str:
    """Return mean and 95 % interval over seeds, by Student's distribution."""
    values = 100 * np.asarray(shares)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f} %"


def print_results(sweep: Sweep, test_accuracy: jax.Array) -> None:
    """Print a table of all rounds, and what the last one's best rate reaches on test images."""
    table = Table("rate", "validation accuracy", "less than the best rate")
    for number, (rates, scores) in enumerate(zip(sweep.rates, sweep.scores, strict=True)):
        best = find_best(sweep, number)
        for rate, score in zip(rates, scores, strict=True):
            # A difference seed by seed: both rates have the same initial weights and batches.
            table.add_row(f"{rate:.2g}", percent(score), percent(scores[best] - score))
        table.add_section()
    Console().print(table)
    best = find_best(sweep, -1)
    print(f"best rate {sweep.rates[-1, best]:.2g}, test accuracy {percent(test_accuracy[best])}")


def restore(checkpoints: ocp.CheckpointManager, settings: dict[str, Any], new: Any) -> Any:
    """Return the step and the state of the newest checkpoint, or 0 and the new state."""
    saved = checkpoints.metadata().custom_metadata
    if saved != settings:
        raise SystemExit(f"{checkpoints.directory} has checkpoints of {saved}, not of {settings}")
    step = checkpoints.latest_step()
    if step is None:
        return 0, new
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, new)
    try:
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        message = f"step {step} can't be read; move it away to resume from an earlier one"
        raise SystemExit(f"{checkpoints.directory}: {message} ({error!s:.200})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Train all rounds, with a checkpoint every few steps."""
    options = parse(argv)
    train, validation, test = load_data()
    new_runs = make_runs(options.rates, options.seeds)
    rates = jnp.zeros((options.rounds, options.rates))
    sweep = Sweep(new_runs, rates, jnp.zeros((*rates.shape, options.seeds)))
    restarts, total = warm_restarts(options.steps), options.rounds * options.steps

    folder = options.checkpoints or Path(tempfile.mkdtemp())
    settings = {k: v for k, v in vars(options).items() if k not in ("checkpoints", "every")}
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(folder.absolute(), options=keep, metadata=settings) as checkpoints,
        Progress() as bar,
    ):
        done, sweep = restore(checkpoints, settings, sweep)
        bar.console.print(f"{done} steps done, checkpoints in {folder}")
        for i in bar.track(range(done, total), total, done):
            number, step = divmod(i, options.steps)
            if step == 0:
                rates = sweep.rates.at[number].set(choose_rates(sweep, number))
                sweep = sweep._replace(runs=new_runs, rates=rates)

            runs = set_rates(sweep.runs, sweep.rates[number] * restarts(step))
            batches = draw_batches(step, len(train.labels), options.seeds)
            runs = train_step(runs, train.images[batches], train.labels[batches])
            sweep = sweep._replace(runs=runs)

            if step + 1 == options.steps:
                scores = sweep.scores.at[number].set(accuracy(runs, validation))
                sweep = sweep._replace(scores=scores)
            if (i + 1) % options.every == 0 or i + 1 == total:
                checkpoints.save(i + 1, args=ocp.args.StandardSave(sweep))
    print_results(sweep, accuracy(sweep.runs, test))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=int, default=7, help="in a round, an odd number")
    parser.add_argument("--seeds", type=int, default=8, help="of each rate, 2 or more")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=210, help="of a round")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=Path, help="folder (default: a temporary one)")
    options = parser.parse_args(argv)
    if options.rates % 2 == 0 or options.seeds < 2:
        parser.error("--rates must be odd, and --seeds 2 or more")
    return options


if __name__ == "__main__":
    main()
