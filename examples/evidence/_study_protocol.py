"""The protocol of the study: what each contender tries, on which seeds, and when it may be judged.

A search tries points of a cube: learning rate, decay of a step, share of warm-up. The ranges of
rates have the same width in decades, each around the contender's own center. The setting with the
lowest validation loss is chosen, on a seed used only for the search, and another seed judges it.
Every contender does so as many times as there are seeds, each time at the same other points of the
cube and from the same initial weights on the same batches. So differences between contenders vary
with the points of the search and with the seed, and their interval covers both.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import optax
from numpy.typing import ArrayLike
from scipy.stats import qmc

from _tuning import SEARCH_SEED

# Decades between the lowest and the highest rate of a contender.
RATE_DECADES = 3.0
# The factor by which a range of rates moves up.
MOVED_BY = 10.0
# The product of rate and decay, which is the share of a weight that a step removes. Its range is
# the same for all, whatever the size of their rates.
DECAYS = 1e-5, 1e-2
# The largest share of the steps that warms up; the smallest is 0.
WARM_UP = 0.4
FEWEST_SEEDS = 8
BASELINE = "AdamW"

# Returns an optimizer for a schedule of rates and a decay, which is a tracer here.
Factory = Callable[[optax.Schedule, Any], optax.GradientTransformation]


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
      factory: returns it.
      rate: its default or published rate.
      form_of: the contender whose setting it takes, without trials of its own.
      control: the contender that could explain its gain.
    """

    factory: Factory
    rate: float
    form_of: str | None = None
    control: str | None = None


class Setting(NamedTuple):
    """A learning rate, a decay and the share of the steps that warm up."""

    rate: float
    decay: float
    warm_up: float


class Rules(NamedTuple):
    """The protocol's numbers for a workload.

    Attributes:
      guess: the loss of a uniform guess, in nats. A larger loss counts as this one, and so does a
        training that diverged.
      trials: how many settings each search tries, a power of 2.
      seeds: how many searches there are, each judged by a seed, a power of 2.
      center: the center of all rates, in published rates.
      moved: contenders whose range is ten times as high, because at least two searches had chosen
        the highest rates of the first range. All their trials are repeated, so that their number
        stays equal.
      settings_from: the workload at which settings are chosen; this one if `None`.
      forms: whether forms of other contenders take part.
    """

    guess: float
    trials: int = 8
    seeds: int = FEWEST_SEEDS
    center: float = 1.0
    moved: tuple[str, ...] = ()
    settings_from: str | None = None
    forms: bool = True


class Run(NamedTuple):
    """What identifies a training."""

    workload: str
    contender: str
    setting: Setting
    seed: int


# The numbers that a training ended with, by name.
Result = Mapping[str, Any]


@cache
def cube(trials: int, searches: int) -> np.ndarray:
    """Return the points of the unit cube that each search tries, of shape (searches, trials, 3).

    The searches divide the first points of Sobol's sequence. So in each of them every coordinate is
    once in each of as many equal parts as there are trials, and no two points are alike.
    """
    number = trials * searches
    if trials < 2 or number & (number - 1):
        raise ValueError(
            f"trials and seeds must be powers of 2, and trials above 1, got {trials} and {searches}"
        )
    first = qmc.Sobol(3, scramble=False).random_base2(number.bit_length() - 1)
    return (first + 1 / (2 * number)).reshape(searches, trials, 3)


def setting_at(point: ArrayLike, center: float) -> Setting:
    """Return the setting at a point of the cube, for the center of a contender's rates."""
    rate, decay, warm_up = np.asarray(point, np.float64)
    scaled = center * 10 ** (RATE_DECADES * (rate - 0.5))
    of_step = DECAYS[0] * (DECAYS[1] / DECAYS[0]) ** decay
    return Setting(*(float(f"{x:.4g}") for x in (scaled, of_step / scaled, WARM_UP * warm_up)))


class Study:
    """All contenders and workloads, and the results so far.

    It tells which trainings are missing, and refuses to judge a contender before all are there.
    """

    def __init__(self, contenders: Mapping[str, Contender], rules: Mapping[str, Rules]) -> None:
        """Check that every workload has enough seeds, and as many as where settings are chosen."""
        for workload, of_one in rules.items():
            if of_one.seeds < FEWEST_SEEDS:
                raise ValueError(
                    f"{workload}: at least {FEWEST_SEEDS} seeds must decide, got {of_one.seeds}"
                )
            source = rules[of_one.settings_from or workload]
            if source.seeds != of_one.seeds:
                raise ValueError(
                    f"{workload}: {of_one.seeds} seeds can't be judged by {source.seeds} searches"
                )
        self.contenders = contenders
        self.rules = rules
        self.results: dict[Run, Result] = {}

    def entered(self, workload: str) -> list[str]:
        """Return the contenders that take part in a workload."""
        forms = self.rules[workload].forms
        return [name for name, x in self.contenders.items() if forms or not x.form_of]

    def trials(self, workload: str, contender: str) -> list[list[Run]]:
        """Return the trainings that choose settings: a row for each search.

        They are those of the contender and of the workload that settings are taken from.
        """
        workload = self.rules[workload].settings_from or workload
        contender = self.contenders[contender].form_of or contender
        rules, center = self.rules[workload], self.center(workload, contender)
        return [
            [
                Run(workload, contender, setting_at(point, center), SEARCH_SEED + seed)
                for point in points
            ]
            for seed, points in enumerate(cube(rules.trials, rules.seeds))
        ]

    def center(self, workload: str, contender: str) -> float:
        """Return the center of a contender's rates at a workload where it is searched."""
        rules = self.rules[workload]
        factor = MOVED_BY if contender in rules.moved else 1.0
        return rules.center * factor * self.contenders[contender].rate

    def own_trials(self, workload: str, contender: str) -> list[Run]:
        """Return the trials that this contender runs at this workload itself."""
        runs = [run for row in self.trials(workload, contender) for run in row]
        return [run for run in runs if run[:2] == (workload, contender)]

    def searched(self, workload: str, contender: str) -> np.ndarray:
        """Return the validation losses of each search; raise unless all trials are there."""
        rows = self.trials(workload, contender)
        self._require([run for row in rows for run in row])
        losses = [[self.results[run]["validation"] for run in row] for row in rows]
        return bounded(losses, self.rules[workload].guess)

    def chosen(self, workload: str, contender: str) -> list[Setting]:
        """Return the best setting of each search; raise unless all trials are there."""
        best = self.searched(workload, contender).argmin(axis=1)
        rows = self.trials(workload, contender)
        return [row[i].setting for row, i in zip(rows, best, strict=True)]

    def decisive(self, workload: str, contender: str) -> list[Run]:
        """Return the trainings that decide; raise unless all trials are there."""
        chosen = self.chosen(workload, contender)
        return [Run(workload, contender, setting, seed) for seed, setting in enumerate(chosen)]

    def decisive_results(self, workload: str, contender: str) -> list[Result]:
        """Return the results that decide; raise unless all trials and all seeds are there."""
        runs = self.decisive(workload, contender)
        self._require(runs)
        return [self.results[run] for run in runs]

    def losses(self, workload: str, contender: str) -> np.ndarray:
        """Return the test losses that decide; raise unless all trials and all seeds are there."""
        losses = [x["test"] for x in self.decisive_results(workload, contender)]
        return bounded(losses, self.rules[workload].guess)

    def missing(self, workload: str, contender: str) -> list[Run]:
        """Return the trainings to run next: trials, and when these are there, what decides."""
        trials = self._absent(self.own_trials(workload, contender))
        return trials or self._absent(self.decisive(workload, contender))

    def number_missing(self, workload: str, contender: str) -> int:
        """Return how many trainings are missing, whichever setting will be chosen."""
        trials = self._absent(self.own_trials(workload, contender))
        seeds = self.rules[workload].seeds
        if trials:
            return len(trials) + seeds
        if self.ready(workload, contender):
            return len(self._absent(self.decisive(workload, contender)))
        return seeds

    def ready(self, workload: str, contender: str) -> bool:
        """Return whether the setting can be chosen."""
        return not self._absent([run for row in self.trials(workload, contender) for run in row])

    def complete(self, workload: str, contender: str) -> bool:
        """Return whether the contender may be judged."""
        return self.ready(workload, contender) and not self.missing(workload, contender)

    def _absent(self, runs: Sequence[Run]) -> list[Run]:
        return [run for run in runs if run not in self.results]

    def _require(self, runs: Sequence[Run]) -> None:
        absent = self._absent(runs)
        if absent:
            what = "trials" if absent[0].seed >= SEARCH_SEED else "seeds"
            raise ValueError(
                f"{absent[0].contender} at {absent[0].workload} can't be judged: {len(absent)} of"
                f" {len(runs)} trainings on {what} are missing"
            )


def bounded(losses: Any, largest: float) -> np.ndarray:
    """Return losses that a mean can be taken of; that of a training that diverged is `None`."""
    return np.fmin(np.array(losses, np.float64), largest)
