"""Loss by position: a memory that works makes the later tokens of a sequence cheaper.

Long documents fill several sequences each, which are no independent measurements: intervals are from the spread between
documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from inlay.data.packing import NAMES_COLUMN
from inlay.data.packing import collate as default_collate
from inlay.evaluate.by_document import DocumentSums
from inlay.evaluate.intervals import Interval, paired_interval
from inlay.evaluate.scoring import (
    Collate,
    EvaluationError,
    Floats,
    Integers,
    Progress,
    Rows,
    batches,
    choose,
    device_of,
    divide,
    evaluating,
    label_bits,
)
from inlay.fastweight import find_memory

MEMORY, NO_STEP = "memory", "eta = 0"
QUARTERS = 4

Result = TypeVar("Result")


class Buckets(NamedTuple):
    """Loss over stretches of positions.

    Attributes:
        positions: ``[n]`` middle of each stretch, in tokens.
        bits: ``[n]`` bits per token; NaN where there is no label.
        counts: ``[n]`` labels.
    """

    positions: Floats
    bits: Floats
    counts: Integers


@dataclass(frozen=True, eq=False)
class PositionLoss:
    """Cross-entropy by position, over sequences of T positions that hold D documents.

    Attributes:
        sums: ``[T]`` bits of all labels at each position.
        counts: ``[T]`` labels at each position; none at 0, which nothing predicts.
        document_sums: ``[D, 4]`` bits of each document, wherever it lies, in each quarter of the positions.
        document_counts: ``[D, 4]`` labels in them.
        sequences: How many there are.
        fingerprint: Stands for the sequences; the same only for the same ones in the same order.
    """

    sums: Floats
    counts: Integers
    document_sums: Floats
    document_counts: Integers
    sequences: int
    fingerprint: str

    @property
    def positions(self) -> Integers:
        """``[T]`` positions of the predicted tokens, from 0."""
        return np.arange(len(self.sums), dtype=np.int64)

    @property
    def bits(self) -> Floats:
        """``[T]`` bits per token; NaN where there is no label."""
        return divide(self.sums, self.counts)

    @property
    def mean(self) -> float:
        """Bits per token over everything."""
        return float(self.buckets(1).bits[0])

    @property
    def tokens(self) -> int:
        """Labels in all."""
        return int(self.counts.sum())

    @property
    def documents(self) -> int:
        """Documents D that have a label."""
        return int((self.document_counts.sum(1) > 0).sum())

    def quarters(self) -> Floats:
        """``[4]`` bits per token in each quarter of the positions."""
        return self.buckets(QUARTERS).bits

    def buckets(self, n: int) -> Buckets:
        """Bits per token in ``n`` stretches of positions, as equal as can be."""
        if n < 1:
            raise EvaluationError(f"buckets should be at least 1; got {n}")
        n = min(n, len(self.sums))
        bucket = _bucket(self.positions, len(self.sums), n)
        members = np.bincount(bucket, minlength=n)
        sums = np.bincount(bucket, self.sums, minlength=n)
        counts = np.bincount(bucket, self.counts, minlength=n).astype(np.int64)
        return Buckets(np.bincount(bucket, self.positions, minlength=n) / members, divide(sums, counts), counts)

    def to_json(self) -> dict[str, Any]:
        """Means, quarters, and at most 256 stretches of positions, in plain types."""
        stretches = self.buckets(256)
        return {
            "bits_per_token": self.mean,
            "quarters": self.quarters().tolist(),
            "sequences": self.sequences,
            "documents": self.documents,
            "tokens": self.tokens,
            "positions": stretches.positions.tolist(),
            "bits": stretches.bits.tolist(),
            "counts": stretches.counts.tolist(),
        }


@dataclass(frozen=True)
class LossDifference:
    """Loss of one evaluation minus another's, in bits per token.

    Attributes:
        quarters: One for each quarter of the positions.
        mean: Over all positions.
    """

    quarters: tuple[Interval, ...]
    mean: Interval


def loss_by_position(
    model: nn.Module,
    dataset: Rows,
    *,
    collate: Collate = default_collate,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    max_sequences: int | None = None,
    position: Literal["sequence", "document"] = "sequence",
    progress: Progress | None = None,
) -> PositionLoss:
    """The cross-entropy of every label of a data set, summed by position in float64.

    Args:
        model: A causal LM that takes ``input_ids`` and gives logits ``[B, T, vocabulary]`` or an object that has them
            as ``logits``; evaluated in its own dtype and in eval mode.
        dataset: Rows with ``input_ids`` and ``labels`` (not shifted; −100 is ignored), all of one length T. Those with
            the same one of the ``document_names`` are of one document; without names each row's are its own.
        collate: Makes a batch of rows.
        batch_size: Sequences in a batch B.
        device: Where the model is; by default its first parameter's.
        max_sequences: Take no more than so many sequences, evenly spaced over the data set.
        position: Count a token's position from the start of its sequence, or (for rows that hold several documents and
            a memory that is emptied between them) of its document.
        progress: Called after each batch with the sequences done and in all.

    Raises:
        EvaluationError: There is no sequence, or the sequences differ in length.
    """
    where = device_of(model) if device is None else torch.device(device)
    chosen = choose(len(dataset), max_sequences)
    digest = hashlib.sha256()
    sums = counts = None
    by_document, done = DocumentSums(QUARTERS), 0
    with evaluating(model):
        for batch in batches(dataset, chosen, collate=collate, batch_size=batch_size, device=where, progress=progress):
            length = batch["labels"].shape[1]
            if sums is None or counts is None:
                sums, counts = np.zeros(length), np.zeros(length, dtype=np.int64)
            if length != len(sums):
                raise EvaluationError(f"sequences of {len(sums)} and of {length} tokens; all should have one length")
            bits, used = label_bits(model, batch)
            row_by_row = torch.stack([batch["input_ids"], batch["labels"]], dim=1)  # so that B does not matter
            digest.update(row_by_row.cpu().numpy().astype(np.int64).tobytes())
            places = np.broadcast_to(np.arange(1, length), bits.shape)
            if position == "document":
                places = batch["position_ids"][:, 1:].cpu().numpy()
            sums += np.bincount(places[used], bits[used], minlength=length)
            counts += np.bincount(places[used], minlength=length)
            documents = batch["document_ids"][:, 1:].cpu().numpy() if "document_ids" in batch else 0 * places
            rows = chosen[done : done + len(bits)]
            names = [_document_names(dataset[index], index) for index in rows]
            by_document.add(bits, used, _bucket(places, length, QUARTERS), documents, names)
            done += len(bits)
    assert sums is not None
    assert counts is not None
    return PositionLoss(
        sums, counts, by_document.sums, by_document.counts, len(chosen), fingerprint=digest.hexdigest()[:16]
    )


def difference(a: PositionLoss, b: PositionLoss) -> LossDifference:
    """Bits per token of ``a`` minus those of ``b``, with paired 95 % t-intervals over the documents.

    Raises:
        EvaluationError: They are not of the same sequences.
    """
    if a.fingerprint != b.fingerprint or not np.array_equal(a.document_counts, b.document_counts):
        raise EvaluationError(
            "these losses are of different sequences, so their difference says nothing about the models. Evaluate both "
            "on one data set, with one tokenizer and the same max_sequences and position"
        )
    gap, counts = a.document_sums - b.document_sums, a.document_counts
    quarters = tuple(paired_interval(gap[:, q], counts[:, q]) for q in range(QUARTERS))
    return LossDifference(quarters, paired_interval(gap.sum(1), counts.sum(1)))


def with_and_without_memory(model: nn.Module, evaluate: Callable[[], Result]) -> dict[str, Result]:
    """Evaluate the same checkpoint twice: ``{"memory": …, "eta = 0": …}``.

    The second runs within ``memory.disabled()``, which is η = 0 exactly: with η = 0 the memory adds zero to every
    output of its projections, and disabled it adds nothing. Whatever training did to the base model stays in place, so
    the difference is what the memory's state brings, and not what training brought.

    Args:
        model: A model with a memory.
        evaluate: Any evaluation of it, such as ``lambda: growing_context(model, documents, …)``.

    Raises:
        EvaluationError: The model has no memory.
    """
    memory = find_memory(model)
    if memory is None:
        raise EvaluationError(
            f"{type(model).__name__} has no memory to switch off; attach one with inlay.attach or attach_pretrained"
        )
    results = {MEMORY: evaluate()}
    with memory.disabled():
        results[NO_STEP] = evaluate()
    return results


def _document_names(row: Any, index: int) -> list[Hashable]:
    """A name for each document of row ``index``, told apart from all others'."""
    if NAMES_COLUMN in row:
        return list(row[NAMES_COLUMN])
    documents = int(np.max(row["document_ids"])) + 1 if "document_ids" in row else 1
    return [(index, document) for document in range(documents)]


def _bucket(positions: Integers, length: int, n: int) -> Integers:
    """Which of ``n`` stretches of ``length`` positions each position lies in."""
    return positions * n // length
