"""Means and shares over seeds, with confidence intervals, and how they read."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean or a share, with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __neg__(self) -> "Estimate":
        return Estimate(-self.mean, -self.high, -self.low)

    @property
    def smallest_seen(self) -> float:
        """The smallest effect that four of five such studies would distinguish from 0.

        It is (t(.975) + t(.8)) / t(.975) half-widths, which is 1.4 for 8 seeds or more.
        """
        return 1.4 * (self.high - self.low) / 2


def mean(samples: ArrayLike) -> Estimate:
    """Return the mean over seeds, or of differences between paired seeds, with Student's interval.

    Seeds are few here, for which resampling gives intervals that are too narrow.
    """
    samples = np.asarray(samples, np.float64)
    center = samples.mean()
    if len(samples) < 2:
        return Estimate(center, math.nan, math.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(samples) - 1) * stats.sem(samples)
    return Estimate(center, center - half, center + half)


def share(successes: ArrayLike) -> Estimate:
    """Return the share of seeds that succeed, with Wilson's interval."""
    successes = np.asarray(successes, bool)
    found = stats.binomtest(int(successes.sum()), len(successes))
    interval = found.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(successes.mean()), interval.low, interval.high)


def exact(x: float) -> Estimate:
    """Return a number that was not estimated: its interval is the number itself."""
    return Estimate(x, x, x)


def signed(x: Estimate, digits: int = 3) -> str:
    """Return a difference in words, with its sign."""
    return f"{x.mean:+.{digits}f} [{x.low:+.{digits}f}, {x.high:+.{digits}f}]"


def sensitivity(x: Estimate, unit: str = "", digits: int = 3) -> str:
    """Return a sentence that says how large an effect the comparison can see."""
    return f"The smallest effect that it would see: {x.smallest_seen:.{digits}f}{unit}."
