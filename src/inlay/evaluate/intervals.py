"""95 % intervals, from the spread between sequences: tokens of one sequence are no independent measurements."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from inlay.evaluate.scoring import EvaluationError, Floats, Integers
from inlay.report.series import wilson

_NORMAL = 1.959964
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: The estimate; NaN if nothing was measured.
        low: Lower end; NaN with fewer than two sequences.
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
    """The difference per token between two evaluations of the same sequences, with its paired t-interval.

    Args:
        differences: ``[sequences]`` sum over each sequence's tokens of one evaluation minus the other.
        counts: ``[sequences]`` tokens in each. The mean is Σ differences / Σ counts, so a sequence weighs as its
            tokens; with equal counts the interval is the ordinary paired t-interval of the sequences' means.

    Raises:
        EvaluationError: The two have different lengths.
    """
    if differences.shape != counts.shape:
        raise EvaluationError(f"{len(differences)} differences for {len(counts)} sequences")
    used = counts > 0
    differences, counts = differences[used], counts[used]
    sequences, tokens = len(counts), int(counts.sum())
    mean = float(differences.sum() / tokens) if tokens else float("nan")
    if sequences < 2:
        return Interval(mean, float("nan"), float("nan"))
    residuals = differences - mean * counts
    error = np.sqrt(sequences / (sequences - 1) * np.square(residuals).sum()) / tokens
    half = float(student(sequences - 1) * error)
    return Interval(mean, mean - half, mean + half)


def mean_interval(scores: Floats, groups: Integers) -> Interval:
    """The mean of scores in 0..1 with its 95 % interval, from the spread between groups.

    Wilson's interval for as many independent yes-or-no trials as would spread like these scores; so it stays within
    0..1 and has a width where every score is 0 or 1. Where nothing spreads, each group counts as one trial.

    Args:
        scores: ``[N]`` what each question was given.
        groups: ``[N]`` number of each question's context or sequence; equal numbers, one group.
    """
    mean = float(scores.mean())
    _, group = np.unique(groups, return_inverse=True)
    counts = np.bincount(group)
    number = len(counts)
    if number < 2:
        return Interval(mean, float("nan"), float("nan"))
    residuals = np.bincount(group, scores) - mean * counts
    error = np.sqrt(number / (number - 1) * np.square(residuals).sum()) / len(scores)
    error *= student(number - 1) / _NORMAL  # few groups tell little of their own spread
    trials = mean * (1 - mean) / error**2 if error > 1e-9 else number
    low, high = wilson(np.array([mean]), np.array([float(trials)]))
    return Interval(mean, float(low[0]), float(high[0]))


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
