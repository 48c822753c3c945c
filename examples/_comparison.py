"""The table of a comparison, from what `compare.json` contains: for the terminal and for pages."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

# A rate is usable where the loss is at most this many times AdamW's at AdamW's best rate.
USABLE = 2.0


def cells(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each optimizer: its cells by the names of their columns."""
    results = found["results"]
    adamw = results["adamw"]
    highest = USABLE * _tuning_loss(adamw, adamw["learning_rate"])
    rows = []
    for result in results.values():
        rates = [float(rate) for rate in result["tuning"]]
        usable = [rate for rate in rates if _tuning_loss(result, rate) <= highest]
        rate, losses = result["learning_rate"], result["test_loss"]
        differences = np.subtract(losses, adamw["test_loss"])
        rows.append(
            {
                "optimizer": f"({result['label']})" if result["control_of"] else result["label"],
                "best rate": f"{rate:g}{'*' if rate in (rates[0], rates[-1]) else ''}",
                "usable rates": f"{usable[0]:g}–{usable[-1]:g}" if usable else "none",
                "test loss": _with_range(losses, ".2f", "–"),
                "minus AdamW's": "–" if result is adamw else _with_range(differences, "+z.2f", "…"),
                "test accuracy": f"{100 * median(result['test_accuracy']):.0f} %",
                "ms per step": f"{result['ms_per_step']:.1f}",
            }
        )
    return rows


def notes(found: Mapping[str, Any]) -> list[str]:
    """Return what the columns mean, and what another machine would show otherwise."""
    plan, results = found["plan"], found["results"]
    seeds, tuning = plan["seeds"], plan["tuning_seeds"]
    texts = [
        f"best rate: of {plan['trials']} tried, the one with the lowest validation loss at the end"
        f" (median of {tuning} seeds).",
        f"usable rates: of these, all with at most {USABLE:g} times the test loss of AdamW at its"
        " best rate (same seeds).",
        f"test loss: cross-entropy at the end, at the best rate: median (range) of {seeds} other"
        " seeds.",
        "minus AdamW's: the same for differences between runs with equal initial weights and"
        " batches. The range contains the true median with"
        f" {100 * (1 - 0.5 ** (seeds - 1)):.0f} % confidence.",
        f"ms per step: gradient and update of one network, while {seeds} train at once, on this"
        " machine.",
        "Another processor or version of JAX rounds differently: the last digit of a median may"
        " change, an end of a range by more, and a best or usable rate may be the next one.",
        "A small network and a short training can't show what the methods claim for large ones. No"
        " optimizer decays weights here; by default AdamW and NOVAK do by 1e-4, VRAdam by 1e-5.",
    ]
    if any(result["control_of"] for result in results.values()):
        texts.append(
            "Row in parentheses: the control of the row above, Adam with a linear warm-up as long"
            " as DualAdam's switch."
        )
    if any("*" in row["best rate"] for row in cells(found)):
        texts.append("*: the lowest or highest rate tried; a better one may lie beyond.")
    return texts


def _tuning_loss(result: Mapping[str, Any], rate: float) -> float:
    """Return the median test loss at a rate, over the tuning seeds."""
    return median(result["tuning"][f"{rate:g}"]["test_loss"])


def _with_range(samples: Sequence[float], digits: str, dash: str) -> str:
    """Return the median, and the range unless it is a point."""
    center, low, high = (
        f"{x:{digits}}".replace("-", "−") for x in (median(samples), min(samples), max(samples))
    )
    return f"{center} ({low}{dash}{high})" if len(samples) > 1 else center
