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
from rich.progress import track

from benchmarks import command_line, report, results, timing
from benchmarks.networks import NETWORKS
from benchmarks.optimizers import OPTIMIZERS, REFERENCE, XLA, Optimizer, trained
from benchmarks.report import plus_minus
from benchmarks.results import Measurement, Row
from benchmarks.shapes import in_words
from pallas_kernels import fuse

PACKAGES = ("jax", "jaxlib", "flax", "optax")
GRADIENT = "gradient"

# More than in other benchmarks, because a share is the small difference of two long times.
REPEATS = 20

NOTES = """
ms: the time of the whole training step, median ± interquartile range over its turns. The gradient
alone writes all of its outputs; its row is over all of its turns. × adamw: the time relative to the
training step with optax.adamw, turn by turn. share: (step - gradient) / step, turn by turn, in
percent. If its range is wider than the share, conclude only that the share is small. alone: the
time in ms of the optimizer's step alone, in place, on a gradient in memory. The share can differ
from alone / ms: in a whole step, XLA may fuse the update into the gradient's last operations, run
both in parallel, and find the gradient in a cache. The share falls as the batch grows; these
batches are small."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    environment = command_line.begin(parser, options.out, PACKAGES, options.device)
    path = results.path(options.out, "train", options.device)
    for network in options.networks:
        turns, rows = Turns(network, options.device, options.repeats), {}
        for name in track(options.optimizers, network, transient=True):
            measured = turns.measure(name)
            results.save(path, measured, [*measurements(measured)], environment)
            rows |= measured
        print(f"\n{turns.title}\n\n{table(rows)}")
    print(NOTES)


class Turns:
    """The training steps of one network; each takes turns with adamw and the gradient alone."""

    def __init__(self, name: str, platform: str, repeats: int):
        self.name, self.platform, self.repeats = name, platform, repeats
        self.network = NETWORKS[name]()
        self.title = f"{name}: {in_words(self.network.params)}, {self.network.batch_size}"
        self.gradient = jax.jit(jax.grad(self.network.loss))
        self.references = {GRADIENT: self.gradient_alone(), REFERENCE: self.whole(REFERENCE)}

    def measure(self, name: str) -> dict[str, Row]:
        """Measure a row for the chain, and on a GPU one for the fused step, by network and name."""
        backends = {name: XLA} | ({f"{name}, fused": "auto"} if self.platform == "gpu" else {})
        grads = self.gradient(self.network.params, self.network.batch)
        runs = dict(self.references)
        for case, backend in backends.items():
            if case != REFERENCE:
                runs[case] = self.whole(name, backend)
            runs[f"{case}, alone"] = OPTIMIZERS[name].run(self.network.params, grads, backend)
        steps = timing.STEPS_PER_TURN[self.platform]
        times = timing.interleave(runs, repeats=self.repeats, steps_per_turn=steps)
        return {
            f"{self.name} / {case}": make_row(
                times[case], times[GRADIENT], times[f"{case}, alone"], times[REFERENCE]
            )
            for case in backends
        }

    def whole(self, name: str, backend: str = XLA) -> timing.Run:
        """Return a run of training steps: gradient and update in one program."""
        optimizer = OPTIMIZERS[name]
        step = training_step(self.network.loss, optimizer, backend)
        return timing.donated(step, *optimizer.begin(self.network.params), self.network.batch)

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
    loss: Callable[[Any, Any], jax.Array], optimizer: Optimizer, backend: str = XLA
) -> Callable[..., tuple[Any, Any]]:
    """Return a function `(params, state, batch) -> (params, state)`.

    Its parameters have the form that `Optimizer.prepare` returns.
    """
    update = fuse(optimizer.tx, backend=backend).step

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
    to_adamw, to_adamw_spread = whole.relative_to(reference)
    to_gradient, share_spread = gradient.relative_to(whole)
    return {
        **whole.row(),
        "to_adamw": to_adamw,
        "to_adamw_spread": to_adamw_spread,
        "share": 1 - to_gradient,
        "share_spread": share_spread,
        **gradient.row("gradient_"),
        **alone.row("alone_"),
    }


def table(rows: Mapping[str, Row]) -> str:
    """Return a table of one network: the gradient alone, then the rows."""
    gradient = [ms for row in rows.values() for ms in row["gradient_times_ms"]]
    spread = timing.interquartile_range(gradient)
    lines = [
        {
            "optimizer": case.partition(" / ")[2],
            "ms": plus_minus(row["median_ms"], row["spread_ms"]),
            "× adamw": f"{row['to_adamw']:.2f} ± {row['to_adamw_spread']:.2f}",
            "share, %": f"{100 * row['share']:.1f} ± {100 * row['share_spread']:.1f}",
            "alone": plus_minus(row["alone_ms"], row["alone_spread_ms"]),
        }
        for case, row in rows.items()
    ]
    alone = {"optimizer": "(gradient alone)", "ms": plus_minus(statistics.median(gradient), spread)}
    return report.table([*lines, alone])


def measurements(rows: Mapping[str, Row]) -> Iterator[Measurement]:
    """Yield the measurements of the rows for the history: whole steps and shares."""
    yield from results.step_times("train", rows)
    for case, row in rows.items():
        share, spread = 100 * row["share"], 100 * row["share_spread"]
        yield Measurement("train", f"{case}, share", "%", share, spread)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("train", __doc__)
    parser.add_argument("--device", choices=timing.STEPS_PER_TURN, default="cpu")
    command_line.add_choices(parser, "--networks", NETWORKS)
    command_line.add_optimizers(parser)
    command_line.add_repeats(parser, REPEATS)
    return parser
