"""A model that looks the answer up is always right, one that guesses by chance, one with short sight nearby."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inlay.data import RecallConfig, RecallDataset
from inlay.evaluate import Evaluation, EvaluationError, recall_accuracy
from inlay.evaluate.intervals import wilson
from inlay.report import Table
from inlay.report.numbers import MISSING
from tests.evaluate.models import Guesser, Oracle

CONFIG = RecallConfig(task="recall", sequence_length=64, pairs=8, keys=12, values=10, min_distance=10, eval_examples=60)


@pytest.fixture
def dataset() -> RecallDataset:
    return RecallDataset(CONFIG, "eval")


def test_an_oracle_recalls_everything(dataset: RecallDataset) -> None:
    result = recall_accuracy(Oracle(dataset), dataset, batch_size=7)
    assert result.accuracy == 1.0
    assert result.questions == 60 * 8
    assert np.nanmin(result.by_distance()[0]) == 1.0
    interval = result.interval()
    assert interval.low == pytest.approx(60 / (60 + 1.959964**2), abs=1e-6)  # Wilson at 60 of 60 sequences
    assert interval.mean == interval.high == 1.0


class Forgetful(Oracle):
    """Knows nothing of every other sequence."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input_ids)
        logits[::2] = 0.0
        return logits


def test_questions_of_one_sequence_are_no_independent_measurements(dataset: RecallDataset) -> None:
    """Sequences that are known whole or not at all: 480 answers say as much as 60 do."""
    result = recall_accuracy(Forgetful(dataset), dataset, batch_size=6)
    assert result.correct.sum(1).tolist() == [0, 8] * 30
    assert result.counts.sum(1).tolist() == [8] * 60
    interval = result.interval()
    error = np.sqrt(0.25 / 59) * 2.0010  # of the mean of 60 values that are 0 or 1, by Student's t
    trials = 0.25 / (error / 1.959964) ** 2
    half = 1.959964 / (1 + 1.959964**2 / trials) * np.sqrt(0.25 / trials + 1.959964**2 / (4 * trials**2))
    assert interval.mean == 0.5
    assert interval.half == pytest.approx(half, rel=1e-4)
    assert interval.half > 0.12  # by the questions it would be 0.045


def test_nor_are_those_in_one_bin_of_the_distance(dataset: RecallDataset) -> None:
    result = recall_accuracy(Forgetful(dataset), dataset, bins=[0, 40, 64])
    shares, low, high = result.by_distance()
    for number, questions in enumerate(result.counts.T):
        asked = questions > 0
        assert shares[number] == pytest.approx(questions[1::2].sum() / questions.sum())  # every other sequence is known
        trials = questions.sum() ** 2 / np.square(questions).sum()
        assert trials <= asked.sum() < questions.sum()
        below, above = wilson(shares[number], trials)
        assert low[number] <= below < above <= high[number]


def test_one_sequence_alone_has_no_interval(dataset: RecallDataset) -> None:
    result = recall_accuracy(Oracle(dataset), dataset, max_sequences=1)
    assert result.interval().mean == 1.0
    assert np.isnan(result.interval().low)
    rows = Evaluation().add({"oracle": result}).sections()[0].items[1]
    assert isinstance(rows, Table)
    assert rows.rows[0][:3] == ["oracle", "100.0 %", MISSING]


def test_guessing_among_the_values_is_right_by_chance(dataset: RecallDataset) -> None:
    result = recall_accuracy(Guesser(dataset), dataset)
    assert result.chance == 1 / 10
    assert result.interval().low < 0.1 < result.interval().high


def test_the_bins_show_how_far_a_model_sees(dataset: RecallDataset) -> None:
    result = recall_accuracy(Oracle(dataset, sight=30), dataset, bins=[0, 10, 20, 30, 64])
    counts, (shares, low, high) = result.counts.sum(0), result.by_distance()
    assert counts[0] == 0  # min_distance
    assert np.isnan([shares[0], low[0], high[0]]).all()
    assert shares[1:].tolist() == [1.0, 1.0, 0.0]
    distances = np.concatenate([row["distances"][row["distances"] > 0] for row in map(dataset.__getitem__, range(60))])
    assert counts.tolist() == np.histogram(distances, [0, 10, 20, 30, 64])[0].tolist()
    assert result.accuracy == pytest.approx((distances < 30).mean())


def test_bins_take_in_every_question(dataset: RecallDataset) -> None:
    for bins in (1, 5, 1000):
        assert recall_accuracy(Oracle(dataset), dataset, bins=bins).questions == 480
    for edges in ([20, 64], [0, 30], [0, 64, 40]):
        with pytest.raises(EvaluationError, match="take in every distance"):
            recall_accuracy(Oracle(dataset), dataset, bins=edges)
    with pytest.raises(EvaluationError, match="at least 1"):
        recall_accuracy(Oracle(dataset), dataset, bins=0)
