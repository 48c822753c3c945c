"""The results as JSON and as a printed table."""

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from _comparison import cells, notes
from _data import Dataset
from _training import BATCH_SIZE, Plan, Runs, draw_batches, make_network

WIDTH = 100
VERSIONS = {module.__name__: module.__version__ for module in (jax, flax, optax)}


class Result(NamedTuple):
    """The result of one contender.

    Attributes:
      label: its name.
      controls: the method that it is a control of.
      rates: the learning rates tried.
      tuning_validation: validation loss at the end for each of these rates and each tuning seed.
      tuning_test: test loss of the same runs.
      rate: the rate chosen.
      runs: all seeds at this rate.
    """

    label: str
    controls: str | None
    rates: Sequence[float]
    tuning_validation: NDArray[np.floating]
    tuning_test: NDArray[np.floating]
    rate: float
    runs: Runs


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
        "Training": f"{plan.epochs} epochs, {steps} steps of {min(BATCH_SIZE, train)} images, the"
        " rate falls along a cosine, weights do not decay",
        "Runs": f"{plan.trials} rates × {plan.tuning_seeds} seeds to choose the rate, then"
        f" {plan.seeds} other seeds",
        "Software": ", ".join(f"{name} {version}" for name, version in VERSIONS.items()),
        "Hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
    }
    if plan.fused:
        platform = jax.default_backend()
        here = "runs kernels" if platform == "gpu" else "runs the chains themselves"
        rows["Fused"] = f"by pallas_kernels.fuse, which on this {platform} {here}; runs take turns"
    for name, text in rows.items():
        print(textwrap.fill(f"{name + ':':<10}{text}", WIDTH, subsequent_indent=" " * 10))
    print()


def document(results: Mapping[str, Result], data: Dataset, plan: Plan) -> dict[str, Any]:
    """Return all numbers of the comparison, each seed's and each rate's, as JSON has them."""
    return {
        "data": data.name,
        "plan": plan._asdict(),
        "versions": VERSIONS,
        "device": jax.devices()[0].device_kind,
        "results": {
            name: {
                "label": result.label,
                "control_of": result.controls,
                "learning_rate": result.rate,
                "tuning": {
                    f"{rate:g}": {"validation_loss": _rounded(val), "test_loss": _rounded(test)}
                    for rate, val, test in zip(
                        result.rates, result.tuning_validation, result.tuning_test, strict=True
                    )
                },
                "test_loss": _rounded(result.runs.test_loss),
                "test_accuracy": _rounded(result.runs.test_accuracy),
                "ms_per_step": round(1e3 * result.runs.seconds_per_step, 3),
            }
            for name, result in results.items()
        },
    }


def _rounded(numbers: NDArray[np.floating]) -> list[float]:
    return [round(float(number), 4) for number in numbers]


def save_json(found: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(found, indent=2)
    # One line for each list of numbers.
    text = re.sub(r"\[[^]]*\]", lambda match: json.dumps(json.loads(match[0])), text)
    path.write_text(text + "\n", encoding="utf-8")


def print_table(found: Mapping[str, Any]) -> None:
    rows = cells(found)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(rows[0]):
        justify = "right" if i else "left"
        table.add_column("\n".join(name.rsplit(" ", 1)), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    Console(width=WIDTH).print(table)
    for note in notes(found):
        print(textwrap.fill(note, WIDTH, subsequent_indent="  "))
