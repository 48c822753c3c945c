"""The report of the study: tables, verdicts and figures, of what may be judged."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import _estimates as estimates
import _results as results
import _study_comparisons as comparisons
import _study_figures as figures
import _study_protocol as protocol
from _estimates import Estimate
from _results import Rows
from _study_comparisons import Comparison, Outcome
from _study_contenders import (
    METHODS,
    RATE,
    RATE_OF_INVADAM,
    RATE_OF_LION,
    SLOW_STEP_SIZE,
    SWITCH_RATE,
    SYNC_PERIOD,
)
from _study_protocol import BASELINE, Study
from _study_training import describe
from _study_workloads import Workload, library_files
from _tuning import SEARCH_SEED
from _verdicts import Finding, Verdict

# Options that decide what runs now, and not what it comes to.
NOT_DECISIVE = "workloads", "contenders", "minutes", "report"
# Recorded with the results, which depend on them.
CONSTANTS = {
    "SEARCH_SEED": SEARCH_SEED,
    "RATE_DECADES": protocol.RATE_DECADES,
    "MOVED_BY": protocol.MOVED_BY,
    "DECAYS": protocol.DECAYS,
    "WARM_UP": protocol.WARM_UP,
    "FEWEST_SEEDS": protocol.FEWEST_SEEDS,
    "POWER": comparisons.POWER,
    "SEEN_BELOW": comparisons.SEEN_BELOW,
    "RATE": RATE,
    "RATE_OF_LION": RATE_OF_LION,
    "RATE_OF_INVADAM": RATE_OF_INVADAM,
    "SWITCH_RATE": SWITCH_RATE,
    "SYNC_PERIOD": SYNC_PERIOD,
    "SLOW_STEP_SIZE": SLOW_STEP_SIZE,
}


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
    drawn = {
        "study": figures.draw_differences(study, outcomes),
        "study-sensitivity": figures.draw_sensitivity(study, workloads, outcomes),
    }
    findings = [finding(study, outcomes, name) for name in METHODS if name in study.contenders]
    results.publish(
        "study",
        options,
        [x for x in findings if x],
        tables,
        drawn,
        CONSTANTS,
        describe_runs(study, workloads),
        NOT_DECISIVE,
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
    found = {name: comparisons.compare(x, losses[BASELINE], len(own)) for name, x in losses.items()}
    p = dict(zip(own, comparisons.holm([found[name].p for name in own]).tolist(), strict=True))
    return Outcome(title, judged, found, p)


def describe_runs(study: Study, workloads: Mapping[str, Workload]) -> dict[str, Any]:
    """Return on which machines and with which versions everything ran, and the time of its steps.

    The time is without compilation. A training that had one core counts half, because two ran side
    by side.
    """
    seconds = sum(
        result["step_ms"] * workloads[run.workload].steps / 1e3 / (2 if on_one_core(result) else 1)
        for run, result in study.results.items()
    )
    found: dict[str, set[str]] = {}
    for result in study.results.values():
        for name, value in result["environment"].items():
            found.setdefault(name, set()).add(value)
    texts = {name: " and ".join(sorted(values)) for name, values in found.items()}
    device = f"{texts.pop('device')} ({texts.pop('processor')})"
    return {"seconds": round(seconds), "device": device, "versions": texts}


def on_one_core(result: Mapping[str, Any]) -> bool:
    where = result["environment"]
    return where["device"] == "cpu" and where["processor"].startswith("1 × ")


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
        own = [x for x in outcome.judged if study.own_trials(name, x)]
        if own:
            tables[
                f"{title}: chosen settings (median and ends), time of a step, bytes of state"
            ] = {contender: settings_and_cost(study, name, contender) for contender in own}
    tables["Workloads"] = {
        workload.title: sizes(workload) | absent(study, name, outcomes.get(name))
        for name, workload in workloads.items()
    }
    return tables


def quality(
    study: Study, workload: str, outcome: Outcome, contender: str
) -> dict[str, Estimate | float | str]:
    results = study.decisive_results(workload, contender)
    compared = outcome.from_baseline[contender]
    is_baseline = contender == BASELINE
    diverged = sum(x["test"] is None for x in results)
    return {
        "test loss": estimates.mean(study.losses(workload, contender)),
        "− AdamW": "" if is_baseline else compared.difference,
        "smallest visible": "" if is_baseline else compared.smallest,
        "p, Holm": "" if is_baseline else outcome.p[contender],
        "accuracy, %": estimates.mean([x["accuracy"] for x in results]),
        "diverged": f"{diverged} of {len(results)}",
    }


def stored(study: Study, workload: str, form: str) -> dict[str, Estimate | float | str]:
    exact = study.contenders[form].form_of or form
    losses = study.losses(workload, exact)
    compared = comparisons.compare(study.losses(workload, form), losses)
    return {
        "difference": compared.difference,
        "smallest visible": compared.smallest,
        "spread of searches and seeds": float(np.std(losses, ddof=1)),
        "bytes a parameter": bytes_of_state(study, workload, form),
        "of float32 state": bytes_of_state(study, workload, exact),
    }


def bytes_of_state(study: Study, workload: str, contender: str) -> float:
    return float(study.decisive_results(workload, contender)[0]["bytes"])


def fastest_step(study: Study, workload: str, contender: str) -> float:
    """Return the milliseconds of a step in the fastest of all calls."""
    return min(x["step_ms"] for run, x in study.results.items() if run[:2] == (workload, contender))


def settings_and_cost(
    study: Study, workload: str, contender: str
) -> dict[str, Estimate | float | str]:
    rates, decays, warm_ups = np.array(study.chosen(workload, contender)).T
    searched = study.searched(workload, contender)
    lowest, highest = at_ends(study, workload, contender)
    return {
        "range of rates": range_of_rates(study, workload, contender),
        "rates": spread(rates),
        "rate × decay": spread(rates * decays),
        "warm-up": spread(warm_ups),
        "at the lowest rate": f"{lowest} of {len(rates)}",
        "at the highest": f"{highest} of {len(rates)}",
        "trials": f"{searched.shape[0]} × {searched.shape[1]}",
        "validation loss": float(searched.min(axis=1).mean()),
        "ms of a step": fastest_step(study, workload, contender),
        "bytes a parameter": bytes_of_state(study, workload, contender),
    }


def range_of_rates(study: Study, workload: str, contender: str) -> str:
    center, half = study.center(workload, contender), 10 ** (protocol.RATE_DECADES / 2)
    return f"{center / half:.2g} to {center * half:.2g}"


def spread(values: np.ndarray) -> str:
    """Return the median and the ends."""
    return f"{np.median(values):.2g} ({values.min():.2g} to {values.max():.2g})"


def at_ends(study: Study, workload: str, contender: str) -> tuple[int, int]:
    """Return how many searches chose the lowest rate that they tried, and how many the highest."""
    rates = [[run.setting.rate for run in row] for row in study.trials(workload, contender)]
    places = np.argsort(np.argsort(rates, axis=1), axis=1)
    best = study.searched(workload, contender).argmin(axis=1)
    chosen = np.take_along_axis(places, best[:, None], axis=1)
    return int((chosen == 0).sum()), int((chosen == places.shape[1] - 1).sum())


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
    from_control = [
        f"{outcome.title} {difference(compare_with(study, name, method, control))}"
        for name, outcome in found.items()
        if control in outcome.judged
    ]
    if from_control:
        shown += f". Less that of {control}: {'; '.join(from_control)}"
    explained = control is not None and not all(
        beats(study, name, method, control) for name, x in found.items() if x.seen(method) < 0
    )
    means = [outcome.from_baseline[method].difference.mean for outcome in found.values()]
    return Finding(
        f"{method}: with as many trials as AdamW, it ends at a lower loss",
        judge(seen, explained),
        f"Test loss less AdamW's, and the smallest difference that would have been seen: {shown}."
        f" Lower in {seen.count(-1)} of {len(seen)}, higher in {seen.count(1)}.",
        tuned=f"test loss {min(means):+.3f} to {max(means):+.3f}; lower at {seen.count(-1)} of"
        f" {len(seen)} workloads{f', as {control} is' if explained else ''}, higher at"
        f" {seen.count(1)}",
    )


def difference(compared: Comparison) -> str:
    x = compared.difference
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}] ({compared.smallest:.3f})"


def of_diverged(study: Study, workload: str, method: str) -> str:
    """Return how many trainings diverged, if any."""
    number = sum(x["test"] is None for x in study.decisive_results(workload, method))
    return f", where {number} of {study.rules[workload].seeds} diverged" if number else ""


def beats(study: Study, workload: str, method: str, control: str) -> bool:
    """Return whether a method's loss is below that of its control; not if that is not there."""
    if not study.complete(workload, control):
        return False
    return compare_with(study, workload, method, control).difference.high < 0


def compare_with(study: Study, workload: str, method: str, other: str) -> Comparison:
    return comparisons.compare(study.losses(workload, method), study.losses(workload, other))


def judge(seen: Sequence[int], explained: bool) -> Verdict:
    """Return the verdict: what was seen at most workloads, if the opposite was seen at none.

    A claim whose gain the method's control explains does not hold.
    """
    lower, higher = seen.count(-1), seen.count(1)
    if 2 * lower > len(seen) and not higher and not explained:
        return Verdict.HOLDS
    if 2 * higher > len(seen) and not lower:
        return Verdict.OPPOSITE
    if lower and higher:
        return Verdict.NOT_SEEN
    if lower:
        return Verdict.PARTLY
    return Verdict.PARTLY_OPPOSITE if higher else Verdict.NOT_SEEN
