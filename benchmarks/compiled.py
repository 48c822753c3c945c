"""Compiled steps of the optimizers, for an H200 or a TPU, compared with the recorded figures.

No GPU or TPU is needed. The command fails if a program launches more kernels, moves more bytes or
needs more memory than the recorded figures say, and prints the name of that program. Only --record
changes the recorded figures. It replaces the rows that it measures and keeps the others; each row
has a date and versions.

With --topology, the leaves are sharded across several devices, and all figures are per device. The
figures then include the memory of each device and the communication between the devices.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import optax
from rich.progress import track

from benchmarks import RESULTS, command_line, compiled_report, results
from benchmarks.aot import H200, V5E, Program, Target, compile_step
from benchmarks.command_line import quoted
from benchmarks.compiled_figures import Change, changes
from benchmarks.leaf_sets import COMPILED_SETS, SHARDED_SETS
from benchmarks.optimizers import BACKENDS, EXPLAINED, XLA
from benchmarks.results import Environment, Measurement, Row
from benchmarks.shapes import (
    Leaves,
    count,
    leaves,
    prepared,
    shardings,
    shards,
    size,
    state_of,
)
from benchmarks.timing import Times
from pallas_kernels import explain, fuse

# The recorded time is the shortest of these rounds.
RECORDED_ROUNDS = 2


class Device(NamedTuple):
    """A choice of the option `--device`.

    Attributes:
      target: the device to compile for.
      backends: the backends of `fuse` that it has.
      packages: the packages whose versions identify the compiler.
    """

    target: Target
    backends: tuple[str, ...]
    packages: tuple[str, ...]


DEVICES = {
    "h200-aot": Device(H200, BACKENDS, ("jax", "optax")),
    # On a TPU, the fused step is the chain.
    "tpu-aot": Device(V5E, (XLA,), ("jax", "libtpu", "optax")),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the selected cases with the recorded figures, or record them."""
    run, found = Run(read(argv)), {}
    print(run.environment)
    run.warm_up()
    for leaf_set, names in run.options.cases.items():
        rows = []
        for name in track(names, leaf_set, transient=True):
            row, changed = run.measure(leaf_set, name)
            rows.append(row)
            found |= {f"{leaf_set} / {name}, {change}": change for change in changed}
        print(f"\n{compiled_report.title(leaf_set)}\n\n{compiled_report.table(rows)}\n")
    notes = compiled_report.SHARDED_NOTES if run.options.topology else ""
    print(compiled_report.NOTES + notes)
    conclude(found, run.options)


def conclude(found: Mapping[str, Change], options: argparse.Namespace) -> None:
    """Print the differences from the recorded figures; exit with 1 if a figure is worse."""
    better = [text for text, change in found.items() if not change.worse]
    worse = [text for text, change in found.items() if change.worse]
    if better:
        print("Figures below the recorded ones:", *better, sep="\n  ")
    if worse:
        print("Figures above the recorded ones:", *worse, sep="\n  ")
    if worse and not options.record:
        sys.exit(1)
    programs = sum(map(len, options.cases.values())) * len(options.backends)
    outcome = "recorded" if options.record else "no figure is above the recorded one"
    print(f"{options.device}: {programs} programs, {outcome}")


class Run:
    """A run that compiles steps for one target and compares or replaces the recorded rows."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.target = options, options.target
        self.rows = results.load(recorded(options))
        self.environment = Environment.of(
            f"compiled for {self.target.name}", DEVICES[options.device].packages
        )

    def warm_up(self) -> None:
        """Compile a small step, so that no case includes the start of the compiler."""
        measure(EXPLAINED["lamb"].tx, leaves([(64, 64)]), self.target, self.options.backends)

    def measure(self, leaf_set: str, name: str) -> tuple[Row, list[Change]]:
        """Measure a row and its changes from the recorded row; replace that row with `--record`."""
        case, optimizer = f"{leaf_set} / {name}", EXPLAINED[name]
        rounds = RECORDED_ROUNDS if self.options.record and not self.options.topology else 1
        params = prepared(optimizer.prepare, leaves_of(leaf_set, self.target))
        row = {"optimizer": name}
        row |= measure(optimizer.tx, params, self.target, self.options.backends, rounds)
        changed = list(changes(self.rows.get(case, {}), row, shards(params)))
        if self.options.record:
            versions = ", ".join(map(" ".join, self.environment.versions.items()))
            self.rows[case] = row | {"date": self.environment.date, "versions": versions}
            self.save(case)
        return row, changed

    def save(self, case: str) -> None:
        """Write all rows, and append the compile times of one case, if any, to the history."""
        path = recorded(self.options)
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write(path, self.rows)
        text = compiled_report.markdown(self.options.device, self.rows, self.options.topology)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        # Counts are exact, so only times go to the history. Sharded steps have none.
        times = {
            backend: Times(tuple(self.rows[case][backend]["compile"]))
            for backend in ([] if self.options.topology else self.options.backends)
        }
        measurements = [
            Measurement("compiled", f"{case}, {backend}", "s", x.median, x.spread)
            for backend, x in times.items()
        ]
        results.append_history(path.parent, measurements, self.environment)


def measure(
    tx: optax.GradientTransformation,
    params: Leaves,
    target: Target,
    backends: Sequence[str],
    rounds: int = 1,
) -> Row:
    """Compile an optimizer's step on a set of leaves by several backends, in turns."""
    state, placed = state_of(tx, params), shardings(params)
    parameters, report = count(shards(params)), explain(tx, shards(params))
    row: Row = {"floor": report.floor_per_parameter}
    if target.platform == "gpu":
        row["skipped"] = sum(phase.skipped for phase in report.phases) / parameters
    if placed:
        devices = len(target.devices())
        row |= {"ideal": size((params, state)) / devices, "gradients": size(params) / devices}
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    for _ in range(rounds):
        for backend in backends:
            step = fuse(tx, backend=backend, shardings=placed).step
            program = compile_step(step, params, state, target)
            seconds[backend].append(round(program.cpu_seconds, 2))
            row[backend] = {
                "kernels": program.launches,
                "pallas": len(program.of_kind("pallas")),
                "bytes": program.bytes / parameters,
                "temporary": program.temporary / (4 * parameters),
                **(among_devices(program) if placed else {"compile": seconds[backend]}),
            }
    return row


def among_devices(program: Program) -> Row:
    """Return the per-device memory and communication.

    For each kind of collective, `kinds` has the number of collectives and of elements.
    """
    kinds: dict[str, list[int]] = {}
    for collective in program.collectives:
        found = kinds.setdefault(collective.kind, [0, 0])
        found[0] += 1
        found[1] += collective.elements
    row = {
        "memory": program.arguments + program.temporary,
        "collectives": len(program.collectives),
        "communication": sum(collective.bytes for collective in program.collectives),
        "kinds": kinds,
    }
    if program.reserved is not None:
        row |= {"reserved": program.reserved, "code": program.code}
    return row


def leaves_of(leaf_set: str, target: Target) -> Leaves:
    """Return a set of leaves by name, sharded on the target's devices if it is a sharded set."""
    if leaf_set in SHARDED_SETS:
        return SHARDED_SETS[leaf_set].on(target.devices())
    return COMPILED_SETS[leaf_set]


def recorded(options: argparse.Namespace) -> Path:
    """Return the path of the recorded figures."""
    where = filter(None, [options.device, options.topology])
    return results.path(options.out, "compiled", "-".join(where).replace(":", "-"))


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message if the options are invalid."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    sets = SHARDED_SETS if options.topology else COMPILED_SETS
    if message := contradiction(options, device, sets):
        parser.error(message)
    options.target = device.target.on(options.topology) if options.topology else device.target
    try:
        options.target.devices()
    except RuntimeError as error:
        parser.error(f"--topology {options.topology}: {error}")
    options.backends = [x for x in device.backends if x in (options.backends or device.backends)]
    rows = results.load(recorded(options))
    names = options.optimizers or list(EXPLAINED)
    options.cases = dict.fromkeys(options.sets or sets, names)
    if not (options.record or options.sets or options.optimizers):
        known = {x: [n for n in names if f"{x} / {n}" in rows] for x in options.cases}
        known = {leaf_set: names for leaf_set, names in known.items() if names}
        options.cases = known or options.cases
    if not options.record and (unknown := list(unrecorded(options, rows))):
        parser.error("\n".join(["cases without recorded figures; to record them:", *unknown]))
    return options


def contradiction(options: argparse.Namespace, device: Device, sets: Collection[str]) -> str | None:
    """Return the reason why the options are invalid, or `None` if they are valid.

    Args:
      options: the parsed options.
      device: the device that they name.
      sets: the sets of leaves that are available for the device.
    """
    if unknown := [x for x in options.backends if x not in device.backends]:
        return f"{options.device} has the backends {quoted(device.backends)}, not {quoted(unknown)}"
    if options.record and options.backends and len({*options.backends}) < len(device.backends):
        return "--record needs all backends of the device: leave out --backends"
    if unknown := [name for name in options.sets if name not in sets]:
        kind = "a --topology" if options.topology else "one device"
        return f"the sets for {kind} are {quoted(sets)}, not {quoted(unknown)}"
    if options.record and options.topology and not options.sets:
        return f"--record with a --topology needs --sets: one or more of {quoted(sets)}"
    if device.target.missing():
        return f"{options.device} needs the extra `aot`, which is not installed"
    return None


def unrecorded(options: argparse.Namespace, rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield commands that record the selected cases without recorded figures."""
    for leaf_set, selected in options.cases.items():
        names = [name for name in selected if f"{leaf_set} / {name}" not in rows]
        words = ["python", "-m", "benchmarks", "compiled", "--record", "--device", options.device]
        words += ["--topology", options.topology] if options.topology else []
        words += ["--out", str(options.out)] if options.out != RESULTS else []
        if names:
            yield shlex.join([*words, "--sets", leaf_set, "--optimizers", *names])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser("compiled", __doc__)
    parser.add_argument(
        "--device", choices=DEVICES, default="h200-aot", help="default: %(default)s"
    )
    parser.add_argument(
        "--topology",
        metavar="SHAPE",
        help="several devices: v5e:16x16 for TPU chips, 1x1x8 (partitions, hosts, GPUs) for H200",
    )
    recorded = {"default": (), "by_default": "all recorded cases"}
    command_line.add_choices(parser, "--sets", [*COMPILED_SETS, *SHARDED_SETS], **recorded)
    command_line.add_choices(parser, "--optimizers", EXPLAINED, **recorded)
    command_line.add_choices(
        parser, "--backends", BACKENDS, (), by_default="all backends of the device"
    )
    parser.add_argument(
        "--record", action="store_true", help="replace the recorded figures in the folder --out"
    )
    return parser
