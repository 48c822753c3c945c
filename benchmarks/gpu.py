"""Fused steps on an NVIDIA GPU within minutes: numerics first, then times by importance.

Each leaf set and backend has its own process with a time limit. The process appends a row to a file
of JSON lines as soon as the row is known. If it crashes or hangs, its missing cases become rows
with that error. The exit status is 1 if any case fails.

`--backends interpret` runs interpreted kernels on smaller leaves, on a CPU. It tests this command;
its times mean nothing.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import command_line, gpu_process, results
from benchmarks.gpu_process import INTERPRETED, NARROW, NUMERICS, TORCH, Case, Row
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import MOSAIC, OPTIMIZERS, REFERENCE, TRITON
from benchmarks.report import table
from benchmarks.results import Environment
from benchmarks.shapes import count, in_words

PACKAGES = ("jax", "jaxlib", "optax", "torch")
KERNELS = (TRITON, MOSAIC)
ONE_LEAF, RESNET, MANY_LEAVES = "one of 4096 × 4096", "ResNet-50", "1000 of 64 KB"
# First a network of many leaves, which has targets; then a set that compiles at once. The last set
# takes so long to compile that only adamw is measured.
SETS_BY_WORTH = (NUMERICS, RESNET, ONE_LEAF, "GPT-2 124M", "ViT-B/16", MANY_LEAVES)
OPTIMIZERS_BY_WORTH = (
    *(REFERENCE, "clip + adamw", "lamb", "novak", "novak, trust ratio"),
    *("adamw, 8 bits", "adamw, 8 bits, bfloat16"),
)
MINUTES, PROCESS_SECONDS = 8.5, 180.0
CACHE = "optax-ext-gpu-programs"
COMMAND = (sys.executable, "-m", "benchmarks.gpu_process")
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the selected cases until the time is over."""
    begin, parser = time.monotonic(), make_parser()
    options = parser.parse_args(argv)
    deadline = begin + 60 * options.minutes
    if options.smoke:
        options.sets, options.optimizers = [NUMERICS, ONE_LEAF], [REFERENCE]
    platform = "cpu" if set(options.backends) == {INTERPRETED} else "gpu"
    os.environ["JAX_PLATFORMS"] = "cpu" if platform == "cpu" else "cuda,cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for PyTorch
    # Each chain is compiled once, and `--resume` continues where a process ran out of time.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / CACHE)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        run = Run(options.out, find_device(platform))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        parser.error(str(error))
    jobs = list(jobs_by_worth(options.sets, options.optimizers, options.backends))
    sys.exit(run(jobs, deadline, resume=options.resume))


def jobs_by_worth(
    sets: Sequence[str], optimizers: Sequence[str], backends: Sequence[str]
) -> Iterator[list[Case]]:
    """Yield the cases of each process, ordered by the value of their results."""
    optimizers = sorted(optimizers, key=[*OPTIMIZERS_BY_WORTH, *OPTIMIZERS].index)
    for leaf_set in (x for x in SETS_BY_WORTH if x in sets):
        for backend in backends:
            only_adamw = backend == TORCH or leaf_set == MANY_LEAVES
            names = [x for x in optimizers if x == REFERENCE or not only_adamw]
            if leaf_set != NUMERICS:
                graphs = (True,) if backend == TORCH else (True, False)
                cases = [Case(leaf_set, x, backend, y) for x in names for y in graphs]
            else:
                narrow = [Case(NARROW, x, backend) for x in names if x == REFERENCE]
                cases = [*(Case(NUMERICS, x, backend) for x in names), *narrow]
            if cases and (leaf_set, backend) != (NUMERICS, TORCH):
                yield cases


def find_device(platform: str) -> Row:
    """Return the device and the bandwidth of a copy, from a process of their own."""
    command = [*COMMAND, json.dumps({"probe": platform})]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PROCESS_SECONDS
    )
    if found.returncode:
        raise RuntimeError(f"needs an NVIDIA GPU: {found.stderr.strip()[-300:]}")
    return json.loads(found.stdout.splitlines()[-1])


def driver_version() -> dict[str, str]:
    """Return the version of the GPU's driver if nvidia-smi reports it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = found.stdout.splitlines()
    return {"driver": lines[0]} if lines else {}


class Run:
    """One run of the command: starts the processes, and writes the rows that they leave out.

    Args:
      folder: the folder for results.
      device: the result of `find_device`.
      command: the command that measures a job.
    """

    def __init__(self, folder: Path, device: Row, command: Sequence[str] = COMMAND):
        kind = device["kind"].removeprefix("NVIDIA ").lower().replace(" ", "-")
        self.path = folder.resolve() / f"gpu-{kind}.jsonl"
        found = Environment.of(device["device"], PACKAGES)
        self.environment = dataclasses.replace(found, versions=found.versions | driver_version())
        self.shared = dataclasses.asdict(self.environment)
        self.bandwidth, self.command = device["bandwidth"], command
        self.begin = len(load(self.path))

    def __call__(
        self, jobs: Sequence[Sequence[Case]], deadline: float, *, resume: bool = False
    ) -> int:
        """Run all jobs until the deadline; return 1 if any case failed, otherwise 0."""
        planned = [case for cases in jobs for case in cases]
        passed = {case for case, row in self.rows().items() if row["passed"] and resume}
        missing = [case for case in planned if str(case) not in passed]
        for cases in jobs:
            left = [case for case in cases if case in missing]
            while left and time.monotonic() < deadline:
                left = self.measure(left, deadline)
            measured = passed | {row["case"] for row in load(self.path)[self.begin :]}
            missing = [case for case in planned if str(case) not in measured]
            text = report(self.rows(), missing, self.environment, self.bandwidth)
            self.path.with_suffix(".md").write_text(text, encoding="utf-8")
        rows = self.rows()
        print(f"\n{summary(rows, missing)}", flush=True)
        return int(not all(rows[str(x)]["passed"] for x in planned if x not in missing))

    def rows(self) -> dict[str, Row]:
        """Return the last row of each case with the same code, device and versions."""
        keys = ("commit", "device", "versions")
        rows = (row for row in load(self.path) if all(row[x] == self.shared[x] for x in keys))
        return {row["case"]: row for row in rows}

    def measure(self, cases: Sequence[Case], deadline: float) -> list[Case]:
        """Run a process for these cases; return the cases for the next process.

        If a process crashes, its current case has failed, and the next process measures the rest.
        If a process takes too long, all its missing cases have failed.
        """
        before, left = len(load(self.path)), deadline - time.monotonic()
        job = {"path": str(self.path), "environment": self.shared, "bandwidth": self.bandwidth}
        command = [*self.command, json.dumps(job | {"cases": cases})]
        limit, code = min(PROCESS_SECONDS, left), 0
        try:
            code = subprocess.run(command, cwd=ROOT, check=False, timeout=limit).returncode
            reason = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"its process took more than {limit:.0f} s"
        rows = load(self.path)[before:]
        measured = {row["case"] for row in rows}
        missing = [case for case in cases if str(case) not in measured]
        # A process that has no more time says nothing about the cases that it did not reach.
        failed = [] if limit == left and not code else missing[:1] if code else missing
        if code == gpu_process.BROKEN:  # the failed case has a row
            failed = []
        for case in failed:
            gpu_process.append(self.path, case, gpu_process.failure(reason), self.shared)
        right = {
            row["case"]: row for row in rows if row["passed"] and row["backend"] != INTERPRETED
        }
        times = results.step_times("gpu", right)
        results.append_history(self.path.parent, times, self.environment)
        return [case for case in missing if case not in failed] if code else []


def load(path: Path) -> list[Row]:
    """Return all rows of a file, in the order in which they were written."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Target(NamedTuple):
    """A number to compute from a row (`None` if it does not apply), and its lower limit."""

    text: str
    least: float
    number: Callable[[Row], float | None]


def _on_large_sets(row: Row) -> float | None:
    return row["of_copy"] if count(LEAF_SETS[row["leaf_set"]]) > 1e8 else None


def _on_resnet(row: Row, *, graphs: bool) -> float | None:
    return row["speed_up"] if (row["leaf_set"], row["graphs"]) == (RESNET, graphs) else None


TARGETS = (
    Target("bandwidth relative to a copy, over 1e8 parameters", 0.9, _on_large_sets),
    Target("speed-up of all steps", 0.97, lambda row: row["speed_up"]),
    Target(f"speed-up on {RESNET} without graphs", 2.0, lambda x: _on_resnet(x, graphs=False)),
    Target(f"speed-up on {RESNET} with graphs", 0.0, lambda x: _on_resnet(x, graphs=True)),
)


def verdict(target: Target, backend: str, rows: Mapping[str, Row]) -> str:
    """Describe whether all steps by this backend reach the target, and name the worst case."""
    right = (row for row in rows.values() if row["passed"] and row["backend"] == backend)
    timed = (row for row in right if row.get("speed_up"))
    found = sorted((x, row["case"]) for row in timed if (x := target.number(row)) is not None)
    if not found:
        return "not measured"
    (worst, case), (best, _), missed = found[0], found[-1], sum(x < target.least for x, _ in found)
    word = f"**missed** by {missed}" if missed else "met" if target.least else "measured"
    return f"{word}: {worst:.2f} to {best:.2f} in {len(found)} cases, least on {case}"


NOTES = """\
- chain_ms, median_ms: the median time of a step of the chain by XLA, and of the fused step. With
  torch, they are optax.adamw and PyTorch's AdamW in a CUDA graph. spread_ms: the interquartile
  range. Steps run in a loop inside of one program. All programs of a row take turns with a copy.
- speed_up: the time of the chain, divided by that of the fused step.
- of_copy: the bytes that a fused step must move, divided by its time, relative to the bandwidth of
  the copy, copy_gb_per_s.
- to_adamw_per_byte: the time per byte, relative to optax.adamw by XLA with graphs.
- drift: the difference from the chain's parameters after a call, relative to their movement.
- graphs: whether XLA may use CUDA graphs. It uses them for five launches or more.
- to_chain, to_chain_narrow, to_float64: the largest difference after a step from the chain's state,
  relative to the largest value of the array. narrow: arrays in fewer bits than float32; changed:
  the share of their values that differ. other_bits: how many of 20 repeats differ in any bit.
- by_xla: the components that XLA computes, because the backend has no kernel for them."""

TIMED = (
    *("optimizer", "backend", "graphs", "chain_ms", "median_ms", "spread_ms", "speed_up"),
    *("of_copy", "copy_gb_per_s", "to_adamw_per_byte", "drift"),
)
COMPARED = (
    *("leaf_set", "optimizer", "backend", "to_chain", "to_chain_narrow", "changed"),
    *("to_float64", "chain_to_float64", "other_bits", "by_xla"),
)


def report(
    rows: Mapping[str, Row],
    missing: Iterable[Case],
    environment: Environment,
    bandwidth: float,
) -> str:
    """Return the whole report in Markdown."""
    sets = {
        f"{leaf_set}: {in_words(shapes)}": _table(TIMED, of_set)
        for leaf_set, shapes in LEAF_SETS.items()
        if (of_set := [row for row in rows.values() if row["leaf_set"] == leaf_set])
    }
    return "\n\n".join(
        [
            "# Fused steps on a GPU",
            f"{environment.date}, commit {environment.commit or 'unknown'}, {environment}",
            f"A copy moves {bandwidth / 1e9:.0f} GB/s.",
            summary(rows, missing),
            NOTES,
            _sections(sets) + "\n",
        ]
    )


def summary(rows: Mapping[str, Row], missing: Iterable[Case]) -> str:
    """Return the first part of the report: targets, numerics, failed and missing cases."""
    targets = [
        {"target": x.text, "at least": _cell(x.least or None)}
        | {backend: verdict(x, backend, rows) for backend in KERNELS}
        for x in TARGETS
    ]
    compared = [row for row in rows.values() if row["leaf_set"] not in LEAF_SETS]
    wrong = [(case, row) for case, row in rows.items() if not row["passed"]]
    return _sections(
        {
            "Targets": table(targets),
            "Numerics": _table(COMPARED, compared),
            "Failed": "\n".join(f"- {x}: {y.get('error', 'wrong numbers')}" for x, y in wrong),
            "Not measured": "\n".join(f"- {case}" for case in missing),
        }
    )


def _sections(sections: Mapping[str, str]) -> str:
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)


def _table(keys: Sequence[str], rows: Sequence[Row]) -> str:
    return table([{key: _cell(row.get(key)) for key in keys} for row in rows])


def _cell(x: object) -> str:
    return "–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("gpu", __doc__)
    smoke = "measure adamw only: its numerics, and its time on one large leaf"
    parser.add_argument("--smoke", action="store_true", help=smoke)
    command_line.add_choices(parser, "--sets", SETS_BY_WORTH)
    command_line.add_optimizers(parser, OPTIMIZERS_BY_WORTH)
    command_line.add_choices(
        parser,
        "--backends",
        (*KERNELS, TORCH, INTERPRETED),
        [*KERNELS, *([TORCH] if importlib.util.find_spec(TORCH) else [])],
        by_default="triton and mosaic, and torch if it is installed",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"time limit (default: {MINUTES})"
    )
    resume = "skip cases that passed with the same commit, device and versions"
    parser.add_argument("--resume", action="store_true", help=resume)
    return parser
