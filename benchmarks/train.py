"""Times of whole training steps of two small Flax networks, and the optimizer's share of them.

Four programs take turns: the gradient alone, the training step with optax.adamw, the training step
with each optimizer, and the step of that optimizer alone, on a gradient in memory. On a GPU, each
fused step takes turns too. The optimizer's share is (step - gradient) / step, turn by turn.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks import command_line, contenders, history, latest, timing
from benchmarks.command_line import plus_minus
from benchmarks.contenders import CONTENDERS, REFERENCE, Contender, trained
from benchmarks.latest import Row
from benchmarks.leaf_sets import in_words
from benchmarks.networks import NETWORKS
from pallas_kernels import fuse

PACKAGES = ("jax", "jaxlib", "flax", "optax")
GRADIENT = "gradient"

# More than in other benchmarks, because a share is the small difference of two long times.
REPEATS = 20

NOTES = (
    "ms: the time of the whole training step, median ± interquartile range over its turns. The"
    " gradient alone writes all of its outputs; its row is over all of its turns. × adamw: the"
    " time relative to the training step with optax.adamw, turn by turn. share: (step - gradient) /"
    " step, turn by turn, in percent. If its range is wider than the share, conclude only that the"
    " share is small. alone: the time in ms of the optimizer's step alone, in place, on a gradient"
    " in memory. The share can differ from alone / ms: in a whole step, XLA may fuse the update"
    " into the gradient's last operations, run both in parallel, and find the gradient in a cache."
    " The share falls as the batch grows; these batches are small."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device, circumstances, console = command_line.begin(parser, options, PACKAGES)
    path = latest.path(options.out, "train", options.device)
    progress = command_line.progress_display(console)
    task = progress.add_task("", total=len(options.networks) * len(options.optimizers))
    with jax.default_device(device), progress:
        for network in options.networks:
            turns = Turns(network, options.device, options.repeats)
            measured: dict[str, Row] = {}
            for name in options.optimizers:
                progress.update(task, description=f"{network}: {name}")
                rows = turns.measure(name)
                latest.save(path, rows, [*measurements(rows)], circumstances)
                measured |= rows
                progress.advance(task)
            console.print(table(turns.title, measured))
    console.print(NOTES, highlight=False)


class Turns:
    """The training steps of one network; each takes turns with adamw and the gradient alone."""

    def __init__(self, name: str, platform: str, repeats: int):
        self.name, self.platform, self.repeats = name, platform, repeats
        self.network = NETWORKS[name]()
        self.title = f"{name}: {in_words(self.network.params)}, {self.network.batch_size}"
        self.gradient = jax.jit(jax.grad(self.network.loss))
        self.beside = {GRADIENT: self.gradient_alone(), REFERENCE: self.whole(REFERENCE)}

    def measure(self, name: str) -> dict[str, Row]:
        """Measure a row for each way to run the optimizer's step, by "network / way"."""
        backends = contenders.backends(name, self.platform)
        whole = {
            way: self.beside[way] if way == REFERENCE else self.whole(name, backend)
            for way, backend in backends.items()
        }
        alone = {f"{way}, alone": self.alone(name, backend) for way, backend in backends.items()}
        times = timing.interleave(
            self.beside | whole | alone,
            repeats=self.repeats,
            steps_per_turn=timing.STEPS_PER_TURN[self.platform],
        )
        gradient, reference = times[GRADIENT], times[REFERENCE]
        return {
            f"{self.name} / {way}": make_row(
                times[way], gradient, times[f"{way}, alone"], reference
            )
            for way in backends
        }

    def whole(self, name: str, backend: str = "xla") -> timing.Run:
        """Return a run of training steps: gradient and update in one program."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.copy, self.network.params))
        step = training_step(self.network.loss, contender, backend)
        return timing.donated(step, params, contender.tx.init(params), self.network.batch)

    def alone(self, name: str, backend: str) -> timing.Run:
        """Return a run of the optimizer's steps, always with the same gradient."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.copy, self.network.params))
        grads = self.gradient(self.network.params, self.network.batch)
        step = fuse(contender.tx, backend=backend).step
        return timing.donated(step, params, contender.tx.init(params), grads)

    def gradient_alone(self) -> timing.Run:
        """Return a run that computes the gradient at the initial parameters.

        The program returns all gradients, so XLA must compute all of them.
        """

        def run(steps: int) -> None:
            grads = None
            for _ in range(steps):
                grads = self.gradient(self.network.params, self.network.batch)
            jax.block_until_ready(grads)

        return run


def training_step(
    loss: Callable[[Any, Any], jax.Array], contender: Contender, backend: str = "xla"
) -> Callable[..., tuple[Any, Any]]:
    """Return a function `(params, state, batch) -> (params, state)`.

    Its parameters have the form that `Contender.hold` returns.
    """
    update = fuse(contender.tx, backend=backend).step

    def step(params, state, batch):
        return update(params, state, jax.grad(loss)(trained(params), batch))

    return step


def make_row(
    whole: timing.Times, gradient: timing.Times, alone: timing.Times, reference: timing.Times
) -> Row:
    """Return the row of one training step for the table and the file, from the same turns.

    Args:
      whole: the times of the training step.
      gradient: the times of its gradient alone.
      alone: the times of its optimizer alone.
      reference: the times of the training step with adamw.
    """
    ratios = [x / y for x, y in zip(whole.seconds, reference.seconds, strict=True)]
    shares = [1 - x / y for x, y in zip(gradient.seconds, whole.seconds, strict=True)]
    row: Row = {
        "median_ms": 1e3 * whole.median,
        "spread_ms": 1e3 * whole.spread,
        "to_adamw": statistics.median(ratios),
        "to_adamw_spread": timing.interquartile_range(ratios),
        "share": statistics.median(shares),
        "share_spread": timing.interquartile_range(shares),
        "gradient_ms": 1e3 * gradient.median,
        "gradient_spread_ms": 1e3 * gradient.spread,
        "alone_ms": 1e3 * alone.median,
        "alone_spread_ms": 1e3 * alone.spread,
    }
    for name, times in {"": whole, "gradient_": gradient, "alone_": alone}.items():
        row[f"{name}times_ms"] = [1e3 * seconds for seconds in times.seconds]
    return row


def table(title: str, rows: Mapping[str, Row]) -> Table:
    """Return a table of one network for the terminal: the gradient alone, then the rows."""
    columns = ("ms", "× adamw", "share, %", "alone")
    drawn = command_line.make_table(title, ["optimizer"], columns)
    gradients = [ms for row in rows.values() for ms in row["gradient_times_ms"]]
    spread = timing.interquartile_range(gradients)
    drawn.add_row("(gradient alone)", plus_minus(statistics.median(gradients), spread))
    for case, row in rows.items():
        drawn.add_row(
            case.partition(" / ")[2],
            plus_minus(row["median_ms"], row["spread_ms"]),
            f"{row['to_adamw']:.2f} ± {row['to_adamw_spread']:.2f}",
            f"{100 * row['share']:.1f} ± {100 * row['share_spread']:.1f}",
            plus_minus(row["alone_ms"], row["alone_spread_ms"]),
        )
    return drawn


def measurements(rows: Mapping[str, Row]) -> Iterator[history.Measurement]:
    """Yield the measurements of the rows for the history: whole steps and shares."""
    yield from latest.step_times("train", rows)
    for case, row in rows.items():
        share, spread = 100 * row["share"], 100 * row["share_spread"]
        yield history.Measurement("train", f"{case}, share", "%", share, spread)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("train", __doc__)
    command_line.add_device(parser)
    command_line.add_choices(parser, "--networks", NETWORKS)
    command_line.add_optimizers(parser)
    command_line.add_repeats(parser, REPEATS)
    return parser
