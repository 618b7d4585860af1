"""``SoftTokens``: a few slots per row that stand for a context, whatever wrote them.

A slot is what one position of the decoder's input holds, in one of two forms:

- ``embeddings``: a vector in the decoder's embedding space, `[B, M, D]`. The decoder reads it like a token, in every
  layer.
- ``kv``: the keys and values that such a position would leave in the cache of every layer (500xCompressor). Nothing of
  it is computed again; it costs 2·layers·H_kv·d_head numbers a slot instead of D.

Plain text is a memory too: :func:`embed_text` makes each token a slot. Full text, text cut to a budget, no context
(M = 0) and what a compressor wrote then go through one layout and one way of decoding, and differ in their slots alone.

Rows have different numbers of slots: row b uses its first ``mask[b].sum()``, and what lies behind them is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.softtoken.errors import SoftTokenError

Form = Literal["embeddings", "kv"]


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """M slots per row that stand for a context.

    Attributes:
        embeddings: `[B, M, D]` in the decoder's embedding space; None in form ``kv``.
        mask: `[B, M]` bool, True where a row has a slot; a row's slots stand at its beginning.
        kv: Per decoder layer (keys, values), each `[B, H_kv, M, d_head]`, the keys rotated for positions 0 to M−1; None
            in form ``embeddings``.

    Raises:
        SoftTokenError: Neither or both forms are given, shapes disagree, or a row's slots have a gap.
    """

    embeddings: Tensor | None
    mask: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...] | None = None

    def __post_init__(self) -> None:
        if (self.embeddings is None) == (not self.kv):
            raise SoftTokenError("soft tokens are either embeddings or keys and values (kv): give one of them")
        if self.mask.dtype != torch.bool or self.mask.ndim != 2:
            raise SoftTokenError(f"mask is [B, M] bool; got {[*self.mask.shape]} of {self.mask.dtype}")
        rows, slots = self.mask.shape
        if self.embeddings is not None and (self.embeddings.ndim != 3 or self.embeddings.shape[:2] != (rows, slots)):
            raise SoftTokenError(f"embeddings are [B, M, D]; got {[*self.embeddings.shape]} with mask {[rows, slots]}")
        for layer, pair in enumerate(self.kv or ()):
            for tensor in pair:
                if tensor.ndim != 4 or tensor.shape[0] != rows or tensor.shape[2] != slots:
                    raise SoftTokenError(
                        f"keys and values are [B, H_kv, M, d_head]; layer {layer} has {[*tensor.shape]} with mask "
                        f"{[rows, slots]}"
                    )
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise SoftTokenError("a row's slots stand at its beginning, without a gap; order them with left_aligned()")

    @property
    def form(self) -> Form:
        """``embeddings`` or ``kv``."""
        return "kv" if self.embeddings is None else "embeddings"

    @property
    def rows(self) -> int:
        """Rows B."""
        return self.mask.shape[0]

    @property
    def slots(self) -> int:
        """Slots M of the longest row, or of the padding where that is longer."""
        return self.mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Slots that each row uses, `[B]` int64."""
        return self.mask.sum(dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, padding left out."""
        return int(self.mask.sum()) * sum(
            tensor.element_size() * math.prod(tensor.shape) // max(1, self.mask.numel()) for tensor in self._tensors()
        )

    def select(self, indices: Sequence[int] | Tensor) -> SoftTokens:
        """These rows, in this order; an index may come twice."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.mask.device)
        index = torch.where(index < 0, index + self.rows, index)
        return self._map(lambda tensor: tensor.index_select(0, index), self.mask[index])

    def row(self, index: int) -> SoftTokens:
        """One row as a batch of 1, without padding."""
        if not -self.rows <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        index %= self.rows
        used = int(self.mask[index].sum())
        one = slice(index, index + 1)
        mask = self.mask[one, :used]
        if self.embeddings is not None:
            return SoftTokens(self.embeddings[one, :used], mask)
        return self._map(lambda tensor: tensor[one, :, :used], mask)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SoftTokens:
        """On another device, or in another floating dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype), self.mask.to(device=device))

    def detach(self) -> SoftTokens:
        """Without the graph that made them."""
        return self._map(Tensor.detach, self.mask)

    @staticmethod
    def cat(batches: Sequence[SoftTokens]) -> SoftTokens:
        """The rows of all ``batches``, one below the other, padded to the most slots among them.

        Raises:
            SoftTokenError: There are none, or they are not of one form and shape.
        """
        _check_alike(batches)
        slots = max(batch.slots for batch in batches)
        mask = torch.cat([F.pad(batch.mask, (0, slots - batch.slots)) for batch in batches])

        def below(tensors: Sequence[Tensor]) -> Tensor:  # M is the last dimension but one in both forms
            return torch.cat([F.pad(tensor, (0, 0, 0, slots - tensor.shape[-2])) for tensor in tensors])

        return _join(batches, below, mask)

    @staticmethod
    def concatenate(segments: Sequence[SoftTokens]) -> SoftTokens:
        """One memory of several: row b has its slots of the first segment, then those of the second, and so on.

        Raises:
            SoftTokenError: There are none, they are not of one shape with the same rows, or they are of form ``kv``,
                where each segment's keys are rotated for positions from 0 on.
        """
        _check_alike(segments)
        if segments[0].form == "kv":
            raise SoftTokenError(
                "segments of form kv cannot be put one behind the other: each one's keys are rotated for positions "
                "from 0 on. Join segments as embeddings, and turn the whole into keys and values"
            )
        if len({segment.rows for segment in segments}) > 1:
            raise SoftTokenError(f"segments have different rows: {[segment.rows for segment in segments]}")
        mask = torch.cat([segment.mask for segment in segments], dim=1)
        embeddings = torch.cat([segment.embeddings for segment in segments if segment.embeddings is not None], dim=1)
        return left_aligned(embeddings, mask)

    def _tensors(self) -> list[Tensor]:
        pairs = [tensor for pair in self.kv or () for tensor in pair]
        return pairs if self.embeddings is None else [self.embeddings]

    def _map(self, change: Callable[[Tensor], Tensor], mask: Tensor) -> SoftTokens:
        return _join([self], lambda tensors: change(tensors[0]), mask)


def embed_text(model: Any, ids: Tensor, mask: Tensor) -> SoftTokens:
    """Plain text as a memory: each token's row of the decoder's embedding table is a slot.

    Args:
        model: A Hugging Face causal LM.
        ids: `[B, S]` token ids.
        mask: `[B, S]`, True (or 1) at tokens; padding may stand on either side.

    Returns:
        Slots `[B, M, D]`, M the tokens of the longest row.
    """
    return left_aligned(model.get_input_embeddings()(ids), mask.to(torch.bool))


def left_aligned(embeddings: Tensor, mask: Tensor) -> SoftTokens:
    """Slots `[B, M, D]` of which ``mask`` `[B, M]` says which count, moved to the beginning of their rows in order."""
    order = packing_order(mask)[:, : int(mask.sum(dim=1).max()) if mask.numel() else 0]
    return SoftTokens(in_order(embeddings, order), mask.gather(1, order))


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    """`[B, T, D]` and indices `[B, N]` to `[B, N, D]`: in each row, the vectors of those indices.

    A gather: the backward of ``rows[:, order]`` adds up one by one, at several times the cost.
    """
    return rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def packing_order(mask: Tensor, side: Literal["left", "right"] = "right") -> Tensor:
    """Indices `[B, T]` that move each row's padding to its ``side`` and keep the order of what counts.

    Args:
        mask: `[B, T]` bool, True at what counts.
        side: Where the padding goes.
    """
    return (mask if side == "left" else ~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _join(batches: Sequence[SoftTokens], join: Callable[[Sequence[Tensor]], Tensor], mask: Tensor) -> SoftTokens:
    """Soft tokens of whose every tensor ``join`` makes one out of those of ``batches``."""
    joined = [join(tensors) for tensors in zip(*(batch._tensors() for batch in batches), strict=True)]
    if batches[0].form == "embeddings":
        return SoftTokens(joined[0], mask)
    return SoftTokens(None, mask, tuple(zip(joined[::2], joined[1::2], strict=True)))


def _check_alike(batches: Sequence[SoftTokens]) -> None:
    if not batches:
        raise SoftTokenError("there are no soft tokens to join")
    shapes = {
        (batch.form, *((t.shape[1], t.shape[-1]) if t.ndim == 4 else t.shape[-1:] for t in batch._tensors()))
        for batch in batches
    }
    if len(shapes) > 1:
        raise SoftTokenError(
            f"only soft tokens of one form, width and number of layers can be joined; got {len(shapes)} kinds"
        )
