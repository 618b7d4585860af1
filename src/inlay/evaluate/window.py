"""Perplexity with a growing context: the same final block of every piece, with more and more before it.

A piece is a document, or what a sequence of a packed data set holds of one. Pieces of one document are no independent
measurements, so intervals are from the spread between documents.

What a model can use of a long context shows when the tokens that are scored stay the same and only what comes before
them grows. A model that sees no further than its attention window stays flat beyond it; one whose memory works goes on
down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from inlay.data.packing import NAMES_COLUMN
from inlay.evaluate.intervals import Interval, numbered, paired_interval
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
    token_bits,
)

Documents: TypeAlias = Iterable[ArrayLike | Mapping[str, Any]]
"""Token ids of each document, or rows of a packed data set."""


@dataclass(frozen=True, eq=False)
class GrowingContext:
    """Loss on the final block of S pieces, by the length of the context before it.

    Attributes:
        contexts: ``[N]`` tokens of context, ascending.
        block: Tokens scored in each piece.
        piece_sums: ``[S, N]`` bits of each piece's block.
        piece_documents: ``[S]`` number, from 0 on, of the document that each piece is from.
        left_out: Pieces shorter than the longest context and the block together.
        fingerprint: Stands for the pieces.
    """

    contexts: Integers
    block: int
    piece_sums: Floats
    piece_documents: Integers
    left_out: int
    fingerprint: str

    @property
    def pieces(self) -> int:
        """Pieces S."""
        return len(self.piece_sums)

    @property
    def documents(self) -> int:
        """Documents that they are from."""
        return len(np.unique(self.piece_documents))

    @property
    def bits(self) -> Floats:
        """``[N]`` bits per token of the block."""
        return np.asarray(self.piece_sums.mean(0) / self.block)

    @property
    def perplexity(self) -> Floats:
        """``[N]`` 2 to the power of the bits per token."""
        return np.asarray(np.exp2(self.bits))

    def gain(self, other: GrowingContext) -> tuple[Interval, ...]:
        """``[N]`` bits per token that ``other`` costs more than this, with paired 95 % intervals over documents.

        Raises:
            EvaluationError: They are not of the same pieces, block and contexts.
        """
        same = self.fingerprint == other.fingerprint and self.block == other.block
        if not same or not np.array_equal(self.contexts, other.contexts):
            raise EvaluationError("these are not of the same pieces, block and contexts, so they cannot be compared")
        counts = self.block * np.bincount(self.piece_documents)
        gap = other.piece_sums - self.piece_sums
        sums = (np.bincount(self.piece_documents, column).astype(np.float64) for column in gap.T)
        return tuple(paired_interval(by_document, counts) for by_document in sums)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "block": self.block,
            "pieces": self.pieces,
            "documents": self.documents,
            "left_out": self.left_out,
            "contexts": self.contexts.tolist(),
            "bits_per_token": self.bits.tolist(),
            "perplexity": self.perplexity.tolist(),
        }


def growing_context(
    model: nn.Module,
    documents: Documents,
    *,
    block: int,
    contexts: Sequence[int],
    batch_size: int = 8,
    device: torch.device | str | None = None,
    max_pieces: int | None = None,
    progress: Progress | None = None,
) -> GrowingContext:
    """Score the final ``block`` tokens of each piece with the last c tokens before them as context, for each c.

    Only pieces that are long enough for the longest context take part, so that every context is measured on the same
    tokens; the others are counted as left out. For the same model without its memory, run it through
    :func:`inlay.evaluate.with_and_without_memory`.

    Args:
        model: A causal LM, as in :func:`inlay.evaluate.loss_by_position`.
        documents: Token ids ``[tokens]`` of each document, each one piece; or a packed data set, whose rows are taken
            apart into their pieces. Without ``document_names`` each piece counts as a document.
        block: Tokens scored at each piece's end.
        contexts: Tokens before the block, each at least 1.
        batch_size: Pieces in a batch B.
        device: Where the model is; by default its first parameter's.
        max_pieces: Take no more than so many of the pieces that are long enough, evenly spaced.
        progress: Called after each batch with the scored blocks and all there are (pieces times contexts).

    Raises:
        EvaluationError: No piece is long enough, or ``block`` or a context is below 1.
    """
    sizes = np.unique(np.asarray(contexts, dtype=np.int64))
    if block < 1 or not len(sizes) or sizes[0] < 1:
        raise EvaluationError(f"block and contexts should be at least 1 token; got {block} and {list(contexts)}")
    needed = block + int(sizes[-1])
    lengths: list[int] = []
    ends: list[Integers] = []
    sources: list[Hashable] = []
    for document in documents:
        names = document.get(NAMES_COLUMN) if isinstance(document, Mapping) else None
        for index, tokens in enumerate(pieces(document)):
            if len(tokens) >= needed:
                ends.append(tokens[-needed:].copy())
                sources.append(len(lengths) if names is None else names[index])
            lengths.append(len(tokens))
    if not ends:
        raise EvaluationError(
            f"no piece of a document has the {needed} tokens that a context of {sizes[-1]} and a block of {block} "
            f"need: the longest of {len(lengths)} has {max(lengths, default=0)}. Ask for shorter contexts, or a "
            "smaller block"
        )
    indices = choose(len(ends), max_pieces)
    chosen = [ends[index] for index in indices]
    from_documents = numbered(sources[index] for index in indices)
    where = device_of(model) if device is None else torch.device(device)
    sums = np.zeros((len(chosen), len(sizes)))
    with evaluating(model):
        for column, context in enumerate(sizes.tolist()):
            start, row = column * len(chosen), 0
            report = progress and _shifted(progress, start, len(chosen) * len(sizes))
            ready = _Ends(chosen, block + context)
            for batch in batches(
                ready, range(len(ready)), collate=_stack, batch_size=batch_size, device=where, progress=report
            ):
                wanted = batch["input_ids"][:, -block - 1 :]
                bits, _ = token_bits(logits_of(model, batch, last=block + 1), wanted)
                sums[row : row + len(bits), column] = bits.sum(1)
                row += len(bits)
    fingerprint = hashlib.sha256(np.stack(chosen).tobytes()).hexdigest()[:16]
    return GrowingContext(sizes, block, sums, from_documents, len(lengths) - len(ends), fingerprint)


def pieces(document: ArrayLike | Mapping[str, Any]) -> list[Integers]:
    """The pieces in a row of a packed data set, padding left out; a document's tokens as they are."""
    if not isinstance(document, Mapping):
        return [np.asarray(document, dtype=np.int64)]
    tokens = np.asarray(document["input_ids"], dtype=np.int64)
    if "document_ids" not in document:
        return [tokens]
    ids = np.asarray(document["document_ids"])
    return [tokens[ids == index] for index in np.unique(ids[ids >= 0])]


class _Ends:
    """The last ``length`` tokens of each piece."""

    def __init__(self, pieces: Sequence[Integers], length: int) -> None:
        self.pieces = pieces
        self.length = length

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Integers]:
        return {"input_ids": self.pieces[index][-self.length :]}


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {"input_ids": torch.from_numpy(np.stack([row["input_ids"] for row in rows]))}


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    return lambda done, _: progress(start + done, total)
