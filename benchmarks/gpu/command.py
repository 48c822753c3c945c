"""Measurements of steps on an NVIDIA GPU within minutes, the most important ones first.

The command compares fused steps with their chains and with float64. Then it measures the bandwidth
of a copy, and the times of steps with XLA, Triton and Mosaic, with and without CUDA graphs.
PyTorch's AdamW is a further baseline if PyTorch is installed. Each result is written as soon as it
is known. The exit status is 1 if any result is wrong or any step fails.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line, history, latest, peers
from benchmarks.contenders import WAYS
from benchmarks.gpu.figures import figures
from benchmarks.gpu.report import failed, report, summary
from benchmarks.gpu.supervise import supervise
from benchmarks.gpu.tasks import Case, Job, by_worth
from benchmarks.latest import Row
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.peers import PEERS

BENCHMARK = "gpu"
PACKAGES = ("jax", "optax", "torch")
# The remaining half minute is for processes that start and end.
MINUTES = 8.5


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the selected cases until the time is over; all cases by default."""
    deadline = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(argv)
    # Otherwise JAX allocates most of the GPU's memory in every process, and PyTorch has none left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        device = command_line.find_device("gpu")
        options.out.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:
        parser.error(f"needs an NVIDIA GPU: {error}")
    except OSError as error:
        parser.error(str(error))
    # The processes that measure need the GPU, and the CPU for float64.
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"

    baselines = [name for name in peers.installed() if PEERS[name].package == "torch"]
    tasks = by_worth(options.sets, options.optimizers, baselines, list(WAYS))
    job = Job(tuple(tasks), {name: LEAF_SETS[name] for name in options.sets})
    deadline += 60 * options.minutes
    sys.exit(run(job, device, options.out, deadline=deadline, resume=options.resume))


def run(
    job: Job,
    device: Any,
    folder: Path,
    *,
    deadline: float,
    resume: bool = False,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> int:
    """Run a job and write its results; return 1 if any case failed, otherwise 0.

    Args:
      job: the job with all tasks.
      device: the JAX device that is measured.
      folder: the folder for results.
      deadline: the time on the clock at which the run ends.
      resume: whether to skip cases that the folder has from the same code on the same device.
      clock: returns the time in seconds.
      **options: options of `supervise`.
    """
    begin = clock()
    path = latest.path(folder, BENCHMARK, kind_of(device))
    shared = circumstances(device)
    missing = [case for task in job.tasks for case in task.cases]
    planned = {str(case) for case in missing}
    if resume:
        known = latest.load(path)
        missing = [case for case in missing if not stands(known.get(str(case)), shared)]
        tasks = (task.only(missing) for task in job.tasks)
        job = dataclasses.replace(job, tasks=tuple(task for task in tasks if task.cases))
    print(shared.device, *map(" ".join, shared.versions.items()), sep=", ", flush=True)

    def record(case: Case, found: Mapping[str, Any]) -> None:
        row = figures(case, found)
        missing.remove(case)
        rows = {str(case): row}
        latest.save(path, rows, latest.step_times(BENCHMARK, rows), shared)
        print(f"{clock() - begin:5.0f} s  {case}: {in_words(row)}", flush=True)
        write()

    def write() -> None:
        text = report(latest.load(path), shared, missing)
        path.with_suffix(".md").write_text(text, encoding="utf-8")

    error = None
    try:
        supervise(job, record, deadline=deadline, clock=clock, **options)
    except RuntimeError as nothing:
        error = nothing
    write()
    rows = {case: row for case, row in latest.load(path).items() if case in planned}
    print(f"\n{summary(rows, missing)}\n{error or ''}", flush=True)
    return 1 if error or failed(rows) else 0


def stands(row: Row | None, shared: history.Circumstances) -> bool:
    """Return whether a row passed with the same code, versions and device."""
    if row is None or not row["passed"]:
        return False
    expected = dataclasses.asdict(shared)
    return all(row[key] == expected[key] for key in ("commit", "device", "versions"))


def kind_of(device: Any) -> str:
    """Return the kind of a device in the form of a file name."""
    return device.device_kind.removeprefix("NVIDIA ").lower().replace(" ", "-")


def circumstances(device: Any) -> history.Circumstances:
    """Return the environment of this run, with the version of the driver."""
    found = history.circumstances(history.describe(device), PACKAGES)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return found
    first, *_ = driver.stdout.split() or [""]
    return dataclasses.replace(found, versions=found.versions | {"driver": first})


def in_words(row: Row) -> str:
    """Format a row as a line of the log."""
    if "error" in row:
        return row["error"]
    shown = (
        ("to_chain", "differs from the chain by {:.1e}"),
        ("to_float64", "differs from float64 by {:.1e}"),
        ("median_ms", "{:.3g} ms"),
        ("gb_per_s", "{:.0f} GB/s"),
        ("of_copy", "{:.0%} of copy"),
        ("drift", "drifts from the chain by {:.0e}"),
    )
    known = (text.format(row[key]) for key, text in shown if row.get(key) is not None)
    return ", ".join([*known, *([] if row["passed"] else ["WRONG"])])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser(BENCHMARK, __doc__)
    command_line.add_sets(parser)
    command_line.add_optimizers(parser)
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"time limit of the measurements (default: {MINUTES})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip cases that FOLDER already has from the same code, versions and device",
    )
    return parser
