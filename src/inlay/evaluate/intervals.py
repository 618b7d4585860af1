"""95 % intervals, from the spread between documents or sequences: tokens of one are no independent measurements."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from inlay.evaluate.scoring import EvaluationError, Floats, Integers

_NORMAL = 1.959964
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: The estimate; NaN if nothing was measured.
        low: Lower end; NaN with fewer than two groups.
        high: Upper end, likewise.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width: the figure after ±."""
        return (self.high - self.low) / 2

    def to_json(self) -> dict[str, float]:
        """Plain types."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def paired_interval(differences: Floats, counts: Integers) -> Interval:
    """The difference per token between two evaluations of the same text, with its paired t-interval.

    Args:
        differences: ``[G]`` sum over the tokens of each group (a document, a sequence) of one evaluation minus the
            other.
        counts: ``[G]`` tokens in each. The mean is Σ differences / Σ counts, so a group weighs as its tokens; with
            equal counts the interval is the ordinary paired t-interval of the groups' means.

    Raises:
        EvaluationError: The two have different lengths.
    """
    if differences.shape != counts.shape:
        raise EvaluationError(f"{len(differences)} differences for {len(counts)} groups")
    used = counts > 0
    differences, counts = differences[used], counts[used]
    groups, tokens = len(counts), int(counts.sum())
    mean = float(differences.sum() / tokens) if tokens else float("nan")
    if groups < 2:
        return Interval(mean, float("nan"), float("nan"))
    residuals = differences - mean * counts
    error = np.sqrt(groups / (groups - 1) * np.square(residuals).sum()) / tokens
    half = float(student(groups - 1) * error)
    return Interval(mean, mean - half, mean + half)


def mean_interval(scores: Floats, groups: Integers) -> Interval:
    """The mean of scores in 0..1 with its 95 % interval, as :func:`share_interval` gives it.

    Args:
        scores: ``[N]`` what each question was given.
        groups: ``[N]`` number of each question's context or sequence; equal numbers, one group.
    """
    _, group = np.unique(groups, return_inverse=True)
    return share_interval(np.bincount(group, scores), np.bincount(group))


def share_interval(sums: Floats | Integers, counts: Integers) -> Interval:
    """The mean of scores in 0..1 with its 95 % interval, from the spread between groups.

    Wilson's interval for as many independent yes-or-no trials as would spread like the groups, so it stays within 0..1
    and has a width where every score is 0 or 1. How alike a group's answers are is seen only in groups that differ from
    the rest: with one mistake in all it is as unknown as with none, and a group counts as one trial. Each further group
    with a mistake is a degree of freedom more. There are never more trials than questions.

    Args:
        sums: ``[G]`` sum of each group's scores.
        counts: ``[G]`` its questions; groups without any are left out.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    questions, groups = int(counts.sum()), len(counts)
    mean = float(sums.sum() / questions) if questions else float("nan")
    if groups < 2:
        return Interval(mean, float("nan"), float("nan"))
    telling = min(int((sums > 1e-9).sum()), int((counts - sums > 1e-9).sum()))
    spread = groups / (groups - 1) * np.square(sums - mean * counts).sum()
    measured = mean * (1 - mean) * questions**2 / spread if spread > 1e-9 else 1e18
    as_one = questions**2 / np.square(counts).sum()  # trials if each group gave one answer; fewer where sizes differ
    trials = min(questions, measured * _trusted(groups), max(as_one, measured * _trusted(telling)))
    low, high = wilson(mean, trials)
    return Interval(mean, low, high)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Lower and upper end of the 95 % interval of a share observed in independent trials."""
    z = _NORMAL
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _trusted(groups: int) -> float:
    """The share of its trials that a spread measured in so few groups is worth, by Student's t."""
    return float(_NORMAL / student(groups - 1)) ** 2 if groups > 1 else 0.0


def numbered(values: Iterable[Hashable]) -> Integers:
    """A number for each value, equal for equal ones, from 0 on in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def student(degrees: int) -> float:
    """The 97.5 % point of Student's t; a table up to 10 degrees of freedom, beyond it Fisher's expansion (to 1e-4)."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z, n = _NORMAL, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
