"""The interval holds the true difference in 95 of 100 experiments, also where sequences differ in length."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.evaluate import paired_interval
from inlay.evaluate.intervals import student


@pytest.mark.parametrize(
    ("degrees", "point"), [(1, 12.7062), (5, 2.5706), (10, 2.2281), (11, 2.2010), (20, 2.0860), (120, 1.9799)]
)
def test_points_of_students_distribution(degrees: int, point: float) -> None:
    assert student(degrees) == pytest.approx(point, abs=2e-4)


@pytest.mark.parametrize("sequences", [4, 30])
def test_coverage(sequences: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 100, size=sequences)
    held = 0
    for _ in range(2000):
        interval = paired_interval(counts * rng.normal(0.3, 1.0, size=sequences), counts)
        held += interval.low <= 0.3 <= interval.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_sequences_without_labels_do_not_count() -> None:
    with_empty = paired_interval(np.array([1.0, 0.0, 3.0]), np.array([10, 0, 10]))
    assert with_empty == paired_interval(np.array([1.0, 3.0]), np.array([10, 10]))
    assert np.isnan(paired_interval(np.zeros(2), np.zeros(2, dtype=int)).mean)
