"""The statistics of the study: paired differences, what could have been seen, and Holm's method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

import _estimates as estimates
from _estimates import CONFIDENCE, Estimate

# A difference is seen if its corrected p-value is below this level.
SEEN_BELOW = 1 - CONFIDENCE
POWER = 0.8


class Comparison(NamedTuple):
    """The paired differences from another contender.

    Attributes:
      difference: their mean, with Student's interval.
      smallest: the smallest true difference that would probably have been seen.
      p: the probability of a mean so far from 0 by chance, of a two-sided t-test.
    """

    difference: Estimate
    smallest: float
    p: float


def compare(losses: ArrayLike, others: ArrayLike, comparisons: int = 1) -> Comparison:
    """Compare losses of the same seeds; `comparisons` is for `smallest_effect`."""
    differences = np.asarray(losses, np.float64) - np.asarray(others, np.float64)
    if not differences.any():
        return Comparison(Estimate(0.0, 0.0, 0.0), 0.0, 1.0)
    found = estimates.mean(differences)
    statistic = abs(found.mean) / float(stats.sem(differences))
    p = 2 * float(stats.t.sf(statistic, len(differences) - 1))
    return Comparison(found, smallest_effect(differences, comparisons), p)


def smallest_effect(differences: ArrayLike, comparisons: int = 1) -> float:
    """Return the true mean difference that a paired t-test detects with a probability of 80 %.

    The level of the test is 5 %, divided by the number of comparisons: the first step of Holm's
    method. Later steps detect smaller differences. The standard deviation is that of the sample.
    """
    differences = np.asarray(differences, np.float64)
    freedom = len(differences) - 1
    critical = stats.t.isf(SEEN_BELOW / comparisons / 2, freedom)
    # The true mean in standard errors, which decides the distribution of the statistic.
    found: Any = optimize.brentq(
        lambda mean: stats.nct.sf(critical, freedom, mean) - POWER, 0, 10 * critical
    )
    return float(found * stats.sem(differences))


def holm(p: Sequence[float]) -> np.ndarray:
    """Return p-values that allow for the number of comparisons, after Holm (1979)."""
    order = np.argsort(p)
    multiplied = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(multiplied), 1)
    return adjusted


class Outcome(NamedTuple):
    """The comparisons at one workload.

    Attributes:
      title: of the workload.
      judged: all that may be judged.
      from_baseline: comparisons with the baseline.
      p: p-values of all but the baseline and the 8-bit forms, after Holm.
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
