"""The entry point: `python -m benchmarks list` and `python -m benchmarks NAME`."""

import argparse
import importlib
import textwrap
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A module of this package with a `main` that reads the command line.

    Attributes:
      measures: the quantities that it measures.
      why: the reason to measure them.
    """

    measures: str
    why: str


BENCHMARKS = {
    "compiled": Benchmark(
        "Counts launches, bytes per parameter and temporary memory of compiled steps, and measures"
        " the time to compile them. Compares the chain with the fused steps on an H200, or compiles"
        " the chain for a TPU v5e. For many devices, counts the memory and communication of each"
        " device. Needs no GPU or TPU.",
        "A step can be counted where it can't be timed. An unnecessary copy, a second pass over the"
        " parameters or a launch for each leaf shows in the compiled program, and the command"
        " fails.",
    ),
    "memory": Benchmark(
        "Counts the bytes per parameter of each optimizer's state and temporary arrays, in device"
        " memory and in host memory, with and without the options that save memory. Reads them from"
        " steps compiled for a TPU v5e. Needs no TPU.",
        "Memory decides which model can be trained. A user wants to know in advance how much an"
        " option saves.",
    ),
    "step": Benchmark(
        "Times one step of every method on a CPU, the update and its application in place, on the"
        " parameters of known networks. The baselines are optax.adamw, a copy of an array, and"
        " PyTorch's optimizers where they are installed.",
        "The time of a step is the time to move its bytes. The time per byte, compared with adamw"
        " and with a copy, shows how much an implementation loses.",
    ),
    "train": Benchmark(
        "Times whole training steps of a convolutional network and of a transformer with every"
        " method, and also the gradient alone and the optimizer alone.",
        "A slow optimizer matters only if it takes a large share of the training step. This"
        " measures the share.",
    ),
    "scaling": Benchmark(
        "Times one step on a CPU, and its compilation, for several numbers of leaves and of"
        " parameters. Compares a few methods with optax.adamw.",
        "The cost of launches and calls grows with the number of leaves, the cost of memory traffic"
        " with the number of parameters. This shows which of them dominates at which size, and how"
        " long a network of many leaves takes to compile.",
    ),
    "trace": Benchmark(
        "Times `fuse` before XLA compiles anything: the trace of the chain, and the plan of its"
        " kernels, for several numbers of leaves.",
        "Networks without stacked layers have thousands of leaves. Planning must take little"
        " compared with the trace, which a chain needs without kernels too.",
    ),
    "gpu": Benchmark(
        "Compares fused steps with their chains and with float64 on an NVIDIA GPU. Then measures"
        " the times of steps by XLA, Triton and Mosaic, with and without CUDA graphs, in turns with"
        " a copy. Takes a few minutes.",
        "Kernels must be correct, and faster than XLA. A GPU may be available for minutes only, so"
        " one command measures everything, the most important results first.",
    ),
    "summary": Benchmark(
        "Measures nothing. Draws the figures and fills the tables of the pages in docs/ from the"
        " recorded results.",
        "The figures and tables then always agree with the results.",
    ),
}


def main() -> None:
    """Run the benchmark that the command line names, with the options that follow the name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=["list", *BENCHMARKS], help="list: describe each of them")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see `NAME --help`")
    chosen = parser.parse_args()
    if chosen.name == "list":
        print("\n\n".join(map(describe, BENCHMARKS)))
        return
    importlib.import_module(f"benchmarks.{chosen.name}").main(chosen.options)


def describe(name: str) -> str:
    """Return the name of a benchmark, what it measures, and why."""
    indented = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([name, *map(indented.fill, BENCHMARKS[name])])


if __name__ == "__main__":
    main()
