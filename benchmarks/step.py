"""Times of one step of each optimizer on the parameters of known networks.

A compiled step computes the update and applies it; parameters and state are donated. Each optimizer
takes turns with optax.adamw and with a copy of a large array. Its row has two ratios: the time per
byte relative to adamw, and the bandwidth relative to the copy. On a GPU, the fused step of each
optimizer takes turns too. On a CPU, PyTorch's optimizers are timed if the extra `peers` is
installed.
"""

import argparse
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks import command_line, contenders, latest, peers, timing
from benchmarks.command_line import quoted
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS, count, in_words
from benchmarks.peers import PEERS
from pallas_kernels import fuse

PACKAGES = ("jax", "jaxlib", "optax", "torch", "pytorch_optimizer")
COPY = "copy"

# The time per byte, relative to adamw's, that no chain should exceed.
TARGET = 1.15

NOTES = (
    "ms: the median time of a step, ± the interquartile range over its turns. bytes: the bytes per"
    " parameter that a step must move; bytes that are read again after a norm count twice. GB/s:"
    " these bytes, divided by the time. of copy: the bandwidth relative to that of a copy in place,"
    " measured in turns. × adamw: the time per byte relative to optax.adamw, measured in turns."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        names = choose(options.optimizers, options.device)
    except ValueError as error:
        parser.error(str(error))
    device, circumstances, console = command_line.begin(parser, options, PACKAGES)
    progress = command_line.progress_display(console)
    task = progress.add_task("", total=len(options.sets) * len(names))
    with jax.default_device(device), progress:
        for leaf_set in options.sets:
            turns = Turns(leaf_set, options.device, options.repeats)
            measured: dict[str, Row] = {}
            for name in names:
                progress.update(task, description=f"{leaf_set}: {name}")
                rows = turns.measure(name)
                path = latest.path(options.out, "step", options.device)
                latest.save(path, rows, latest.step_times("step", rows), circumstances)
                measured |= rows
                progress.advance(task)
            console.print(table(leaf_set, measured))
    console.print(NOTES, highlight=False)


class Turns:
    """The steps on one set of leaves; each optimizer takes turns with adamw and a copy.

    Only adamw and the copy stay in memory. The optimizers are measured one by one, because all of
    them would not fit into memory.
    """

    def __init__(self, leaf_set: str, platform: str, repeats: int):
        self.leaf_set, self.platform, self.repeats = leaf_set, platform, repeats
        shapes, random = LEAF_SETS[leaf_set], np.random.default_rng(0)
        self.params, self.grads = (
            {name: random.standard_normal(x.shape, np.float32) for name, x in shapes.items()}
            for _ in range(2)
        )
        self.device_grads = jax.tree.map(jnp.asarray, self.grads)
        self.beside = {REFERENCE: self.chain(REFERENCE), COPY: timing.copying()}

    def measure(self, name: str) -> dict[str, Row]:
        """Measure a row for each way to run the optimizer's step, by "set / way"."""
        ways = self.ways(name)
        times = timing.interleave(
            self.beside | ways,
            repeats=self.repeats,
            steps_per_turn=timing.STEPS_PER_TURN[self.platform],
        )
        bandwidth = timing.copied_bytes() / times[COPY].median
        reference = times[REFERENCE].median / self.moved(REFERENCE)
        moved, parameters = self.moved(name), count(LEAF_SETS[self.leaf_set])
        return {
            f"{self.leaf_set} / {way}": make_row(
                times[way], moved, parameters, bandwidth, reference
            )
            for way in ways
        }

    def ways(self, name: str) -> dict[str, timing.Run]:
        """Return the chain, on a GPU also the fused step; or a baseline in PyTorch."""
        if name in PEERS:
            return {name: peers.running(name, [*self.params.values()], [*self.grads.values()])}
        return {
            way: self.beside[way] if way == REFERENCE else self.chain(name, backend)
            for way, backend in contenders.backends(name, self.platform).items()
        }

    def chain(self, name: str, backend: str = "xla") -> timing.Run:
        """Return a function that runs a contender's steps with a backend of `fuse`."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.array, self.params))
        step = fuse(contender.tx, backend=backend).step
        return timing.donated(step, params, contender.tx.init(params), self.device_grads)

    def moved(self, name: str) -> float:
        """Return the least number of bytes that a step must move."""
        near = PEERS[name].near if name in PEERS else name
        return contenders.floor(near, self.leaf_set) * count(LEAF_SETS[self.leaf_set])


def make_row(
    times: timing.Times, moved: float, parameters: int, bandwidth: float, reference: float
) -> Row:
    """Return the row of one step for the table and the file.

    Args:
      times: the times of the step.
      moved: the least number of bytes that the step must move.
      parameters: the number of parameters.
      bandwidth: the bytes per second of the copy.
      reference: the seconds per byte of the reference.
    """
    return {
        "median_ms": 1e3 * times.median,
        "spread_ms": 1e3 * times.spread,
        "bytes_per_parameter": moved / parameters,
        "gb_per_s": moved / times.median / 1e9,
        "of_copy": moved / times.median / bandwidth,
        "to_adamw_per_byte": times.median / moved / reference,
        "times_ms": [1e3 * seconds for seconds in times.seconds],
    }


def table(leaf_set: str, rows: Mapping[str, Row]) -> Table:
    """Return a table of the rows of one set of leaves for the terminal."""
    title = f"{leaf_set}: {in_words(LEAF_SETS[leaf_set])}"
    columns = ("ms", "bytes", "GB/s", "of copy", "× adamw")
    drawn = command_line.make_table(title, ["optimizer"], columns)
    for case, row in rows.items():
        drawn.add_row(
            case.removeprefix(f"{leaf_set} / "),
            command_line.plus_minus(row["median_ms"], row["spread_ms"]),
            f"{row['bytes_per_parameter']:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['of_copy']:.0%}",
            f"{row['to_adamw_per_byte']:.2f}",
        )
    return drawn


def by_set(rows: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by set of leaves and by way, in the order of `LEAF_SETS` and `CONTENDERS`."""
    optimizers = [way for name in CONTENDERS for way in contenders.backends(name, "gpu")]
    found = {
        leaf_set: {
            way: rows[case]
            for way in [*optimizers, *PEERS]
            if (case := f"{leaf_set} / {way}") in rows
        }
        for leaf_set in LEAF_SETS
    }
    return {leaf_set: ways for leaf_set, ways in found.items() if ways}


def choose(selected: Sequence[str] | None, platform: str) -> list[str]:
    """Return the optimizers to time: the selected ones, or all that can run here."""
    installed = peers.installed() if platform == "cpu" else []
    if selected is None:
        return [*CONTENDERS, *installed]
    for name in selected:
        if name in PEERS and platform != "cpu":
            raise ValueError(f"{name!r} is timed on a CPU only")
        if name in PEERS and name not in installed:
            raise ValueError(f"{name!r} needs the extra `peers`, which is not installed")
    return list(selected)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("step", __doc__)
    command_line.add_device(parser)
    command_line.add_sets(parser)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[*CONTENDERS, *PEERS],
        metavar="NAME",
        help=f"one or more of {quoted(CONTENDERS)}; with the extra `peers` also {quoted(PEERS)}"
        " (default: all)",
    )
    command_line.add_repeats(parser)
    return parser
