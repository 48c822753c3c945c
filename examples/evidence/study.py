"""The study: with as many trials, does any method end at a lower loss than AdamW?

    python examples/evidence/study.py

What it can show: whether a method ends at another loss than AdamW, if both get the same number of
trials, on networks of 5 thousand to 0.23 million parameters. A difference that is not seen may
exist. The tables give the smallest true difference that a study like this detects with a
probability of 80 %.

What it cannot show: large networks, long trainings, other kinds of data, what more trials would
find, or what a search of the methods' other arguments would. Beta3 and the like have their
defaults, as b1 and b2 of AdamW do.

A transformer learns the bytes of Python's standard library, and a perceptron and a convnet learn
MNIST-1D. Each contender is searched eight times. Every search tries other points of learning rate,
decay and warm-up; the points are the same for all contenders. The setting with the lowest
validation loss is chosen, and judged by a seed that no search used. So the intervals include the
variance of the search. (AlgoPerf repeats its search, too, five times, but scores the chosen trials
themselves.)

Each range of rates has three decades. On MNIST-1D and for the small transformer its center is ten
times the published rate: 1e-2 for methods like Adam, 1e-3 for Lion, and 10 for InvAdam, for which
none is published. If at least two of the eight searches choose the highest rate that they tried,
the range moves up by a decade, once, and all trials run again. So these contenders had two ranges,
and AdamW one. The tables have the ranges, and how many searches chose a rate at an end.

The rate warms up and then follows a cosine to 0, for a number of steps, and for four times as many.
The longer training is not tuned: it takes the settings of the shorter one, as they would be taken
from a small experiment. Only losses at the end count, on data that neither training nor search
used. A loss above that of a uniform guess counts as that of a guess, and so does a training that
diverged. A difference is seen if its p-value is below 5 %. It is that of a paired t-test, corrected
by Holm's method for the contenders of one workload. The intervals are not corrected. A claim holds
if a lower loss is seen at more than half of the workloads and a higher one at none, and if the
method is also below its control there. The two horizons of a network are not independent.

The control of NOVAK is RAdam with lookahead, of which it is made. That of DualAdam is AdamW with an
additional linear warm-up of as many steps. That of FAME is NAdamW, whose momentum also lags less
than AdamW's; it was chosen as FAME's control after the results were seen. CaAdam has none, because
AdamW's search contains other rates. FAME has decoupled decay here, and L2 decay elsewhere. 8-bit
state is not searched. It uses the settings of float32 state, which favors float32.

8-bit state has intervals and smallest visible differences that are not corrected.

The time of a step is that of the fastest call of a training, its evaluation included. Calls ran on
one core or on two, so these times do not rank methods.

Runs are added to study.jsonl as they end. Ctrl-C or `--minutes` interrupts, and the same command
continues. The text depends on Python's version and build, and results from another are ignored. For
a GPU there are transformers of 10 and 124 million parameters: `--workloads text-10M text-10M-4x`.
Those of 124 million take the settings of 10 million.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import _command_line as command_line
import _estimates as estimates
import _results as results
import _study_report as report
from _command_line import RESULTS
from _networks import Data, Split
from _study_contenders import CONTENDERS
from _study_protocol import Contender, Run, Setting, Study
from _study_training import Trainer, definition, environment
from _study_workloads import ON_CPU, ON_GPU, Workload

WORKLOADS = ON_CPU | ON_GPU
# What is to be run in a test.
SMOKE_CONTENDERS = "AdamW", "CaAdam", "AdamW, 8-bit"
SMOKE_WORKLOADS = "mlp", "mlp-4x", "text"
CONSTANTS, NOT_DECISIVE = report.CONSTANTS, report.NOT_DECISIVE


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.smoke and options.out == RESULTS:
        parser.error("--smoke would replace the results: choose another folder with --out")
    contenders, workloads = smoke() if options.smoke else (CONTENDERS, WORKLOADS)
    study, path = open_study(contenders, workloads, options.out)
    if not options.report:
        chosen = [name for name in options.workloads or ON_CPU if name in workloads]
        names = [name for name in options.contenders or contenders if name in contenders]
        try:
            Runner(study, workloads, path, options.minutes).run(chosen, names)
        except KeyboardInterrupt:
            raise SystemExit("\nInterrupted. The same command continues.") from None
    report.publish(study, workloads, options)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser(__doc__)
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        metavar="NAME",
        help=f"what to run (default: {' '.join(ON_CPU)}; on a GPU: {' '.join(ON_GPU)})",
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--minutes",
        type=command_line.positive,
        metavar="N",
        help="end before so many (default: never)",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="run something small")
    return parser


def smoke() -> tuple[dict[str, Contender], dict[str, Workload]]:
    """Return few contenders, and workloads of few trials, steps and data."""

    def shrink(workload: Workload) -> Workload:
        return workload._replace(
            load=partial(shorten, workload.load),
            steps=max(workload.steps // 200, 5),
            rules=workload.rules._replace(trials=2),
        )

    contenders = {name: CONTENDERS[name] for name in SMOKE_CONTENDERS}
    return contenders, {name: shrink(WORKLOADS[name]) for name in SMOKE_WORKLOADS}


def shorten(load: Callable[[], Data]) -> Data:
    """Return data with few examples to choose and to judge by."""
    data = load()
    validation, test = (Split(*(x[:32] for x in split)) for split in data[1:])
    return Data(data.train, validation, test)


def open_study(
    contenders: Mapping[str, Contender], workloads: Mapping[str, Workload], folder: Path
) -> tuple[Study, Path]:
    """Return a study with the results in a folder that count, and the file of all."""
    study = Study(contenders, {name: workload.rules for name, workload in workloads.items()})
    path = folder / "study.jsonl"
    others = 0
    for record in read(path):
        if record["workload"] in workloads and record["contender"] in contenders:
            if record["definition"] == definition(workloads[record["workload"]]):
                study.results[identify(record)] = record
            else:
                others += 1
    if others:
        print(f"{others} runs in {path} are of other data or sizes, and don't count.")
    return study, path


def read(path: Path) -> Iterable[dict[str, Any]]:
    """Return the records in a file; a line that was cut off when the power failed is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def identify(record: Mapping[str, Any]) -> Run:
    setting = Setting(*(record[name] for name in Setting._fields))
    return Run(record["workload"], record["contender"], setting, record["seed"])


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to the file; the first one ends a line that was cut off."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with results.writing_to(path), path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + text)


class Runner:
    """Runs what is missing, and adds each result to the file when it is there."""

    def __init__(
        self, study: Study, workloads: Mapping[str, Workload], path: Path, minutes: int | None
    ) -> None:
        """Begin to count the minutes."""
        self.study = study
        self.workloads = workloads
        self.path = path
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def run(self, workloads: Sequence[str], contenders: Sequence[str]) -> None:
        """Run each contender's trials, and then its seeds; end before the time is over."""
        pairs = [
            (workload, contender)
            for workload in workloads
            for contender in self.study.entered(workload)
            if contender in contenders
        ]
        print(f"{self.minutes_left(pairs):.0f} minutes of runs are missing.", flush=True)
        for workload, contender in pairs:
            if self.study.complete(workload, contender):
                continue
            self.require_settings(workload, contender)
            if not self.run_one(workload, contender):
                print("The time is over. The same command continues.")
                return
            self.show(workload, contender, self.minutes_left(pairs))

    def require_settings(self, workload: str, contender: str) -> None:
        """End the program if settings are to be chosen elsewhere, where trials are missing."""
        if not self.study.own_trials(workload, contender) and not self.study.ready(
            workload, contender
        ):
            source = self.study.trials(workload, contender)[0][0]
            raise SystemExit(
                f"{contender} at {workload} takes the setting of {source.contender} at"
                f" {source.workload}, whose trials are missing: run these first."
            )

    def run_one(self, workload: str, contender: str) -> bool:
        """Run what is missing of a contender; return whether there was time for it."""
        trainer: Trainer | None = None
        together = self.workloads[workload].together
        while runs := self.study.missing(workload, contender)[:together]:
            if time.monotonic() + self.seconds(workload, contender, len(runs)) > self.end:
                return False
            trainer = trainer or Trainer(
                self.workloads[workload], self.study.contenders[contender].factory
            )
            records = [
                self.describe(run) | result
                for run, result in zip(runs, trainer.train(runs), strict=True)
            ]
            append(self.path, records)
            self.study.results.update(zip(runs, records, strict=True))
        return True

    def describe(self, run: Run) -> dict[str, Any]:
        """Return what a record begins with."""
        return {
            "workload": run.workload,
            "definition": definition(self.workloads[run.workload]),
            "contender": run.contender,
            **run.setting._asdict(),
            "seed": run.seed,
            "date": datetime.now(UTC).date().isoformat(),
            "environment": environment(),
        }

    def seconds(self, workload: str, contender: str, runs: int) -> float:
        """Return how long so many trainings take, by those before, if any, without compilation."""
        of_one = self.workloads[workload]
        measured = {
            run.contender: result["step_ms"]
            for run, result in self.study.results.items()
            if run.workload == workload and result["environment"] == environment()
        }
        step_ms = measured.get(contender, max(measured.values(), default=of_one.step_ms))
        return runs * of_one.steps * step_ms / 1e3

    def minutes_left(self, pairs: Sequence[tuple[str, str]]) -> float:
        return sum(self.seconds(*pair, self.study.number_missing(*pair)) / 60 for pair in pairs)

    def show(self, workload: str, contender: str, minutes: float) -> None:
        loss = estimates.mean(self.study.losses(workload, contender))
        print(f"{workload} {contender}: {loss}; {minutes:.0f} minutes left.", flush=True)


if __name__ == "__main__":
    main()
