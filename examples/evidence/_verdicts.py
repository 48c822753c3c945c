"""What a script found about a claim, and the verdict that follows."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from _estimates import Estimate


class Verdict(StrEnum):
    """The verdict on a claim; `judge` returns those about one difference."""

    HOLDS = "holds"
    ONLY_UNTUNED = "holds only against an untuned baseline"
    REVERSED = "holds against an untuned baseline, reversed against a tuned one"
    NOT_SEEN = "not seen at this scale"
    OPPOSITE = "the opposite was seen"
    PARTLY = "seen at some workloads only"
    PARTLY_OPPOSITE = "the opposite was seen at some workloads only"
    REFUTED = "does not hold"


class Finding(NamedTuple):
    """The finding about a claim.

    Attributes:
      claim: one sentence that begins with the method.
      verdict: the verdict on the claim.
      shown: the numbers that decide, including those of the controls.
      untuned: the difference from an untuned baseline, for the table; empty without one.
      tuned: the difference from the tuned control, likewise.
    """

    claim: str
    verdict: Verdict
    shown: str
    untuned: str = ""
    tuned: str = ""


def judge(gains: Sequence[Estimate], untuned: Sequence[Estimate] = ()) -> Verdict:
    """Return the verdict on the claim of a gain, which is positive in the claim's favour.

    Args:
      gains: differences from each tuned control; the claim needs all of them.
      untuned: differences from untuned baselines; none if there is no such comparison.
    """
    if all(x.low > 0 for x in gains):
        return Verdict.HOLDS
    of_untuned = bool(untuned) and all(x.low > 0 for x in untuned)
    if all(x.high < 0 for x in gains):
        return Verdict.REVERSED if of_untuned else Verdict.OPPOSITE
    return Verdict.ONLY_UNTUNED if of_untuned else Verdict.NOT_SEEN
