"""Documents into sequences of one length, without losing where a document begins.

A sequence holds one or more *pieces*: a stretch of one document. The memory takes each piece for a document of its own,
for it is empty at a sequence's start. Every row says so in four ways that must agree: `document_ids` (what the memory's
chunk grid follows), `position_ids` (what attention follows), `labels` (no loss across a border) and `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from inlay.data.config import Packing

if TYPE_CHECKING:
    from datasets import Dataset

PADDING_DOCUMENT = -1
NO_LABEL = -100
TOKEN_COLUMNS = ("input_ids", "document_ids", "labels", "attention_mask", "position_ids")
NAMES_COLUMN = "document_names"


class Piece(NamedTuple):
    """A stretch of one document: the document's name and the tokens, `[tokens]` int32."""

    name: str
    tokens: np.ndarray


Row = list[Piece]


def pack_pieces(
    documents: Iterable[tuple[str, np.ndarray]], *, sequence_length: int, packing: Packing, min_tokens: int = 2
) -> Iterator[Row]:
    """Yield the pieces of each sequence, holding no more than one sequence and one document at a time.

    Args:
        documents: name and token ids (`[tokens]`) of each, in the order they are packed.
        sequence_length: tokens in a full row.
        packing: "cut": a row is one piece, cut from the document's start on.
            "concatenate": a row is filled from document after document; every token is kept, and a document that does
            not end with the row goes on in the next one as a new piece.
        min_tokens: "cut" drops what is left of a document below so many tokens.
    """
    if packing == "cut":
        for name, tokens in documents:
            for start in range(0, len(tokens), sequence_length):
                piece = Piece(name, tokens[start : start + sequence_length])
                if len(piece.tokens) >= min(min_tokens, sequence_length):
                    yield [piece]
        return
    row: Row = []
    room = sequence_length
    for name, tokens in documents:
        while len(tokens):
            piece, tokens = Piece(name, tokens[:room]), tokens[room:]
            row.append(piece)
            room -= len(piece.tokens)
            if room == 0:
                yield row
                row, room = [], sequence_length
    if row:
        yield row


def fill_row(row: Row, *, sequence_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """The columns of one sequence, each `[sequence_length]`; what they hold is told at `pack_documents`."""
    columns = {name: np.zeros(sequence_length, dtype=np.int32) for name in TOKEN_COLUMNS}
    columns["input_ids"].fill(pad_token_id)
    columns["document_ids"].fill(PADDING_DOCUMENT)
    columns["labels"].fill(NO_LABEL)
    start = 0
    for index, piece in enumerate(row):
        stop = start + len(piece.tokens)
        columns["input_ids"][start:stop] = piece.tokens
        columns["document_ids"][start:stop] = index
        columns["labels"][start:stop] = piece.tokens
        columns["attention_mask"][start:stop] = 1
        columns["position_ids"][start:stop] = np.arange(stop - start)
        if index:
            columns["labels"][start] = NO_LABEL
        start = stop
    return columns


def rows_to_dataset(rows: Sequence[Row], *, sequence_length: int, pad_token_id: int) -> Dataset:
    """Fill `rows` into an arrow data set (20 bytes a token) whose items are numpy arrays."""
    from datasets import Dataset

    filled = {name: np.empty((len(rows), sequence_length), dtype=np.int32) for name in TOKEN_COLUMNS}
    for index, row in enumerate(rows):
        for name, column in fill_row(row, sequence_length=sequence_length, pad_token_id=pad_token_id).items():
            filled[name][index] = column
    names = [[piece.name for piece in row] for row in rows]
    return Dataset.from_dict({**filled, NAMES_COLUMN: names}).with_format(
        "numpy", columns=list(TOKEN_COLUMNS), output_all_columns=True
    )


def pack_documents(
    token_id_lists: Sequence[Sequence[int] | np.ndarray],
    names: Sequence[str],
    *,
    sequence_length: int,
    packing: Packing,
    pad_token_id: int,
    min_tokens: int = 2,
) -> Dataset:
    """Pack tokenised documents into a data set of equally long sequences.

    Args:
        token_id_lists: token ids of each document, EOS included where it is wanted.
        names: the documents' names, as many.
        sequence_length: T, tokens in a row.
        packing, min_tokens: see `pack_pieces`.
        pad_token_id: fills a row behind its last piece.

    Returns:
        One row per sequence, each column `[T]` but the last.
        `input_ids`.
        `document_ids` count the row's pieces from 0; -1 on padding.
        `position_ids` count from 0 in each piece; 0 on padding.
        `attention_mask` is 1, and 0 on padding.
        `labels` are the input ids, not shifted (the model does that), with -100 on padding and on the first token of
        every piece but the row's first, so that nothing is predicted across a border.
        `document_names`, `[pieces]`, names the document of each document id.

    Raises:
        ValueError: not as many names as documents.
    """
    documents = ((name, np.asarray(ids, dtype=np.int32)) for name, ids in zip(names, token_id_lists, strict=True))
    rows = list(pack_pieces(documents, sequence_length=sequence_length, packing=packing, min_tokens=min_tokens))
    return rows_to_dataset(rows, sequence_length=sequence_length, pad_token_id=pad_token_id)


def collate(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = TOKEN_COLUMNS) -> dict[str, torch.Tensor]:
    """Stack rows into a batch, each column `[B, T]` int64: the data collator of every data set of this package.

    A row of several documents needs attention that ends at the documents' borders. Transformers reads the borders off
    `position_ids`, but only when no `attention_mask` is given (and no cache: call the model with `use_cache=False`); so
    the mask is left out of such a batch. Padding stands last, where causal attention never looks, and has no label.

    Args:
        rows: items of a data set; columns beyond `columns` stay behind.
        columns: what the batch holds; add "distances" to evaluate recall by distance.
    """
    batch = {
        name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows]).astype(np.int64)) for name in columns
    }
    if "document_ids" in batch and bool((batch["document_ids"] > 0).any()):
        batch.pop("attention_mask", None)
    return batch
