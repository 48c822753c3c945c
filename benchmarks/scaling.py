"""Times and compiles one step against the number of leaves, and of parameters.

A step is update and application, parameters and state donated; leaves are vectors of one length.
Each optimizer takes turns with `optax.adamw`, on a GPU its fused step too. Before that all of them
are compiled by themselves, without any cache.
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
from rich.table import Table

from benchmarks import command_line, contenders, history, latest, timing
from benchmarks.aot import compiled_anew
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.latest import Row
from benchmarks.leaf_sets import Leaves, leaves
from pallas_kernels import fuse

PACKAGES = ("jax", "jaxlib", "optax")
OPTIMIZERS = (REFERENCE, "fame", "vradam", "novak")

LEAVES = (1, 3, 10, 30, 100, 300, 1000)
PARAMETERS = tuple(10**i for i in range(3, 9))
# Of every step whose number of leaves varies, and the other way round.
FIXED_PARAMETERS = 10**6
FIXED_LEAVES = 10

# Lengths are multiples of it: for odd ones XLA's CPU program takes much longer, adamw's too.
LENGTHS = 4

# A turn is long beside the clock, and beside what a single call may suffer.
PARAMETERS_PER_TURN = 10**6
MOST_STEPS_PER_TURN = 100

# What compiles in no time does so more often.
LEAST_COMPILATIONS, MOST_COMPILATIONS = 2, 5
SECONDS_OF_COMPILATION = 3.0

NOTES = (
    "ms: median of a step, ± the interquartile range over its turns. × adamw: relative to"
    " optax.adamw, turn by turn. compile: seconds by the clock to trace, lower and compile the step"
    " once more, with nothing kept; median."
)


class Point(NamedTuple):
    """What the optimizers step on.

    Attributes:
      leaves: number of them, all vectors of one length.
      parameters: in all leaves, but for a remainder.
    """

    leaves: int
    parameters: int

    def case(self, way: str) -> str:
        """Of a way to step."""
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves} leaves"
        return f"{leaves}, {self.parameters} parameters / {way}"

    def shapes(self) -> Leaves:
        """Of the leaves."""
        length = self.parameters // self.leaves
        return leaves([(max(length - length % LENGTHS, 1),)] * self.leaves)

    def steps_per_turn(self, platform: str) -> int:
        """Many small steps, or a single large one on a CPU."""
        steps = min(PARAMETERS_PER_TURN // self.parameters, MOST_STEPS_PER_TURN)
        return max(steps, timing.STEPS_PER_TURN[platform])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line selects; everything by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device, circumstances, console = command_line.begin(parser, options, PACKAGES)
    path = latest.path(options.out, "scaling", options.device)
    by_leaves = [Point(number, FIXED_PARAMETERS) for number in options.leaves]
    by_parameters = [Point(FIXED_LEAVES, number) for number in options.parameters]
    points = list(dict.fromkeys(by_leaves + by_parameters))  # they may have one in common
    measured: dict[str, Row] = {}
    progress = command_line.progress_display(console)
    task = progress.add_task("", total=2 * len(points) * len(options.optimizers))
    with jax.default_device(device), progress:
        # The compiler's own start is nobody's cost.
        compile_seconds(Point(1, 1), REFERENCE, options.device)
        for point in points:
            compiled: dict[str, list[float]] = {}
            for name in options.optimizers:  # before the first is timed, for it clears caches
                progress.update(task, description=f"compile {point.case(name)}")
                compiled |= compile_seconds(point, name, options.device)
                progress.advance(task)
            turns = Turns(point, options.device, options.repeats)
            for name in options.optimizers:
                progress.update(task, description=f"time {point.case(name)}")
                rows = turns.measure(name, compiled)
                latest.save(path, rows, measurements(rows), circumstances)
                measured |= rows
                progress.advance(task)
    console.print(table(measured))
    console.print(NOTES, highlight=False)
    if importlib.util.find_spec("matplotlib"):
        draw(path)
    else:
        console.print(
            "No figure without matplotlib: `python -m benchmarks summary` draws it later."
        )


def draw(path: Path) -> None:
    """Draws a file of results beside it."""
    from benchmarks import plots  # a machine that only measures does without matplotlib

    rows = latest.load(path).values()
    columns = {
        "leaves": [row for row in rows if row["parameters"] == FIXED_PARAMETERS],
        "parameters": [row for row in rows if row["leaves"] == FIXED_LEAVES],
    }
    labels = (
        f"leaves ({FIXED_PARAMETERS:,} parameters in all)",
        f"parameters (in {FIXED_LEAVES} leaves)",
    )
    plots.scaling(columns, labels, path.with_suffix(".svg"))


def compile_seconds(point: Point, name: str, platform: str) -> dict[str, list[float]]:
    """Seconds by the clock to compile each way of an optimizer's step from nothing."""
    contender = CONTENDERS[name]
    grads = point.shapes()
    params = jax.eval_shape(contender.hold, grads)
    state = jax.eval_shape(contender.tx.init, params)
    seconds: dict[str, list[float]] = {}
    for way, backend in contenders.backends(name, platform).items():
        times = seconds[way] = []
        while len(times) < LEAST_COMPILATIONS or (
            len(times) < MOST_COMPILATIONS and sum(times) < SECONDS_OF_COMPILATION
        ):
            jax.clear_caches()
            with compiled_anew():
                begin = time.perf_counter()
                step = jax.jit(fuse(contender.tx, backend=backend).step, donate_argnums=(0, 1))
                step.lower(params, state, grads).compile()
                times.append(time.perf_counter() - begin)
    return seconds


class Turns:
    """Times optimizers at one point, each beside adamw."""

    def __init__(self, point: Point, platform: str, repeats: int):
        self.point, self.platform, self.repeats = point, platform, repeats
        self.grads = {name: jnp.full(x.shape, 0.1) for name, x in point.shapes().items()}
        self.reference = self.run(REFERENCE, "xla")

    def measure(self, name: str, compiled: Mapping[str, list[float]]) -> dict[str, Row]:
        """A row for each way in which the optimizer's step can run here, by "point / way"."""
        backends = contenders.backends(name, self.platform)
        ways = {way: self.run(name, backends[way]) for way in backends if way != REFERENCE}
        times = timing.interleave(
            {REFERENCE: self.reference} | ways,
            repeats=self.repeats,
            steps_per_turn=self.point.steps_per_turn(self.platform),
        )
        return {
            self.point.case(way): self.point._asdict()
            | {"optimizer": way}
            | make_row(times[way], times[REFERENCE], compiled[way])
            for way in backends
        }

    def run(self, name: str, backend: str) -> timing.Run:
        """An optimizer's steps."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.ones_like, self.grads))
        step = fuse(contender.tx, backend=backend).step
        return timing.donated(step, params, contender.tx.init(params), self.grads)


def make_row(times: timing.Times, reference: timing.Times, compiled: Sequence[float]) -> Row:
    """What the table and the file say of one step.

    Args:
      times: of the step.
      reference: of adamw's, in the same turns.
      compiled: seconds, of each compilation.
    """
    ratios = [x / y for x, y in zip(times.seconds, reference.seconds, strict=True)]
    return {
        "median_ms": 1e3 * times.median,
        "spread_ms": 1e3 * times.spread,
        "to_adamw": statistics.median(ratios),
        "to_adamw_spread": timing.interquartile_range(ratios),
        "compile_s": statistics.median(compiled),
        "times_ms": [1e3 * seconds for seconds in times.seconds],
        "compile_times_s": list(compiled),
    }


def table(rows: Mapping[str, Row]) -> Table:
    """All rows, for the terminal."""
    columns = ("ms", "× adamw", "compile")
    drawn = command_line.make_table("Vectors of one length", ["optimizer"], columns)
    heading = None
    for case, row in rows.items():
        point, _, way = case.partition(" / ")
        if point != heading:
            drawn.add_section()
            drawn.add_row(f"[bold]{point}")
            heading = point
        drawn.add_row(
            way,
            command_line.plus_minus(row["median_ms"], row["spread_ms"]),
            f"{row['to_adamw']:.2f} ± {row['to_adamw_spread']:.2f}",
            f"{row['compile_s']:.2f}",
        )
    return drawn


def measurements(rows: Mapping[str, Row]) -> Iterator[history.Measurement]:
    """What the history says of the rows: steps, and compilations."""
    yield from latest.step_times("scaling", rows)
    for case, row in rows.items():
        spread = timing.interquartile_range(row["compile_times_s"])
        yield history.Measurement("scaling", f"{case}, compile", "s", row["compile_s"], spread)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.make_parser("scaling", __doc__)
    command_line.add_device(parser)
    for name, default, least, most, what in (
        ("--leaves", LEAVES, 1, FIXED_PARAMETERS, f"of {FIXED_PARAMETERS} parameters together"),
        ("--parameters", PARAMETERS, FIXED_LEAVES, sys.maxsize, f"in {FIXED_LEAVES} leaves"),
    ):
        parser.add_argument(
            name,
            nargs="*",
            type=functools.partial(_whole_number, least=least, most=most),
            default=list(default),
            metavar="N",
            help=f"numbers of them, {what} (default: {' '.join(map(str, default))})",
        )
    command_line.add_optimizers(parser, OPTIMIZERS)
    command_line.add_repeats(parser)
    return parser


def _whole_number(text: str, *, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be in [{least}, {most}], got {text!r}")
    return int(text)
