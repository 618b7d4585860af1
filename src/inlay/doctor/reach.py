"""Reach: how much of what the memory writes in a batch is ever read.

A chunk is applied before it is written, so the last chunk of every document is written for nobody, and a document of
one chunk trains nothing. Counted on a real batch, as the memory itself counts: padding is no token, each document has
its own chunk grid (``boundary: reset``) or a row is one document (``carry``).

Reach says how much there is to learn from, not how large the gradient is: a short document is not in itself why a
gradient vanishes (one row of 125 chunks has about four times the gradient of one of 7). The attribution measures that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.reach_plan import (
    chunks_in,
    ever_read_share,
    mean_reach_share,
    percent,
    plan_reach,
    plan_table,
    reach_of_chunk,
    set_length,
)
from inlay.fastweight import FastWeightConfig
from inlay.fastweight.context import documents_of
from inlay.report import Section, Table, Text
from inlay.report.document import Align
from inlay.report.numbers import Cell

Boundary = Literal["reset", "carry"]

_GOOD_CHUNKS = 8
"""Chunks that the fixes aim at: 87.5 % of the updates are read."""
_PLANNED_CHUNKS = (3, 8, 16, 32, 125)
_SHOWN_LENGTHS = 12


@dataclass(frozen=True)
class DocumentReach:
    """One document of the batch.

    Attributes:
        row: Its row in the batch.
        tokens: Tokens T, padding not counted.
        chunks: n = ceil(T / C).
        ever_read: Share of its chunks whose update is ever read, (n − 1) / n.
        mean_reach: (n − 1) / (2 n).
    """

    row: int
    tokens: int
    chunks: int
    ever_read: float
    mean_reach: float


@dataclass(frozen=True)
class BoundaryReach:
    """The batch under one boundary.

    Attributes:
        boundary: ``reset`` or ``carry``.
        documents: Each document (with ``carry``: each row).
        chunks: Chunks of all documents.
        ever_read: Share of all chunks whose update is ever read.
        mean_reach: Mean over all chunks of the share of their document that reads their update.
        reading_share: Share of the tokens that read a memory with something in it: all beyond a first chunk.
        single_chunk: Documents of one chunk, in which nothing is read.
    """

    boundary: Boundary
    documents: tuple[DocumentReach, ...]
    chunks: int
    ever_read: float
    mean_reach: float
    reading_share: float
    single_chunk: int

    @property
    def typical_tokens(self) -> int:
        """Tokens of the median document."""
        return median_low(document.tokens for document in self.documents)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest document."""
        return max(document.tokens for document in self.documents)


@dataclass(frozen=True)
class Reach:
    """What the memory can reach in one batch.

    Attributes:
        chunk_size: Tokens per chunk C.
        boundary: As configured.
        exposure: As configured: above 0 a chunk reads a share of its own update while training, and only then.
        frame_rate: Tokens per second of audio; None for text.
        rows: Rows B of the batch.
        row_tokens: Tokens T of a row, padding included.
        reset: The batch with ``boundary: reset``.
        carry: The batch with ``boundary: carry``.
        length_key: The recipe's key for a length.
    """

    chunk_size: int
    boundary: Boundary
    exposure: float
    frame_rate: float | None
    rows: int
    row_tokens: int
    reset: BoundaryReach
    carry: BoundaryReach
    length_key: str = "data.sequence_length"

    @property
    def configured(self) -> BoundaryReach:
        """The one of the two that the memory runs with."""
        return self.reset if self.boundary == "reset" else self.carry

    def findings(self) -> list[Finding]:
        """``reach.never_read`` (fatal) where nothing written is read, ``reach.short`` where over a third is not."""
        here = self.configured
        read = here.chunks - len(here.documents)
        if not read:
            return [Finding("reach.never_read", Severity.FATAL, self._never_read(), self._fix())]
        if 3 * read < 2 * here.chunks:
            typical = chunks_in(here.typical_tokens, self.chunk_size)
            says = (
                f"{percent(1 - here.ever_read)} of this batch's chunks ({here.chunks - read} of {here.chunks}) are "
                f"never read by a later one: the median document has {here.typical_tokens:,} tokens, {typical} "
                f"chunk{'s' * (typical != 1)} of {self.chunk_size}. That is little to learn from, though not in "
                "itself a reason for the gradient to vanish"
            )
            return [Finding("reach.short", Severity.WARNING, says, self._fix())]
        return []

    def section(self) -> Section:
        """Both boundaries side by side, the documents with their reach by chunk, and what it takes to have more."""
        text = (
            "Chunk i of a document of n chunks is read by the n−1−i chunks after it. Ever read: the share of chunks "
            "whose update is read at all, (n−1)/n. Mean reach: the mean over chunks of (n−1−i)/n, which is (n−1)/2n "
            "and stays below one half."
        )
        plans = [plan_reach(chunk_size=self.chunk_size, chunks=n, frame_rate=self.frame_rate) for n in _PLANNED_CHUNKS]
        planned = plan_table(plans, f"What it takes: the length of a document, in chunks of {self.chunk_size}.")
        note = Text(
            "How much is read says how much there is to learn from. It does not say how large the gradient is; the "
            "attribution measures that."
        )
        return Section("Reach", text, [self._side_by_side(), self._documents_table(), planned, note])

    def _never_read(self) -> str:
        here = self.configured
        says = (
            f"none of the {len(here.documents)} documents of this batch is longer than a chunk (boundary: "
            f"{self.boundary}, chunk_size: {self.chunk_size}, the longest has {here.longest_tokens:,} tokens), so "
            "nothing that the memory writes is ever read"
        )
        if self.exposure:
            return f"{says}; what gradient it gets is of exposure {self.exposure}, which evaluation turns off"
        return f"{says} and it gets no gradient"

    def _fix(self) -> str:
        """What would give the median document 8 chunks or more."""
        here = self.configured
        ways = []
        size = (here.typical_tokens - 1) // (_GOOD_CHUNKS - 1)
        if size:
            given = chunks_in(here.typical_tokens, size)
            ways.append(f"memory.chunk_size: {size} gives a document of {here.typical_tokens:,} tokens {given} chunks")
        wanted = _GOOD_CHUNKS * self.chunk_size
        if here.longest_tokens >= self.row_tokens:
            setting = set_length(self.length_key, wanted, self.frame_rate)
            ways.append(f"{setting} makes 8 chunks of documents that are that long")
        else:  # no document fills its row: a longer row makes none of them longer
            ways.append(f"documents of {wanted:,} tokens have 8 chunks ({self.length_key} cuts none of these)")
        if self.boundary == "reset" and self.carry.ever_read > self.reset.ever_read:
            ways.append(
                f"memory.boundary: carry, if the documents of a row belong together, makes "
                f"{chunks_in(self.carry.typical_tokens, self.chunk_size)} chunks of a row"
            )
        return "; or ".join(ways)

    def _side_by_side(self) -> Table:
        both = (self.reset, self.carry)

        def lengths(reach: BoundaryReach) -> str:
            shortest = min(document.tokens for document in reach.documents)
            return f"{shortest:,} / {reach.typical_tokens:,} / {reach.longest_tokens:,}"

        rows: list[list[Cell]] = [
            ["documents", *(f"{len(reach.documents):,}" for reach in both)],
            ["tokens of a document (shortest / median / longest)", *map(lengths, both)],
            ["chunks", *(f"{reach.chunks:,}" for reach in both)],
            ["ever read", *(percent(reach.ever_read) for reach in both)],
            ["mean reach", *(percent(reach.mean_reach) for reach in both)],
            ["tokens that read a memory", *(percent(reach.reading_share) for reach in both)],
            ["documents of one chunk", *(f"{reach.single_chunk:,}" for reach in both)],
        ]
        headings = [f"{reach.boundary}{' (configured)' * (reach.boundary == self.boundary)}" for reach in both]
        caption = f"A batch of {self.rows} rows of {self.row_tokens:,} tokens, chunks of {self.chunk_size}."
        return Table(["boundary", *headings], rows, caption, align=["left", "right", "right"])

    def _documents_table(self) -> Table:
        same = sorted(d.tokens for d in self.reset.documents) == sorted(d.tokens for d in self.carry.documents)
        groups = [("both", self.reset)] if same else [("reset", self.reset), ("carry", self.carry)]
        rows: list[list[Cell]] = []
        left_out = 0
        for name, reach in groups:
            tokens_by_chunks: dict[int, list[int]] = {}
            for document in reach.documents:
                tokens_by_chunks.setdefault(document.chunks, []).append(document.tokens)
            counts = sorted(tokens_by_chunks)
            shown = _spread(counts, _SHOWN_LENGTHS)
            left_out += len(counts) - len(shown)
            rows += [_length_row(name, n, tokens_by_chunks[n]) for n in shown]
        caption = "Documents by their number of chunks n, and the share of the document that reads chunk i."
        if left_out:
            caption += f" {left_out} lengths in between are not shown."
        columns = ["boundary", "chunks", "documents", "tokens", "ever read", "mean reach"]
        align: list[Align] = ["left", *("right",) * 10]
        return Table([*columns, "i = 0", "n/4", "n/2", "n−2", "n−1"], rows, caption, align=align)


def examine_reach(
    batch: Mapping[str, Any],
    config: FastWeightConfig,
    *,
    frame_rate: float | None = None,
    length_key: str = "data.sequence_length",
) -> Reach:
    """Count what is read in a batch, for both boundaries.

    Documents are told apart as the memory does it: by ``document_ids`` ``[B, T]`` (−1 for padding); without them by
    where ``position_ids`` restart; padding also where ``attention_mask`` ``[B, T]`` is 0. With none of these every row
    is one document.

    Args:
        batch: As the data's ``collate`` makes it; any of its columns may be missing, but not all.
        config: The memory's configuration: chunk size, boundary and exposure.
        frame_rate: Tokens per second of audio, for the planner's table; None for text.
        length_key: The recipe's key for a length, for the fixes.

    Raises:
        ValueError: The batch has no ``[B, T]`` column, or no token that is not padding.
    """
    shape = _shape(batch)
    documents = _document_lengths(batch, shape, carry=False)
    rows = _document_lengths(batch, shape, carry=True)
    if not rows:
        raise ValueError(f"the batch [{shape[0]}, {shape[1]}] holds no token that is not padding")
    return Reach(
        chunk_size=config.chunk_size,
        boundary=config.boundary,
        exposure=config.exposure,
        frame_rate=frame_rate,
        rows=shape[0],
        row_tokens=shape[1],
        reset=boundary_reach("reset", documents, config.chunk_size),
        carry=boundary_reach("carry", rows, config.chunk_size),
        length_key=length_key,
    )


def boundary_reach(boundary: Boundary, lengths: Sequence[tuple[int, int]], chunk_size: int) -> BoundaryReach:
    """Reach of documents given as ``(row, tokens)``, of which there is at least one."""
    documents = []
    for row, tokens in lengths:
        n = chunks_in(tokens, chunk_size)
        documents.append(DocumentReach(row, tokens, n, ever_read_share(n), mean_reach_share(n)))
    chunks = sum(document.chunks for document in documents)
    tokens_in_all = sum(document.tokens for document in documents)
    reading = sum(max(0, document.tokens - chunk_size) for document in documents)
    return BoundaryReach(
        boundary=boundary,
        documents=tuple(documents),
        chunks=chunks,
        ever_read=(chunks - len(documents)) / chunks,
        mean_reach=sum(document.mean_reach * document.chunks for document in documents) / chunks,
        reading_share=reading / tokens_in_all,
        single_chunk=sum(document.chunks == 1 for document in documents),
    )


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(B, T) of the batch."""
    for name in ("input_ids", "inputs_embeds", "document_ids", "attention_mask", "position_ids"):
        column = batch.get(name)
        if isinstance(column, Tensor) and column.dim() >= 2:
            return column.shape[0], column.shape[1]
    raise ValueError(f"the batch has no input_ids, document_ids or attention_mask [B, T]; it has {sorted(batch)}")


def _document_lengths(batch: Mapping[str, Any], shape: tuple[int, int], *, carry: bool) -> list[tuple[int, int]]:
    """``(row, tokens)`` of every document of the batch, in order."""
    mask = batch.get("attention_mask")
    ids = documents_of(
        *shape,
        explicit=batch.get("document_ids"),
        attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        position_ids=batch.get("position_ids"),
        carry=carry,
        device=torch.device("cpu"),
    )
    if ids is None:
        return [(row, shape[1]) for row in range(shape[0])]
    lengths = []
    for row, line in enumerate(ids):
        _, counts = line[line >= 0].unique_consecutive(return_counts=True)
        lengths += [(row, count) for count in counts.tolist()]
    return lengths


def _length_row(boundary: str, n: int, tokens: Sequence[int]) -> list[Cell]:
    shortest, longest = min(tokens), max(tokens)
    length = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    shown = (0, n // 4, n // 2, n - 2, n - 1)
    by_chunk = [percent(reach_of_chunk(i, n)) if i >= 0 else None for i in shown]
    return [boundary, n, len(tokens), length, percent(ever_read_share(n)), percent(mean_reach_share(n)), *by_chunk]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the sorted values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]
