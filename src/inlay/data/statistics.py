"""How much of the data a memory can work with: counted before a run, so that a useless one is not started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from inlay.data.packing import Row


@dataclass(frozen=True)
class MemoryStatistics:
    """What a memory of one chunk size finds in a data set; with `boundary: carry`, a row is one piece to it."""

    chunk_size: int
    """Tokens in a chunk."""

    chunks: int
    """Chunks over all pieces, a piece's incomplete last one counted."""

    single_chunk_pieces: int
    """Pieces shorter than two chunks (`chunk_size` tokens or fewer): what they write is never read."""

    reading_share: float
    """Share of the tokens, 0..1, that read a memory with something in it: all but each piece's first chunk."""


@dataclass(frozen=True)
class PackingStatistics:
    """Counts over one packed data set. A piece is a stretch of one document in one sequence (see `packing`)."""

    documents: int
    """Documents packed."""

    mean_document_tokens: float
    """Mean length of a document, in tokens."""

    median_document_tokens: float
    """Median length of a document, in tokens."""

    sequences: int
    """Rows of the data set."""

    sequence_length: int
    """Tokens in a row, padding included."""

    tokens: int
    """Tokens in all rows, padding not included."""

    left_out_tokens: int
    """Tokens of the documents that are in no row: short ends, and what `max_eval_sequences` left out."""

    padding_share: float
    """Share of the rows' places, 0..1, that are padding."""

    piece_tokens: np.ndarray = field(repr=False, compare=False)
    """Length of every piece, in tokens: `[pieces]`."""

    row_tokens: np.ndarray = field(repr=False, compare=False)
    """Length of every row, in tokens, padding not included: `[sequences]`."""

    def memory(self, chunk_size: int, boundary: Literal["reset", "carry"] = "reset") -> MemoryStatistics:
        """What a memory can do with this data.

        Args:
            chunk_size: tokens of a chunk.
            boundary: "reset": each piece has its own chunks. "carry": a row's pieces share them.

        Raises:
            ValueError: `chunk_size` is below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
        lengths = self.row_tokens if boundary == "carry" else self.piece_tokens
        reading = int(np.maximum(lengths - chunk_size, 0).sum())
        return MemoryStatistics(
            chunk_size=chunk_size,
            chunks=int((-(-lengths // chunk_size)).sum()),
            single_chunk_pieces=int((lengths <= chunk_size).sum()),
            reading_share=reading / self.tokens if self.tokens else 0.0,
        )


@dataclass(frozen=True)
class DataStatistics:
    """Counts of a run's data."""

    train: PackingStatistics | None
    """The training set; None for a stream, which is not counted beforehand."""

    eval: PackingStatistics
    """The evaluation set."""

    skipped: int
    """Files and lines left out with `on_error: skip`; each was logged as a warning."""


def packing_statistics(
    document_tokens: Sequence[int], rows: Sequence[Row], *, sequence_length: int
) -> PackingStatistics:
    """Count one packed data set.

    Args:
        document_tokens: length of every document before packing, in tokens.
        rows: the pieces of every sequence, from `pack_pieces`.
        sequence_length: tokens in a row, padding included.
    """
    pieces = np.asarray([len(piece.tokens) for row in rows for piece in row], dtype=np.int64)
    lengths = np.asarray(document_tokens, dtype=np.int64)
    tokens, places = int(pieces.sum()), len(rows) * sequence_length
    return PackingStatistics(
        documents=len(lengths),
        mean_document_tokens=float(lengths.mean()) if len(lengths) else 0.0,
        median_document_tokens=float(np.median(lengths)) if len(lengths) else 0.0,
        sequences=len(rows),
        sequence_length=sequence_length,
        tokens=tokens,
        left_out_tokens=int(lengths.sum()) - tokens,
        padding_share=1 - tokens / places if places else 0.0,
        piece_tokens=pieces,
        row_tokens=np.asarray([sum(len(piece.tokens) for piece in row) for row in rows], dtype=np.int64),
    )


def whole_row_statistics(rows: int, sequence_length: int) -> PackingStatistics:
    """Counts of a data set whose every row is one document without padding (recall). Takes no memory per row."""
    lengths = np.broadcast_to(np.int64(sequence_length), (rows,))
    return PackingStatistics(
        documents=rows,
        mean_document_tokens=float(sequence_length),
        median_document_tokens=float(sequence_length),
        sequences=rows,
        sequence_length=sequence_length,
        tokens=rows * sequence_length,
        left_out_tokens=0,
        padding_share=0.0,
        piece_tokens=lengths,
        row_tokens=lengths,
    )
