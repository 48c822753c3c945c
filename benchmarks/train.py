"""Times whole training steps of two small Flax networks: what share of them the optimizer takes.

In turns: the gradient alone, the step with `optax.adamw`, the step with each optimizer, and that
optimizer's own step on a gradient that is there. On a GPU each fused step takes turns too. The
share is what the gradient alone does not take of the whole step, turn by turn.
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

# More than other benchmarks, for a share is the small difference of two long times.
REPEATS = 20

NOTES = (
    "ms: of the whole training step, median ± interquartile range over its turns; of the gradient"
    " by itself, its outputs kept, over all of its turns. × adamw: relative to the step with"
    " optax.adamw, turn by turn. share: (step - gradient) / step, turn by turn, in percent; where"
    " its range is wider than the share, read no more than that it is small. alone: ms of the"
    " optimizer's step by itself, in place, on a gradient in memory. The share need not be alone /"
    " ms: in a whole step XLA may fuse the update into the gradient's last operations, run both"
    " side by side, and find the gradient in a cache. It falls as a batch grows; these are small."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line selects; everything by default."""
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
    """Times the training of one network, by each optimizer beside adamw and the gradient alone."""

    def __init__(self, name: str, platform: str, repeats: int):
        self.name, self.platform, self.repeats = name, platform, repeats
        self.network = NETWORKS[name]()
        self.title = f"{name}: {in_words(self.network.params)}, {self.network.batch_size}"
        self.gradient = jax.jit(jax.grad(self.network.loss))
        self.beside = {GRADIENT: self.gradient_alone(), REFERENCE: self.whole(REFERENCE)}

    def measure(self, name: str) -> dict[str, Row]:
        """A row for each way in which the optimizer can run here, by "network / way"."""
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
        """Training steps: the gradient and the update in one program."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.copy, self.network.params))
        step = training_step(self.network.loss, contender, backend)
        return timing.donated(step, params, contender.tx.init(params), self.network.batch)

    def alone(self, name: str, backend: str) -> timing.Run:
        """The optimizer's steps, always with the same gradient."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.copy, self.network.params))
        grads = self.gradient(self.network.params, self.network.batch)
        step = fuse(contender.tx, backend=backend).step
        return timing.donated(step, params, contender.tx.init(params), grads)

    def gradient_alone(self) -> timing.Run:
        """Gradients at the initial parameters; as outputs, all of them must be computed."""

        def run(steps: int) -> None:
            grads = None
            for _ in range(steps):
                grads = self.gradient(self.network.params, self.network.batch)
            jax.block_until_ready(grads)

        return run


def training_step(
    loss: Callable[[Any, Any], jax.Array], contender: Contender, backend: str = "xla"
) -> Callable[..., tuple[Any, Any]]:
    """A function `(held params, state, batch) -> (held params, state)`."""
    update = fuse(contender.tx, backend=backend).step

    def step(held, state, batch):
        return update(held, state, jax.grad(loss)(trained(held), batch))

    return step


def make_row(
    whole: timing.Times, gradient: timing.Times, alone: timing.Times, reference: timing.Times
) -> Row:
    """What the table and the file say of one training step, from times of the same turns.

    Args:
      whole: of the training step.
      gradient: of its gradient alone.
      alone: of its optimizer alone.
      reference: of the training step with adamw.
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
    """The rows of one network, for the terminal, below its gradient's."""
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
    """What the history says of the rows: whole steps, and shares."""
    yield from latest.step_times("train", rows)
    for case, row in rows.items():
        share, spread = 100 * row["share"], 100 * row["share_spread"]
        yield history.Measurement("train", f"{case}, share", "%", share, spread)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.make_parser("train", __doc__)
    command_line.add_device(parser)
    command_line.add_choices(parser, "--networks", NETWORKS)
    command_line.add_optimizers(parser)
    command_line.add_repeats(parser, REPEATS)
    return parser
