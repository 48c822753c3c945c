"""The results as a printed table and as JSON."""

import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import flax
import jax
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from _data import Dataset
from _training import BATCH_SIZE, Curves, Plan, draw_batches, make_network

# Share of the validation images.
TARGET = 0.95
VERSIONS = {module.__name__: module.__version__ for module in (jax, flax, optax)}


class Result(NamedTuple):
    """The result of one contender.

    Attributes:
      label: its name.
      controls: the method that it is a control of.
      rate: the learning rate chosen.
      scores: validation accuracy at each rate tried; empty where the rate was given.
      curves: of all seeds at the chosen rate.
      seconds_per_step: of one run.
    """

    label: str
    controls: str | None
    rate: float
    scores: Mapping[float, float]
    curves: Curves
    seconds_per_step: float = math.nan

    @property
    def at_edge(self) -> bool:
        return len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


def print_header(data: Dataset, plan: Plan) -> None:
    _, height, width, channels = data.train.images.shape
    parts = data.train, data.validation, data.test
    train, validation, test = (len(part.labels) for part in parts)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(make_network(data)[1]))
    steps = draw_batches(0, train, plan.epochs)[..., 0].size
    rows = {
        "Images": f"{data.name}, {train + validation + test} of {height} × {width} × {channels} in"
        f" {data.classes} classes: {train} to train, {validation} to validate, {test} to test",
        "Network": f"4 convolutions and a dense layer, {parameters} parameters, no skips",
        "Training": f"{plan.epochs} epochs, {steps} steps of {min(BATCH_SIZE, train)} images;"
        f" {plan.trials} rates tried by each, then {plan.seeds} seeds at the best",
        "Software": ", ".join(f"{name} {version}" for name, version in VERSIONS.items()),
        "Hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
    }
    if plan.fused:
        platform = jax.default_backend()
        here = "runs kernels" if platform == "gpu" else "runs the chains themselves"
        rows["Fused"] = f"by pallas_kernels.fuse, which on this {platform} {here}; runs take turns"
    for name, text in rows.items():
        print(textwrap.fill(f"{name + ':':<10}{text}", 80, subsequent_indent=" " * 10))
    print()


def print_table(results: Mapping[str, Result], data: Dataset) -> None:
    table = Table(box=SIMPLE_HEAD, caption=_notes(results, data), caption_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for name in ("test accuracy", f"steps to {TARGET:.0%}", "ms/step", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results.values():
        percent = 100 * result.curves.test
        deviation = percent.std(ddof=1) if len(percent) > 1 else 0.0
        table.add_row(
            f"  ({result.label})" if result.controls else result.label,
            f"{percent.mean():.1f} ± {deviation:.1f} %",
            _mean_steps(result.curves.steps_to(TARGET)),
            f"{1e3 * result.seconds_per_step:.2f}",
            f"{result.rate:.2g}{'*' if result.at_edge else ' '}",
        )
    Console().print(table)


def _mean_steps(steps: list[int | None]) -> str:
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        return f"– ({len(reached)} of {len(steps)})" if reached else "–"
    return f"{fmean(reached):.0f}"


def _notes(results: Mapping[str, Result], data: Dataset) -> str:
    seeds = len(next(iter(results.values())).curves.test)
    notes = [
        f"Mean ± standard deviation over {seeds} seeds; steps until {TARGET:.0%} of the validation"
        f" images are right (–: not in every run); fastest time of a step of all runs, divided by"
        " their number.",
        f"One test image is {100 / len(data.test.labels):.2f} points: differences of that order,"
        " or within a deviation or two, are no ranking. A small network and a short training can't"
        " show what the methods claim for large models, for generalization or for stability, and"
        " every argument but the rate has its default.",
    ]
    if any(result.controls for result in results.values()):
        notes.append(
            "(…): a control of the method above it. Adam warmed up over DualAdam's switch; Adam at"
            " CaAdam's rate times its mean scale, with no search of its own."
        )
    if any(result.at_edge for result in results.values()):
        notes.append("* at an edge of the rates tried: a better one may lie beyond.")
    return "\n".join(notes)


def save_json(results: Mapping[str, Result], data: Dataset, plan: Plan, path: Path) -> None:
    """Save the table with every seed, and the score of every rate."""
    rows = {
        name: {
            "label": result.label,
            "control_of": result.controls,
            "learning_rate": float(f"{result.rate:.3g}"),
            "learning_rate_at_edge": result.at_edge,
            "validation_accuracy_by_learning_rate": {
                f"{rate:.3g}": round(score, 4) for rate, score in result.scores.items()
            },
            "test_accuracy": [round(float(share), 4) for share in result.curves.test],
            "steps_to_target": result.curves.steps_to(TARGET),
            "ms_per_step": round(1e3 * result.seconds_per_step, 3),
        }
        for name, result in results.items()
    }
    document = {
        "data": data.name,
        "plan": plan._asdict(),
        "versions": VERSIONS,
        "device": jax.devices()[0].device_kind,
        "target_accuracy": TARGET,
        "results": rows,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
