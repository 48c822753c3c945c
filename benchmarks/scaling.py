"""Step time and compile time of optimizers for several numbers of leaves and of parameters.

A step computes the update and applies it; parameters and state are donated. All leaves are vectors
of one length. Each optimizer takes turns with optax.adamw on a CPU. Before that, each step is
compiled alone, without a cache.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import command_line, report, results, timing
from benchmarks.aot import compiled_anew
from benchmarks.optimizers import OPTIMIZERS, REFERENCE, XLA
from benchmarks.results import Measurement, Row
from benchmarks.shapes import Leaves, leaves, state_of
from pallas_kernels import fuse

PACKAGES = ("jax", "jaxlib", "optax")
DEFAULT_OPTIMIZERS = (REFERENCE, "fame", "vradam", "novak")

LEAVES = (1, 3, 10, 30, 100, 300, 1000)
PARAMETERS = tuple(10**i for i in range(3, 9))
# One of these numbers is fixed while the other varies.
FIXED_PARAMETERS = 10**6
FIXED_LEAVES = 10

# Lengths are multiples of this. With odd lengths, XLA's CPU programs are much slower, adamw's too.
LENGTHS = 4

# A turn is long in comparison with the resolution of the clock and the jitter of a call.
PARAMETERS_PER_TURN = 10**6
MOST_STEPS_PER_TURN = 100

# A step that compiles quickly is compiled more often.
LEAST_COMPILATIONS, MOST_COMPILATIONS = 2, 5
SECONDS_OF_COMPILATION = 3.0

NOTES = """
ms: the median time of a step, ± the interquartile range over its turns. × adamw: the time relative
to optax.adamw, turn by turn. compile: the median wall-clock time in seconds to trace, lower and
compile the step without a cache."""


class Point(NamedTuple):
    """The numbers of leaves and of parameters of one measurement.

    Attributes:
      leaves: the number of leaves, which are vectors of one length.
      parameters: the number of parameters in all leaves, except for a remainder.
    """

    leaves: int
    parameters: int

    def __str__(self) -> str:
        """Return the first part of the names of the point's cases."""
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves} leaves"
        return f"{leaves}, {self.parameters} parameters"

    def shapes(self) -> Leaves:
        """Return the shapes of the leaves."""
        length = self.parameters // self.leaves
        return leaves([(max(length - length % LENGTHS, 1),)] * self.leaves)

    def steps_per_turn(self) -> int:
        """Return the number of steps per turn; small steps need more."""
        return max(min(PARAMETERS_PER_TURN // self.parameters, MOST_STEPS_PER_TURN), 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    environment = command_line.begin(parser, options.out, PACKAGES)
    path = results.path(options.out, "scaling", "cpu")
    by_leaves = [Point(number, FIXED_PARAMETERS) for number in options.leaves]
    by_parameters = [Point(FIXED_LEAVES, number) for number in options.parameters]
    points = list(dict.fromkeys(by_leaves + by_parameters))  # both lists may contain the same point
    rows: dict[str, Row] = {}
    # Start the compiler first, so that no case includes its start.
    compile_seconds(Point(1, 1), REFERENCE)
    for point in track(points, "points", transient=True):
        measured = measure(point, options.optimizers, options.repeats)
        results.save(path, measured, measurements(measured), environment)
        rows |= measured
    print(f"\n{table(rows)}\n{NOTES}")
    if importlib.util.find_spec("matplotlib"):
        draw(path)
    else:
        print("The figure needs matplotlib. `python -m benchmarks summary` can draw it later.")


def measure(point: Point, names: Sequence[str], repeats: int) -> dict[str, Row]:
    """Measure a row for each optimizer at one point, which takes turns with adamw."""
    # Before any timing, because it clears caches.
    compiled = {name: compile_seconds(point, name) for name in names}
    params, grads = (
        {name: jnp.full(x.shape, value) for name, x in point.shapes().items()}
        for value in (1.0, 0.1)
    )
    reference = {REFERENCE: OPTIMIZERS[REFERENCE].run(params, grads)}
    rows: dict[str, Row] = {}
    for name in names:
        run = reference.get(name) or OPTIMIZERS[name].run(params, grads)
        times = timing.interleave(
            reference | {name: run}, repeats=repeats, steps_per_turn=point.steps_per_turn()
        )
        row = make_row(times[name], times[REFERENCE], compiled[name])
        rows[f"{point} / {name}"] = point._asdict() | {"optimizer": name} | row
    return rows


def compile_seconds(point: Point, name: str) -> list[float]:
    """Measure the wall-clock seconds to compile an optimizer's step without a cache."""
    optimizer, grads = OPTIMIZERS[name], point.shapes()
    params = jax.eval_shape(optimizer.prepare, grads)
    state, times = state_of(optimizer.tx, params), []
    while len(times) < LEAST_COMPILATIONS or (
        len(times) < MOST_COMPILATIONS and sum(times) < SECONDS_OF_COMPILATION
    ):
        jax.clear_caches()
        with compiled_anew():
            begin = time.perf_counter()
            step = jax.jit(fuse(optimizer.tx, backend=XLA).step, donate_argnums=(0, 1))
            step.lower(params, state, grads).compile()
            times.append(time.perf_counter() - begin)
    return times


def make_row(times: timing.Times, reference: timing.Times, compiled: Sequence[float]) -> Row:
    """Return the row of one step for the table and the file.

    Args:
      times: the times of the step.
      reference: the times of adamw's step in the same turns.
      compiled: the seconds of each compilation.
    """
    to_adamw, to_adamw_spread = times.relative_to(reference)
    return times.row() | {
        "to_adamw": to_adamw,
        "to_adamw_spread": to_adamw_spread,
        "compile_s": statistics.median(compiled),
        "compile_times_s": list(compiled),
    }


def table(rows: Mapping[str, Row]) -> str:
    """Return a table of all rows."""
    return report.table(
        [
            {
                "vectors": case.partition(" / ")[0],
                "optimizer": row["optimizer"],
                "ms": report.plus_minus(row["median_ms"], row["spread_ms"]),
                "× adamw": f"{row['to_adamw']:.2f} ± {row['to_adamw_spread']:.2f}",
                "compile": f"{row['compile_s']:.2f}",
            }
            for case, row in rows.items()
        ]
    )


def measurements(rows: Mapping[str, Row]) -> Iterator[Measurement]:
    """Yield the measurements of the rows for the history: steps and compilations."""
    yield from results.step_times("scaling", rows)
    for case, row in rows.items():
        spread = timing.interquartile_range(row["compile_times_s"])
        yield Measurement("scaling", f"{case}, compile", "s", row["compile_s"], spread)


def draw(path: Path) -> None:
    """Draw the results of a file into an SVG in the same folder."""
    from benchmarks import plots  # measuring alone does not need matplotlib

    rows = results.load(path).values()
    columns = {
        "leaves": [row for row in rows if row["parameters"] == FIXED_PARAMETERS],
        "parameters": [row for row in rows if row["leaves"] == FIXED_LEAVES],
    }
    labels = (
        f"leaves ({FIXED_PARAMETERS:,} parameters in all)",
        f"parameters (in {FIXED_LEAVES} leaves)",
    )
    plots.scaling(columns, labels, path.with_suffix(".svg"))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("scaling", __doc__)
    for name, default, least, most, what in (
        ("--leaves", LEAVES, 1, FIXED_PARAMETERS, f"with {FIXED_PARAMETERS} parameters in all"),
        ("--parameters", PARAMETERS, FIXED_LEAVES, sys.maxsize, f"in {FIXED_LEAVES} leaves"),
    ):
        parser.add_argument(
            name,
            nargs="*",
            type=functools.partial(_whole_number, least=least, most=most),
            default=list(default),
            metavar="N",
            help=f"numbers to measure, {what} (default: {' '.join(map(str, default))})",
        )
    command_line.add_optimizers(parser, DEFAULT_OPTIMIZERS)
    command_line.add_repeats(parser)
    return parser


def _whole_number(text: str, *, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be in [{least}, {most}], got {text!r}")
    return int(text)
