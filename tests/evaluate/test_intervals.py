"""The interval holds the true difference in 95 of 100 experiments, also where sequences differ in length."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.evaluate import paired_interval
from inlay.evaluate.intervals import mean_interval, student


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


def test_answers_that_agree_within_their_group_count_once() -> None:
    scores = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    once = mean_interval(scores, np.arange(6))
    assert mean_interval(np.repeat(scores, 9), np.repeat(np.arange(6), 9)).half == pytest.approx(once.half)


def test_groups_without_a_mistake_leave_room_for_doubt() -> None:
    interval = mean_interval(np.ones(80), np.repeat(np.arange(20), 4))
    assert interval.low == pytest.approx(20 / (20 + 1.959964**2))  # Wilson, 20 of 20
    assert interval.high == 1.0
