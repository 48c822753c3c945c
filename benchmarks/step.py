"""Times of one step of each optimizer on a CPU, on the parameters of known networks.

A compiled step computes the update and applies it; parameters and state are donated. Each optimizer
takes turns with optax.adamw and with a copy of a large array. Its row has two ratios: the time per
byte relative to adamw, and the bandwidth relative to the copy. PyTorch's optimizers are timed too
if the extra `baselines` is installed. For a GPU, see the benchmark `gpu`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import baselines, command_line, report, results, timing
from benchmarks.baselines import BASELINES
from benchmarks.command_line import quoted
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import OPTIMIZERS, REFERENCE, least_bytes
from benchmarks.results import Row
from benchmarks.shapes import count, in_words

PACKAGES = ("jax", "jaxlib", "optax", "torch", "pytorch_optimizer")
COPY = "copy"

# The time per byte, relative to adamw's, that no chain should exceed.
TARGET = 1.15

NOTES = """
ms: the median time of a step, ± the interquartile range over its turns. bytes: the bytes per
parameter that a step must move; bytes that are read again after a norm count twice. of copy: these
bytes, divided by the time, relative to the bandwidth of a copy in place, measured in turns.
× adamw: the time per byte relative to optax.adamw, measured in turns."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        names = choose(options.optimizers)
    except ValueError as error:
        parser.error(str(error))
    environment = command_line.begin(parser, options.out, PACKAGES)
    path = results.path(options.out, "step", "cpu")
    for leaf_set in options.sets:
        turns, rows = Turns(leaf_set, options.repeats), {}
        for name in track(names, leaf_set, transient=True):
            row = {f"{leaf_set} / {name}": turns.measure(name)}
            results.save(path, row, results.step_times("step", row), environment)
            rows |= row
        print(f"\n{leaf_set}: {in_words(LEAF_SETS[leaf_set])}\n\n{table(rows)}")
    print(NOTES)


class Turns:
    """The steps on one set of leaves; each optimizer takes turns with adamw and a copy.

    Only adamw and the copy stay in memory. The optimizers are measured one by one, because all of
    them would not fit into memory.
    """

    def __init__(self, leaf_set: str, repeats: int):
        self.leaf_set, self.repeats = leaf_set, repeats
        random = np.random.default_rng(0)
        self.params, self.grads = (
            {name: random.standard_normal(x.shape, np.float32) for name, x in leaves.items()}
            for leaves in [LEAF_SETS[leaf_set]] * 2
        )
        self.device_grads = jax.tree.map(jnp.asarray, self.grads)
        self.references = {REFERENCE: self.run(REFERENCE), COPY: timing.copying()}

    def measure(self, name: str) -> Row:
        """Measure the row of an optimizer."""
        runs = self.references if name == REFERENCE else self.references | {name: self.run(name)}
        times = timing.interleave(runs, repeats=self.repeats)
        bandwidth = timing.copied_bytes() / times[COPY].median
        reference = times[REFERENCE].median / self.bytes(REFERENCE)
        parameters = count(LEAF_SETS[self.leaf_set])
        return make_row(times[name], self.bytes(name), parameters, bandwidth, reference)

    def run(self, name: str) -> timing.Run:
        """Return a function that runs the steps of an optimizer or of a baseline in PyTorch."""
        if name in BASELINES:
            return baselines.run(name, [*self.params.values()], [*self.grads.values()])
        return OPTIMIZERS[name].run(self.params, self.device_grads)

    def bytes(self, name: str) -> float:
        """Return the least number of bytes that a step must move."""
        nearest = BASELINES[name].nearest if name in BASELINES else name
        return least_bytes(nearest, self.leaf_set) * count(LEAF_SETS[self.leaf_set])


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
    return times.row() | {
        "bytes_per_parameter": moved / parameters,
        "of_copy": moved / times.median / bandwidth,
        "to_adamw_per_byte": times.median / moved / reference,
    }


def table(rows: Mapping[str, Row]) -> str:
    """Return a table of the rows of one set of leaves."""
    return report.table(
        [
            {
                "optimizer": case.partition(" / ")[2],
                "ms": report.plus_minus(row["median_ms"], row["spread_ms"]),
                "bytes": f"{row['bytes_per_parameter']:.1f}",
                "of copy": f"{row['of_copy']:.0%}",
                "× adamw": f"{row['to_adamw_per_byte']:.2f}",
            }
            for case, row in rows.items()
        ]
    )


def by_set(rows: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by set of leaves and optimizer, in the order of their tables."""
    found = {
        leaf_set: {
            name: rows[case]
            for name in [*OPTIMIZERS, *BASELINES]
            if (case := f"{leaf_set} / {name}") in rows
        }
        for leaf_set in LEAF_SETS
    }
    return {leaf_set: of_set for leaf_set, of_set in found.items() if of_set}


def summary(rows: Mapping[str, Row]) -> str:
    """Return the table of `docs/`: the time per byte relative to adamw, and relative to a copy.

    The ratio is bold if a chain misses the target.
    """

    def cell(name: str, row: Row | None) -> str:
        if row is None:
            return "–"
        ratio = f"{row['to_adamw_per_byte']:.2f}"
        missed = name not in BASELINES and row["to_adamw_per_byte"] > TARGET
        return f"{f'**{ratio}**' if missed else ratio} ({row['of_copy']:.0%})"

    sets = by_set(rows)
    names = dict.fromkeys(name for found in sets.values() for name in found)
    lines = [
        {"optimizer": name} | {x: cell(name, found.get(name)) for x, found in sets.items()}
        for name in names
    ]
    shown = (row for found in sets.values() for row in found.values())
    measured = sorted({f"{row['date']} on {environment(row)}" for row in shown})
    return f"{report.table(lines)}\n\nMeasured {'; '.join(measured)}."


def environment(row: Row) -> str:
    """Describe the cores and versions of a row."""
    versions = map(" ".join, row["versions"].items())
    return ", ".join([row["device"].removeprefix("cpu, "), *versions])


def draw(path: Path) -> None:
    """Draw a file of results into an SVG in the same folder."""
    from benchmarks import plots  # measuring does not need matplotlib

    plots.steps(by_set(results.load(path)), TARGET, path.with_suffix(".svg"))


def choose(selected: Sequence[str] | None) -> list[str]:
    """Return the optimizers to time: the selected ones, or all that can run here."""
    installed = baselines.installed()
    if selected is None:
        return [*OPTIMIZERS, *installed]
    for name in selected:
        if name in BASELINES and name not in installed:
            raise ValueError(f"{name!r} needs the extra `baselines`, which is not installed")
    return list(selected)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("step", __doc__)
    command_line.add_choices(parser, "--sets", LEAF_SETS)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[*OPTIMIZERS, *BASELINES],
        metavar="NAME",
        help=f"one or more of {quoted(OPTIMIZERS)}; with the extra `baselines` also"
        f" {quoted(BASELINES)} (default: all)",
    )
    command_line.add_repeats(parser)
    return parser
