"""What is written pass by pass: the segments of a batch of contexts, one of each row at a time, and their slots joined.

A row without a further segment sits a pass out, so a long context costs its batch-mates nothing and changes nothing in
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.softtoken.compressors.language_model import KeyValues
from inlay.softtoken.compressors.segments import Runs, Segment
from inlay.softtoken.tokens import SoftTokens, left_aligned, packing_order


@dataclass(frozen=True)
class Passage:
    """One segment of each row that has one.

    Attributes:
        embeds: `[B, n, D]`, the segment's token embeddings, padding behind.
        mask: `[B, n]` bool.
        runs: Which tokens each slot is to stand for.
        earlier: Slots that are read before the segment (``recursive``); None for none.
        before: `[B]`, slots that the row has from earlier segments.
    """

    embeds: Tensor
    mask: Tensor
    runs: Runs
    earlier: SoftTokens | None
    before: Tensor

    def joined(self) -> Text:
        """Earlier slots and the segment as one input."""
        if self.earlier is None:
            return Text(self.embeds, self.mask, self.runs)
        assert self.earlier.embeddings is not None
        both = left_aligned(
            torch.cat([self.earlier.embeddings, self.embeds], dim=1), torch.cat([self.earlier.mask, self.mask], dim=1)
        )
        assert both.embeddings is not None
        return Text(both.embeddings, both.mask, self.runs.shifted(self.earlier.lengths))


@dataclass(frozen=True)
class Text:
    """What the LM reads in a pass.

    Attributes:
        embeds: `[B, T, D]`, padding behind.
        mask: `[B, T]` bool.
        runs: The segment's runs, by their places in it.
    """

    embeds: Tensor
    mask: Tensor
    runs: Runs


@dataclass(frozen=True)
class Written:
    """The slots of a passage; what stands where its ``runs.mask`` is False is never read.

    Attributes:
        embeddings: `[B, M, D]`; None where a kind writes keys and values alone.
        kv: Keys and values where a kind writes them itself, keys rotated for where the slots stand in the memory.
    """

    embeddings: Tensor | None
    kv: KeyValues | None = None


def write_all(
    embeds: Tensor, plans: Sequence[Sequence[Segment]], write: Callable[[Passage], Written], *, recursive: bool
) -> SoftTokens:
    """Write every segment of every row, and put each row's slots one behind the other.

    Args:
        embeds: `[B, S, D]`, token embeddings, padding behind.
        plans: The segments of each row.
        write: What writes a passage.
        recursive: Let each passage read the slots of those before it.

    Returns:
        The slots in the dtype of ``embeds``, as keys and values if ``write`` makes them and as embeddings if not.
    """
    rows = len(plans)
    masks: list[Tensor] = []
    passes: list[Written] = []
    earlier: SoftTokens | None = None
    for index in range(max(map(len, plans))):
        here = [row for row, plan in enumerate(plans) if index < len(plan)]
        where = torch.tensor(here, device=embeds.device)
        before = sum((mask.sum(1) for mask in masks), torch.zeros(rows, dtype=torch.long, device=embeds.device))
        passage = _passage(embeds[where], [plans[row][index] for row in here], earlier, where, before)
        written = write(passage)
        masks.append(_spread(passage.runs.mask, where, rows))
        passes.append(_spread_all(written, where, rows))
        if recursive:
            earlier = _embeddings(passes, masks, embeds.dtype)
    if passes[0].kv is None:
        return _embeddings(passes, masks, embeds.dtype)
    return _keys_and_values([written.kv for written in passes if written.kv is not None], torch.cat(masks, dim=1))


def unused_zeroed(kv: KeyValues, mask: Tensor) -> SoftTokens:
    """Keys and values `[B, H, M, d]` as soft tokens, zero where ``mask`` `[B, M]` is False."""
    unused = ~mask[:, None, :, None]
    return SoftTokens(None, mask, tuple((k.masked_fill(unused, 0), v.masked_fill(unused, 0)) for k, v in kv))


def _passage(
    embeds: Tensor, segments: list[Segment], earlier: SoftTokens | None, rows: Tensor, before: Tensor
) -> Passage:
    starts, tokens = torch.tensor([(segment.start, segment.tokens) for segment in segments], device=rows.device).T
    steps = torch.arange(max(segment.tokens for segment in segments), device=rows.device)
    inside = steps < tokens.unsqueeze(1)
    index = (starts.unsqueeze(1) + steps) * inside
    return Passage(
        embeds=embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])),
        mask=inside,
        runs=Runs.of(segments, rows.device),
        earlier=None if earlier is None else earlier.select(rows),
        before=before[rows],
    )


def _embeddings(passes: Sequence[Written], masks: Sequence[Tensor], dtype: torch.dtype) -> SoftTokens:
    mask = torch.cat([*masks], dim=1)
    embeddings = torch.cat([written.embeddings for written in passes if written.embeddings is not None], dim=1)
    return left_aligned(embeddings.to(dtype).masked_fill(~mask.unsqueeze(-1), 0), mask)


def _keys_and_values(passes: Sequence[KeyValues], mask: Tensor) -> SoftTokens:
    order = packing_order(mask)[:, : int(mask.sum(1).max())]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([*tensors], dim=2)
        return whole.gather(2, order[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))

    layers = zip(*passes, strict=True)
    kv = tuple((joined([k for k, _ in pairs]), joined([v for _, v in pairs])) for pairs in layers)
    return unused_zeroed(kv, mask.gather(1, order))


def _spread_all(written: Written, where: Tensor, rows: int) -> Written:
    embeddings, kv = written.embeddings, written.kv
    return Written(
        None if embeddings is None else _spread(embeddings, where, rows),
        None if kv is None else tuple((_spread(k, where, rows), _spread(v, where, rows)) for k, v in kv),
    )


def _spread(x: Tensor, where: Tensor, rows: int) -> Tensor:
    """`x` `[b, …]` as the rows ``where`` of `[B, …]`, the others zero."""
    return x if len(where) == rows else x.new_zeros(rows, *x.shape[1:]).index_copy(0, where, x)
