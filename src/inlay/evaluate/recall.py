"""Recall: of the values that a sequence asks for, how many does the model name, and how far back were they?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from inlay.data.packing import NO_LABEL, TOKEN_COLUMNS, collate
from inlay.data.recall import RecallDataset
from inlay.evaluate.intervals import Interval, share_interval
from inlay.evaluate.scoring import (
    EvaluationError,
    Floats,
    Integers,
    Progress,
    batches,
    choose,
    device_of,
    evaluating,
    logits_of,
)


@dataclass(frozen=True, eq=False)
class RecallAccuracy:
    """Answers to recall questions, by distance from the pair's value to the key that asks.

    Attributes:
        edges: ``[N + 1]`` edges of the distance bins, in tokens; a bin holds its lower edge and not its upper one.
        correct: ``[S, N]`` right answers of each sequence in each bin.
        counts: ``[S, N]`` its questions.
        chance: Share that guessing among the values gets right.
    """

    edges: Floats
    correct: Integers
    counts: Integers
    chance: float

    @property
    def questions(self) -> int:
        """Questions in all."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return float(self.correct.sum() / self.counts.sum())

    def interval(self) -> Interval:
        """The accuracy with its 95 % interval, from the spread between sequences: a sequence's questions share its
        pairs and the memory that was written of them. The ends are NaN with fewer than two sequences.
        """
        return share_interval(self.correct.sum(1), self.counts.sum(1))

    def by_distance(self) -> tuple[Floats, Floats, Floats]:
        """``[N]`` share of right answers in each bin and the ends of its interval, likewise by sequence; NaN where no
        sequence has a question, and where fewer than two have."""
        bins = [share_interval(*one) for one in zip(self.correct.T, self.counts.T, strict=True)]
        mean, low, high = np.array([(one.mean, one.low, one.high) for one in bins]).T
        return mean, low, high

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        shares, _, _ = self.by_distance()
        return {
            "accuracy": self.interval().to_json(),
            "questions": self.questions,
            "sequences": len(self.counts),
            "chance": self.chance,
            "distance_edges": self.edges.tolist(),
            "accuracy_by_distance": shares.tolist(),
            "counts": self.counts.sum(0).tolist(),
        }


def recall_accuracy(
    model: nn.Module,
    dataset: RecallDataset,
    *,
    bins: int | Sequence[float] = 8,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    max_sequences: int | None = None,
    progress: Progress | None = None,
) -> RecallAccuracy:
    """The share of questions whose value has the largest logit of the whole vocabulary at the key that asks.

    Teacher-forced: earlier answers in the sequence are the right ones, whatever the model would have said.

    Args:
        model: A causal LM, as in :func:`inlay.evaluate.loss_by_position`.
        dataset: Recall sequences.
        bins: Distance bins: as many of equal width over the distances met, or their edges, ascending.
        batch_size: Sequences in a batch B.
        device: Where the model is; by default its first parameter's.
        max_sequences: Take no more than so many sequences, evenly spaced over the data set.
        progress: Called after each batch with the sequences done and in all.

    Raises:
        EvaluationError: There is no sequence, or the edges do not take in every distance.
    """
    where = device_of(model) if device is None else torch.device(device)
    with_distances = partial(collate, columns=(*TOKEN_COLUMNS, "distances"))
    distances, right, asked_by = [], [], []
    with evaluating(model):
        for batch in batches(
            dataset,
            choose(len(dataset), max_sequences),
            collate=with_distances,
            batch_size=batch_size,
            device=where,
            progress=progress,
        ):
            wanted = batch["labels"][:, 1:]
            asked = wanted != NO_LABEL
            hit = asked & (logits_of(model, batch)[:, :-1].argmax(-1) == wanted)
            right.append(hit[asked].cpu().numpy())
            asked_by.append(asked.sum(1).cpu().numpy())
            distances.append(batch["distances"][:, 1:][asked].cpu().numpy())
    distance, correct = np.concatenate(distances), np.concatenate(right)
    edges, questions = _edges(bins, distance), np.concatenate(asked_by)
    sequence = np.repeat(np.arange(len(questions)), questions)
    cells = (np.arange(len(questions) + 1), edges)
    return RecallAccuracy(
        edges,
        np.histogram2d(sequence[correct], distance[correct], cells)[0].astype(np.int64),
        np.histogram2d(sequence, distance, cells)[0].astype(np.int64),
        1 / dataset.config.values,
    )


def _edges(bins: int | Sequence[float], distance: Integers) -> Floats:
    first, last = int(distance.min()), int(distance.max())
    if isinstance(bins, int):
        if bins < 1:
            raise EvaluationError(f"bins should be at least 1; got {bins}")
        return np.unique(np.linspace(first, last + 1, bins + 1).round())
    edges = np.asarray(bins, dtype=np.float64)
    if len(edges) < 2 or not (np.diff(edges) > 0).all() or edges[0] > first or edges[-1] <= last:
        raise EvaluationError(
            f"the edges of the distance bins should ascend and take in every distance from {first} to {last}; got "
            f"{[*bins]}"
        )
    return edges
