"""The one entry point: `python -m benchmarks NAME`, and `python -m benchmarks list`."""

import argparse
import importlib
import textwrap
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A module of this package with a `main` that reads the command line.

    Attributes:
      measures: what it measures.
      why: it is worth knowing.
    """

    measures: str
    why: str


BENCHMARKS = {
    "plan": Benchmark(
        "launches, bytes per parameter, temporary memory and compile time of steps compiled for an"
        " H200, chain beside fused, or for a TPU v5e; of many, what each holds and is told; none is"
        " needed",
        "what can't be timed here can be counted: a copy, a pass over the parameters or a launch"
        " per leaf too many shows in the compiled program, and fails",
    ),
    "memory": Benchmark(
        "what each optimizer holds for a parameter, with options that make it less, on the device"
        " and in the host's memory, read off steps compiled for a TPU v5e; none is needed",
        "memory decides which model can be trained: what an option saves should be known before",
    ),
    "step": Benchmark(
        "time of one step, update and application in place, on the parameters of known networks:"
        " every method beside optax.adamw, a copy, and PyTorch where it is installed",
        "a step moves bytes, so the time for a byte is what an implementation can lose: to adamw's,"
        " and to what the memory can do",
    ),
    "train": Benchmark(
        "time of a whole training step of a convolutional network and of a transformer, with every"
        " method, beside the gradient alone and the optimizer alone",
        "an optimizer twice as slow is nothing where it takes a hundredth of the step: this says"
        " what it takes",
    ),
    "scaling": Benchmark(
        "time of one step, and time to compile it, against the number of leaves and of parameters:"
        " a few methods beside optax.adamw",
        "launches and calls cost by the leaf and bytes by the parameter: where one gives way to the"
        " other, and what a network of many leaves costs to compile",
    ),
    "gpu": Benchmark(
        "on an NVIDIA GPU, within minutes: fused steps against their chains and float64, a copy's"
        " bandwidth, times of all steps by XLA, Triton and Mosaic, with CUDA graphs and without",
        "kernels are there to be faster, and right; a GPU may be at hand for minutes only, so one"
        " command does all of it, what matters most first",
    ),
    "summary": Benchmark(
        "nothing: draws the figures and fills README's table from the results that there are",
        "what is shown is what was measured",
    ),
}


def main() -> None:
    """Runs the benchmark that the command line names, with the options that follow the name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=["list", *BENCHMARKS], help="list: what each is, and why")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see NAME --help")
    chosen = parser.parse_args()
    if chosen.name == "list":
        print("\n\n".join(map(describe, BENCHMARKS)))
        return
    importlib.import_module(f"benchmarks.{chosen.name}").main(chosen.options)


def describe(name: str) -> str:
    """A benchmark's name, what it measures, and why."""
    indented = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([name, *map(indented.fill, BENCHMARKS[name])])


if __name__ == "__main__":
    main()
