"""CPU time to trace an optimizer's chain, and to plan its kernels from that trace.

`pallas_kernels.fuse` traces the chain as `jax.jit` does, and then plans kernels. This is its cost
before XLA compiles anything. It depends on the number of leaves, not on their sizes.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from rich.progress import track

from benchmarks import command_line, report, results
from benchmarks.optimizers import OPTIMIZERS, REFERENCE, TRITON, trained
from benchmarks.results import Measurement, Row
from benchmarks.shapes import leaves, state_of
from benchmarks.timing import interquartile_range
from pallas_kernels.compile import Compiler, whole_step

PACKAGES = ("jax", "jaxlib", "optax")
DEFAULT_OPTIMIZERS = (REFERENCE, "clip + adamw", "novak")
# Of ResNet-50, and of networks whose layers are not stacked.
LEAVES = (161, 1000, 3000)
REPEATS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that the command line selects; all by default."""
    parser = make_parser()
    options = parser.parse_args(argv)
    environment = command_line.begin(parser, options.out, PACKAGES)
    cases = [(number, name) for number in options.leaves for name in options.optimizers]
    rows = {
        f"{number} leaves / {name}": measure(number, name, options.repeats)
        for number, name in track(cases, "cases", transient=True)
    }
    results.save(results.path(options.out, "trace", "cpu"), rows, measurements(rows), environment)
    print(f"\n{table(rows)}")


def measure(number: int, name: str, repeats: int) -> Row:
    """Measure the CPU seconds to trace an optimizer's step, and to plan its kernels after that."""
    optimizer = OPTIMIZERS[name]
    params = jax.eval_shape(optimizer.prepare, leaves([(4,)] * number))
    arguments = (params, state_of(optimizer.tx, params), trained(params), {})
    trace_seconds: list[float] = []
    plan_seconds: list[float] = []
    for _ in range(repeats):
        jax.clear_caches()
        compiler = Compiler(whole_step(optimizer.tx), in_place=2)
        begin = time.process_time()
        compiler.trace(arguments)
        traced = time.process_time()
        compiler(arguments, TRITON, {})  # does not trace again
        trace_seconds.append(traced - begin)
        plan_seconds.append(time.process_time() - traced)
    return {"trace_s": trace_seconds, "plan_s": plan_seconds}


def table(rows: Mapping[str, Row]) -> str:
    """Return a table of the medians, and their ratio."""
    medians = {
        case: (statistics.median(row["trace_s"]), statistics.median(row["plan_s"]))
        for case, row in rows.items()
    }
    return report.table(
        [
            {
                "case": case,
                "trace the chain (s)": f"{trace:.2f}",
                "plan its kernels (s)": f"{plan:.2f}",
                "plan / trace": f"{plan / trace:.2f}",
            }
            for case, (trace, plan) in medians.items()
        ]
    )


def measurements(rows: Mapping[str, Row]) -> Iterator[Measurement]:
    """Yield the measurements of the rows for the history."""
    for case, row in rows.items():
        for key, seconds in row.items():
            spread = interquartile_range(seconds)
            yield Measurement("trace", f"{case}, {key}", "s", statistics.median(seconds), spread)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("trace", __doc__)
    parser.add_argument(
        "--leaves", nargs="+", type=int, default=LEAVES, metavar="N", help="numbers of leaves"
    )
    command_line.add_optimizers(parser, DEFAULT_OPTIMIZERS)
    command_line.add_repeats(parser, REPEATS)
    return parser
