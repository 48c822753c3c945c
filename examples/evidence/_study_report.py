"""The report of the study: tables, verdicts and figures, of what may be judged."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import _estimates as estimates
import _results as results
import _study_protocol as protocol
from _drawing import BLUE, FIGURE_WIDTH, ORANGE, draw_estimates, entitle, log_ticks, tidy
from _estimates import Estimate
from _networks import SEARCH_SEED
from _results import Rows
from _study_contenders import (
    METHODS,
    RATE,
    RATE_OF_INVADAM,
    RATE_OF_LION,
    SLOW_STEP_SIZE,
    SWITCH_RATE,
    SYNC_PERIOD,
)
from _study_protocol import BASELINE, Comparison, Study
from _study_training import describe
from _study_workloads import Workload, library_files
from _verdicts import Finding, Verdict

SEEN_BELOW = 0.05
# Panels reach so many times as far as the largest interval of most contenders.
ROOM = 1.3
# Losses above this many times the lowest one have the same color.
FAR = 4.0
# They decide the results, and are recorded with them.
CONSTANTS = {
    "SEARCH_SEED": SEARCH_SEED,
    "RATE_DECADES": protocol.RATE_DECADES,
    "MOVED_BY": protocol.MOVED_BY,
    "DECAYS": protocol.DECAYS,
    "WARM_UP": protocol.WARM_UP,
    "FEWEST_SEEDS": protocol.FEWEST_SEEDS,
    "POWER": protocol.POWER,
    "SEEN_BELOW": SEEN_BELOW,
    "RATE": RATE,
    "RATE_OF_LION": RATE_OF_LION,
    "RATE_OF_INVADAM": RATE_OF_INVADAM,
    "SWITCH_RATE": SWITCH_RATE,
    "SYNC_PERIOD": SYNC_PERIOD,
    "SLOW_STEP_SIZE": SLOW_STEP_SIZE,
}


class Outcome(NamedTuple):
    """The comparisons at one workload.

    Attributes:
      title: of the workload.
      judged: all that may be judged.
      from_baseline: comparisons with the baseline.
      p: of those with trials of their own, multiplied for their number.
    """

    title: str
    judged: list[str]
    from_baseline: dict[str, Comparison]
    p: dict[str, float]

    def seen(self, name: str) -> int:
        """Return 1 if a higher loss was seen, -1 if a lower one was, and otherwise 0."""
        if not self.p[name] < SEEN_BELOW:
            return 0
        return 1 if self.from_baseline[name].difference.mean > 0 else -1


def publish(study: Study, workloads: Mapping[str, Workload], options: argparse.Namespace) -> None:
    """Print and write what may be judged."""
    outcomes = {}
    for name, workload in workloads.items():
        judged = [contender for contender in study.entered(name) if study.complete(name, contender)]
        if BASELINE in judged and len(judged) > 1:
            outcomes[name] = compare(study, name, workload.title, judged)
    if not outcomes:
        print(f"Nothing may be judged before {BASELINE} and another contender are there.")
        return
    tables = make_tables(study, workloads, outcomes)
    figures = {
        "study": draw_differences(study, outcomes),
        "study-sensitivity": draw_sensitivity(study, workloads, outcomes),
    }
    findings = [finding(study, outcomes, name) for name in METHODS if name in study.contenders]
    results.publish(
        "study",
        options,
        [x for x in findings if x],
        tables,
        figures,
        CONSTANTS,
        describe_runs(study, workloads),
    )
    with results.writing_to(options.out):
        write_library(options)


def write_library(options: argparse.Namespace) -> None:
    """Write the names of the files that the text consists of."""
    root = library_files()[0].parent
    names = [path.relative_to(root).as_posix() for path in library_files()]
    path = options.out / "study-library.txt"
    path.write_text("\n".join(names) + "\n", encoding="utf-8")


def compare(study: Study, workload: str, title: str, judged: list[str]) -> Outcome:
    losses = {name: study.losses(workload, name) for name in judged}
    own = [name for name in judged if name != BASELINE and not study.contenders[name].form_of]
    found = {name: protocol.compare(x, losses[BASELINE], len(own)) for name, x in losses.items()}
    p = dict(zip(own, protocol.holm([found[name].p for name in own]).tolist(), strict=True))
    return Outcome(title, judged, found, p)


def describe_runs(study: Study, workloads: Mapping[str, Workload]) -> dict[str, Any]:
    """Return on which machines, with which versions and for how long everything ran."""
    seconds = sum(
        result["step_ms"] * workloads[run.workload].steps / 1e3
        for run, result in study.results.items()
    )
    found: dict[str, set[str]] = {}
    for result in study.results.values():
        for name, value in result["environment"].items():
            found.setdefault(name, set()).add(value)
    texts = {name: " and ".join(sorted(values)) for name, values in found.items()}
    device = f"{texts.pop('device')} ({texts.pop('processor')})"
    return {"seconds": round(seconds), "device": device, "versions": texts}


def make_tables(
    study: Study, workloads: Mapping[str, Workload], outcomes: Mapping[str, Outcome]
) -> dict[str, Rows]:
    tables: dict[str, Rows] = {}
    for name, outcome in outcomes.items():
        title, seeds = outcome.title, study.rules[name].seeds
        tables[f"{title}, {seeds} seeds: test loss in nats at the end"] = {
            contender: quality(study, name, outcome, contender)
            for contender in outcome.judged
            if not study.contenders[contender].form_of
        }
        forms = [x for x in outcome.judged if study.contenders[x].form_of in outcome.judged]
        if forms:
            tables[f"{title}: test loss of 8-bit state less that of float32 state"] = {
                form: stored(study, name, form) for form in forms
            }
        tables[f"{title}: chosen settings (median and ends), time of a step and bytes of state"] = {
            contender: settings_and_cost(study, name, contender)
            for contender in outcome.judged
            if not study.contenders[contender].form_of
        }
    tables["Workloads"] = {
        workload.title: sizes(workload) | absent(study, name, outcomes.get(name))
        for name, workload in workloads.items()
    }
    return tables


def quality(
    study: Study, workload: str, outcome: Outcome, contender: str
) -> dict[str, Estimate | float | str]:
    results = study.judge(workload, contender)
    compared = outcome.from_baseline[contender]
    is_baseline = contender == BASELINE
    diverged = sum(x["test"] is None for x in results)
    return {
        "test loss": estimates.mean(study.losses(workload, contender)),
        "− AdamW": "" if is_baseline else compared.difference,
        "smallest visible": "" if is_baseline else compared.smallest,
        "p, Holm": "" if is_baseline else outcome.p[contender],
        "accuracy, %": estimates.mean([x["accuracy"] or math.nan for x in results]),
        "diverged": f"{diverged} of {len(results)}",
    }


def stored(study: Study, workload: str, form: str) -> dict[str, Estimate | float | str]:
    exact = study.contenders[form].form_of or form
    losses = study.losses(workload, exact)
    compared = protocol.compare(study.losses(workload, form), losses)
    return {
        "difference": compared.difference,
        "smallest visible": compared.smallest,
        "spread of seeds": float(np.std(losses, ddof=1)),
        **cost(study, workload, form),
        "of float32 state": cost(study, workload, exact)["bytes a parameter"],
    }


def cost(study: Study, workload: str, contender: str) -> dict[str, float]:
    """Return the fastest time of a step, and the bytes of state for each parameter."""
    results = study.judge(workload, contender)
    return {
        "ms of a step": min(x["step_ms"] for x in results),
        "bytes a parameter": float(results[0]["bytes"]),
    }


def settings_and_cost(
    study: Study, workload: str, contender: str
) -> dict[str, Estimate | float | str]:
    settings = np.array(study.chosen(workload, contender))
    rates, decays, warm_ups = settings.T
    searched = study.searched(workload, contender)
    return {
        "range of rates": range_of_rates(study, workload, contender),
        "rates": spread(rates),
        "rate × decay": spread(rates * decays),
        "warm-up": spread(warm_ups),
        "at an end of the rates": f"{at_end(searched, study, workload, contender)} of {len(rates)}",
        "trials": f"{searched.shape[0]} × {searched.shape[1]}",
        "validation loss": float(searched.min(axis=1).mean()),
        **cost(study, workload, contender),
    }


def range_of_rates(study: Study, workload: str, contender: str) -> str:
    center = study.center(study.rules[workload].settings_from or workload, contender)
    half = 10 ** (protocol.RATE_DECADES / 2)
    return f"{center / half:.2g} to {center * half:.2g}"


def spread(values: np.ndarray) -> str:
    """Return the median and the ends."""
    return f"{np.median(values):.2g} ({values.min():.2g} to {values.max():.2g})"


def at_end(searched: np.ndarray, study: Study, workload: str, contender: str) -> int:
    """Return how many searches chose the lowest or the highest rate that they tried."""
    rates = [[run.setting.rate for run in row] for row in study.trials(workload, contender)]
    places = np.argsort(np.argsort(rates, axis=1), axis=1)
    chosen = np.take_along_axis(places, searched.argmin(axis=1)[:, None], axis=1)
    return int(np.isin(chosen, [0, searched.shape[1] - 1]).sum())


def sizes(workload: Workload) -> dict[str, Estimate | float | str]:
    described = describe(workload)
    texts = {name: described[name] for name in ("parameters", "steps", "batch")}
    return {name: f"{value:,}" for name, value in texts.items()} | {
        "loss of a guess": workload.rules.guess,
        "SHA-256 of the data": described["data"],
    }


def absent(study: Study, workload: str, outcome: Outcome | None) -> dict[str, str]:
    """Return which contenders can't be judged yet; p-values don't allow for their number."""
    if outcome is None:
        return {"not judged yet": "all"}
    names = [name for name in study.entered(workload) if name not in outcome.judged]
    return {"not judged yet": ", ".join(names) or "none"}


def finding(study: Study, outcomes: Mapping[str, Outcome], method: str) -> Finding | None:
    """Judge a method by all workloads at which it may be judged."""
    found = {name: outcome for name, outcome in outcomes.items() if method in outcome.p}
    if not found:
        return None
    seen = [outcome.seen(method) for outcome in found.values()]
    shown = "; ".join(
        f"{outcome.title} {difference(outcome.from_baseline[method])}"
        f"{of_diverged(study, name, method)}"
        for name, outcome in found.items()
    )
    control = study.contenders[method].control
    explained = control is not None and not all(
        beats(study, name, method, control) for name, x in found.items() if x.seen(method) < 0
    )
    means = [outcome.from_baseline[method].difference.mean for outcome in found.values()]
    return Finding(
        f"{method}: with as many trials as AdamW, it ends at a lower loss",
        judge(seen, explained),
        f"Test loss less AdamW's, and the smallest difference that would have been seen: {shown}."
        f" Lower in {seen.count(-1)} of {len(seen)}, higher in {seen.count(1)}.",
        tuned=f"test loss {min(means):+.3f} to {max(means):+.3f} at {len(means)} workloads",
    )


def difference(compared: Comparison) -> str:
    x = compared.difference
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}] ({compared.smallest:.3f})"


def of_diverged(study: Study, workload: str, method: str) -> str:
    """Return how many trainings diverged, if any."""
    number = sum(x["test"] is None for x in study.judge(workload, method))
    return f", where {number} of {study.rules[workload].seeds} diverged" if number else ""


def beats(study: Study, workload: str, method: str, control: str) -> bool:
    """Return whether a method's loss is below that of its control; not if that is not there."""
    if not study.complete(workload, control):
        return False
    compared = protocol.compare(study.losses(workload, method), study.losses(workload, control))
    return compared.difference.high < 0


def judge(seen: Sequence[int], explained: bool) -> Verdict:
    """Return the verdict: what was seen at most workloads, if the opposite was seen at none.

    A gain that the method's control explains does not count.
    """
    lower, higher = seen.count(-1), seen.count(1)
    if 2 * lower > len(seen) and not higher and not explained:
        return Verdict.HOLDS
    if 2 * higher > len(seen) and not lower:
        return Verdict.OPPOSITE
    return Verdict.NOT_SEEN


def draw_differences(study: Study, outcomes: Mapping[str, Outcome]) -> Figure:
    """Draw the differences from AdamW, a panel for each workload."""
    rows = math.ceil(len(outcomes) / 2)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.6 + 2.7 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, 2, sharey=True, squeeze=False)
    names = [
        name
        for name, contender in study.contenders.items()
        if name != BASELINE and not contender.form_of
    ]
    for axes, outcome in zip(panels.flat, outcomes.values(), strict=False):
        draw_panel(axes, study, outcome, names)
    for axes in panels.flat[len(outcomes) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_panel(axes: Axes, study: Study, outcome: Outcome, names: Sequence[str]) -> None:
    """Draw intervals, over bars that are as long as what would have been seen."""
    forms = {
        contender.form_of: name
        for name, contender in study.contenders.items()
        if contender.form_of and name in outcome.judged
    }
    limit = reach(outcome, names)
    axes.axvline(0, color="0.3", linewidth=1)
    label = "too small to be seen"
    for row, name in enumerate(names):
        if name in outcome.judged:
            smallest = outcome.from_baseline[name].smallest
            axes.barh(row, 2 * smallest, left=-smallest, height=0.8, color="0.88", label=label)
            label = ""
    looks: dict[str, Any] = {"float32 state": {"color": BLUE}}
    looks["8-bit state"] = {"color": ORANGE, "marker": "D", "markersize": 3}
    for shift, (label, look) in zip((-0.15, 0.2), looks.items(), strict=True):
        shown = names if shift < 0 else [forms.get(name, "") for name in names]
        found = {
            row + shift: outcome.from_baseline[name].difference
            for row, name in enumerate(shown)
            if name in outcome.judged
        }
        inside = {row: x for row, x in found.items() if abs(x.mean) <= limit}
        if inside:
            look = {"linestyle": "", "label": label, **look}
            draw_estimates(axes, list(inside), list(inside.values()), across=True, **look)
        for row in found.keys() - inside.keys():
            point_outside(axes, row, found[row].mean, limit)
    axes.set_xlim(-limit, limit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    entitle(axes, outcome.title, "test loss, less AdamW's", "")
    tidy(axes, "x")


def reach(outcome: Outcome, names: Sequence[str]) -> float:
    """Return how far a panel reaches: to all intervals but those that are far from the others."""
    ends = [
        max(*np.abs(outcome.from_baseline[name].difference), outcome.from_baseline[name].smallest)
        for name in names
        if name in outcome.judged
    ]
    return ROOM * min(max(ends, default=1), 3 * float(np.median(ends or [1]))) or 1.0


def point_outside(axes: Axes, row: float, mean: float, limit: float) -> None:
    """Write a difference that lies outside of the panel at its edge."""
    side, text = ("right", f"{mean:+.2g} →") if mean > 0 else ("left", f"← {mean:+.2g}")
    place = math.copysign(limit, mean)
    axes.text(place, row, text, ha=side, va="center", fontsize=8, color=BLUE)


def draw_sensitivity(
    study: Study, workloads: Mapping[str, Workload], outcomes: Mapping[str, Outcome]
) -> Figure:
    """Draw validation losses of trials: a row for each contender, a column for rates."""
    own = [name for name in outcomes if study.own_trials(name, BASELINE)]
    names = [name for name, contender in study.contenders.items() if not contender.form_of]
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + 0.24 * len(names)), layout="constrained")
    panels: Any = figure.subplots(1, len(own), sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, own, strict=True):
        losses = np.full((len(names), study.rules[name].trials), np.nan)
        for row, contender in enumerate(names):
            if contender in outcomes[name].judged:
                losses[row] = by_rate(study, name, contender)
        draw_losses(axes, losses, workloads[name].title.removesuffix(", 1×"))
    panels[0, 0].set_yticks(range(len(names)), names)
    return figure


def by_rate(study: Study, workload: str, contender: str) -> np.ndarray:
    """Return the median over searches of the lowest rates, of the second lowest, and so on."""
    rates = [[run.setting.rate for run in row] for row in study.trials(workload, contender)]
    searched = study.searched(workload, contender)
    return np.median(np.take_along_axis(searched, np.argsort(rates, axis=1), axis=1), axis=0)


def draw_losses(axes: Axes, losses: np.ndarray, title: str) -> None:
    least, most = np.nanmin(losses), np.nanmax(losses)
    half = protocol.RATE_DECADES / 2
    image = axes.imshow(
        losses,
        aspect="auto",
        cmap="cividis_r",
        norm=LogNorm(least, min(FAR * least, most)),
        extent=(-half, half, len(losses) - 0.5, -0.5),
        interpolation="nearest",
    )
    width = 2 * half / losses.shape[1]
    for row, of_one in enumerate(losses):
        if np.isfinite(of_one).all():
            best = (np.argmin(of_one) + 0.5) * width - half
            axes.plot(best, row, marker="o", color="white", markersize=3.5, markeredgecolor="black")
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", extend="max", shrink=0.9)
    log_ticks(bar.ax.xaxis, at=[1, 1.5, 2, 3, 5])
    bar.ax.tick_params(labelsize=8)
    entitle(axes, f"{title}\nvalidation loss", "rate / center of the range", "")
    axes.set_xticks([-1, 0, 1], ["0.1", "1", "10"])
    axes.tick_params(labelsize=8)
