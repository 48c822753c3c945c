"""Step time and compile time of optimizers for several numbers of leaves and of parameters.

A step computes the update and applies it; parameters and state are donated. All leaves are vectors
of one length. Each optimizer takes turns with optax.adamw, and on a GPU also with its own fused
step. Before that, each step is compiled alone, without a cache.
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
from benchmarks.contenders import CONTENDERS, REFERENCE, trained
from benchmarks.latest import Row
from benchmarks.leaf_sets import Leaves, leaves
from pallas_kernels import fuse
from pallas_kernels.compile import Compiler, whole_step

PACKAGES = ("jax", "jaxlib", "optax")
OPTIMIZERS = (REFERENCE, "fame", "vradam", "novak")

LEAVES = (1, 3, 10, 30, 100, 300, 1000)
PARAMETERS = tuple(10**i for i in range(3, 9))
# One of these numbers is fixed while the other varies.
FIXED_PARAMETERS = 10**6
FIXED_LEAVES = 10

# Numbers of leaves at which `--trace` measures, and how often.
TRACED_LEAVES = (161, 1000, 3000)
TRACES = 3

# Lengths are multiples of this. With odd lengths, XLA's CPU programs are much slower, adamw's too.
LENGTHS = 4

# A turn is long in comparison with the resolution of the clock and the jitter of a call.
PARAMETERS_PER_TURN = 10**6
MOST_STEPS_PER_TURN = 100

# A step that compiles quickly is compiled more often.
LEAST_COMPILATIONS, MOST_COMPILATIONS = 2, 5
SECONDS_OF_COMPILATION = 3.0

NOTES = (
    "ms: the median time of a step, ± the interquartile range over its turns. × adamw: the time"
    " relative to optax.adamw, turn by turn. compile: the median wall-clock time in seconds to"
    " trace, lower and compile the step without a cache."
)


class Point(NamedTuple):
    """The numbers of leaves and of parameters of one measurement.

    Attributes:
      leaves: the number of leaves, which are vectors of one length.
      parameters: the number of parameters in all leaves, except for a remainder.
    """

    leaves: int
    parameters: int

    def case(self, way: str) -> str:
        """Return the name of the case: this point and a way to run the step."""
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves} leaves"
        return f"{leaves}, {self.parameters} parameters / {way}"

    def shapes(self) -> Leaves:
        """Return the shapes of the leaves."""
        length = self.parameters // self.leaves
        return leaves([(max(length - length % LENGTHS, 1),)] * self.leaves)

    def steps_per_turn(self, platform: str) -> int:
        """Return the number of steps per turn; small steps need more."""
        steps = min(PARAMETERS_PER_TURN // self.parameters, MOST_STEPS_PER_TURN)
        return max(steps, timing.STEPS_PER_TURN[platform])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device, circumstances, console = command_line.begin(parser, options, PACKAGES)
    path = latest.path(options.out, "scaling", options.device)
    by_leaves = [Point(number, FIXED_PARAMETERS) for number in options.leaves]
    by_parameters = [Point(FIXED_LEAVES, number) for number in options.parameters]
    points = list(dict.fromkeys(by_leaves + by_parameters))  # both lists may contain the same point
    measured: dict[str, Row] = {}
    if options.trace is not None:
        traced = {
            f"{number} leaves / {name}": trace_seconds(number, name)
            for number in options.trace or TRACED_LEAVES
            for name in options.optimizers
        }
        path = latest.path(options.out, "trace", options.device)
        latest.save(path, traced, trace_measurements(traced), circumstances)
        console.print(trace_table(traced))
        return
    progress = command_line.progress_display(console)
    task = progress.add_task("", total=2 * len(points) * len(options.optimizers))
    with jax.default_device(device), progress:
        # Start the compiler first, so that no case includes its start.
        compile_seconds(Point(1, 1), REFERENCE, options.device)
        for point in points:
            compiled: dict[str, list[float]] = {}
            for name in options.optimizers:  # before any timing, because it clears caches
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
            "The figure needs matplotlib. `python -m benchmarks summary` can draw it later."
        )


def draw(path: Path) -> None:
    """Draw the results of a file into an SVG in the same folder."""
    from benchmarks import plots  # measuring alone does not need matplotlib

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
    """Measure the wall-clock seconds to compile each way of an optimizer's step without a cache."""
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
    """The steps at one point; each optimizer takes turns with adamw."""

    def __init__(self, point: Point, platform: str, repeats: int):
        self.point, self.platform, self.repeats = point, platform, repeats
        self.grads = {name: jnp.full(x.shape, 0.1) for name, x in point.shapes().items()}
        self.reference = self.run(REFERENCE, "xla")

    def measure(self, name: str, compiled: Mapping[str, list[float]]) -> dict[str, Row]:
        """Measure a row for each way to run the optimizer's step, by "point / way"."""
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
        """Return a function that runs an optimizer's steps."""
        contender = CONTENDERS[name]
        params = contender.hold(jax.tree.map(jnp.ones_like, self.grads))
        step = fuse(contender.tx, backend=backend).step
        return timing.donated(step, params, contender.tx.init(params), self.grads)


def make_row(times: timing.Times, reference: timing.Times, compiled: Sequence[float]) -> Row:
    """Return the row of one step for the table and the file.

    Args:
      times: the times of the step.
      reference: the times of adamw's step in the same turns.
      compiled: the seconds of each compilation.
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
    """Return a table of all rows for the terminal."""
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
    """Yield the measurements of the rows for the history: steps and compilations."""
    yield from latest.step_times("scaling", rows)
    for case, row in rows.items():
        spread = timing.interquartile_range(row["compile_times_s"])
        yield history.Measurement("scaling", f"{case}, compile", "s", row["compile_s"], spread)


def trace_seconds(number: int, name: str) -> Row:
    """Measure the CPU seconds to trace an optimizer's step, and to plan its kernels after that."""
    contender = CONTENDERS[name]
    grads = leaves([(LENGTHS,)] * number)
    params = jax.eval_shape(contender.hold, grads)
    arguments = (params, jax.eval_shape(contender.tx.init, params), trained(params), {})
    chain: list[float] = []
    fuse_: list[float] = []
    for _ in range(TRACES):
        jax.clear_caches()
        compiler = Compiler(whole_step(contender.tx), in_place=2)
        begin = time.process_time()
        compiler.trace(arguments)
        traced = time.process_time()
        compiler(arguments, "triton", {})  # does not trace again
        chain.append(traced - begin)
        fuse_.append(time.process_time() - traced)
    return {
        "leaves": number,
        "optimizer": name,
        "chain_s": statistics.median(chain),
        "fuse_s": statistics.median(fuse_),
        "chain_times_s": chain,
        "fuse_times_s": fuse_,
    }


def trace_table(rows: Mapping[str, Row]) -> Table:
    """Return a table of the times of `trace_seconds` for the terminal."""
    columns = ("trace of the chain", "plan of its kernels", "÷ trace")
    drawn = command_line.make_table("CPU seconds", ["leaves / optimizer"], columns)
    for case, row in rows.items():
        chain, fuse_ = row["chain_s"], row["fuse_s"]
        drawn.add_row(case, f"{chain:.2f}", f"{fuse_:.2f}", f"{fuse_ / chain:.2f}")
    return drawn


def trace_measurements(rows: Mapping[str, Row]) -> Iterator[history.Measurement]:
    """Yield the measurements of `trace_seconds` for the history."""
    for case, row in rows.items():
        for what in ("chain", "fuse"):
            spread = timing.interquartile_range(row[f"{what}_times_s"])
            yield history.Measurement("scaling", f"{case}, {what}", "s", row[f"{what}_s"], spread)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("scaling", __doc__)
    command_line.add_device(parser)
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
    parser.add_argument(
        "--trace",
        nargs="*",
        type=functools.partial(_whole_number, least=1, most=FIXED_PARAMETERS),
        metavar="N",
        help="measure only the time to trace and plan a fused step, for these numbers of leaves"
        f" (default: {' '.join(map(str, TRACED_LEAVES))})",
    )
    command_line.add_optimizers(parser, OPTIMIZERS)
    command_line.add_repeats(parser)
    return parser


def _whole_number(text: str, *, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be in [{least}, {most}], got {text!r}")
    return int(text)
