"""The interval holds the truth in 95 of 100 experiments: where sequences differ in length, where mistakes are rare."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.evaluate import paired_interval
from inlay.evaluate.intervals import mean_interval, share_interval, student, wilson


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


def test_wilsons_interval_of_independent_trials() -> None:
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("questions", [4, 100])
def test_the_first_mistake_does_not_make_the_interval_narrower(questions: int) -> None:
    """It tells that a share is below 1, and nothing of how alike the answers of a group are."""
    counts = np.full(20, questions)
    none = share_interval(counts, counts)
    for mistakes in (1, questions // 2, questions):
        right = counts - mistakes * (np.arange(20) == 7)
        one = share_interval(right, counts)
        assert one.half >= none.half
        assert one.low < none.low


def test_nothing_changes_at_once_where_a_score_goes_down_from_one() -> None:
    scores, groups = np.ones(2000), np.repeat(np.arange(20), 100)
    scores[0] = 1 - 1e-6
    assert mean_interval(scores, groups).half == pytest.approx(mean_interval(np.ones(2000), groups).half, rel=1e-4)


def test_groups_that_agree_by_chance_are_no_more_trials_than_questions() -> None:
    same = share_interval(np.full(20, 3), np.full(20, 4))
    assert (same.low, same.high) == pytest.approx(wilson(0.75, 80))


def test_large_groups_weigh_more_and_so_tell_less() -> None:
    counts = np.array([50, 10, 10, 10, 10, 10])
    trials = 100**2 / (50**2 + 5 * 10**2)  # Kish's effective number
    assert share_interval(counts, counts).low == pytest.approx(trials / (trials + 1.959964**2), abs=1e-6)


def test_groups_without_a_question_do_not_count() -> None:
    assert share_interval(np.array([3, 0, 2]), np.array([4, 0, 4])) == share_interval(
        np.array([3, 2]), np.array([4, 4])
    )
    assert np.isnan(share_interval(np.zeros(3, dtype=int), np.zeros(3, dtype=int)).mean)
    assert np.isnan(share_interval(np.array([0, 3]), np.array([0, 4])).low)


@pytest.mark.parametrize(
    ("groups", "questions", "share"), [(20, 20, 0.95), (60, 20, 0.99), (10, 20, 0.95), (20, 8, 0.5)]
)
@pytest.mark.parametrize("alike", [0.0, 0.1, 0.5])
def test_coverage_of_a_share(groups: int, questions: int, share: float, alike: float) -> None:
    """Groups whose own shares are Beta's, so that two answers of one correlate by ``alike``."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        spread = (1 - alike) / alike if alike else np.inf
        own = rng.beta(share * spread, (1 - share) * spread, groups) if alike else np.full(groups, share)
        interval = share_interval(rng.binomial(questions, own), np.full(groups, questions))
        held += interval.low <= share <= interval.high
    assert held >= 930
