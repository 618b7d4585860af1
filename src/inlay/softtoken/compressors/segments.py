"""How a context is divided: into segments that are read one at a time, and these into runs, one slot each.

With a ratio r a run is r neighbouring tokens, and what is left over makes the last, shorter one: a row of n tokens gets
ceil(n / r) slots. With a fixed M there are min(M, n) runs of lengths that differ by at most one, and segments, too, are
nearly equal, so that each gets its share of the M slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.softtoken.compressors.errors import CompressorError


@dataclass(frozen=True)
class Segment:
    """A part of a context that is read in one pass.

    Attributes:
        start: Its first token's index in the context.
        runs: Tokens of each of its runs, in order; a run becomes a slot.
    """

    start: int
    runs: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens n."""
        return sum(self.runs)

    @property
    def slots(self) -> int:
        """Slots M."""
        return len(self.runs)


def divide_by_ratio(tokens: int, ratio: int, segment_tokens: int | None = None) -> tuple[Segment, ...]:
    """Segments of ``segment_tokens`` and runs of ``ratio`` tokens, the last of each shorter.

    Args:
        tokens: Length of the context.
        ratio: Tokens per slot.
        segment_tokens: A multiple of ``ratio``; None makes one segment.
    """
    size = segment_tokens or tokens
    return tuple(Segment(start, _of_size(min(size, tokens - start), ratio)) for start in range(0, tokens, size))


def divide_by_slots(tokens: int, slots: int, segment_tokens: int | None = None) -> tuple[Segment, ...]:
    """min(``slots``, ``tokens``) runs of nearly equal length, in as few nearly equal segments as there can be.

    Raises:
        CompressorError: There are more segments than slots.
    """
    slots = min(slots, tokens)
    pieces = -(-tokens // (segment_tokens or tokens))
    if pieces > slots:
        raise CompressorError(
            f"a context of {tokens:,} tokens has {pieces} segments of at most {segment_tokens} tokens, more than its "
            f"{slots} slots; raise slots, or segment_tokens to {-(-tokens // slots)} or more"
        )
    lengths, shares = split(tokens, pieces), split(slots, pieces)
    return tuple(
        Segment(sum(lengths[:piece]), split(length, share))
        for piece, (length, share) in enumerate(zip(lengths, shares, strict=True))
    )


def split(total: int, parts: int) -> tuple[int, ...]:
    """``total`` as a sum of ``parts`` whole numbers that differ by at most one, the larger first."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def _of_size(total: int, size: int) -> tuple[int, ...]:
    return (size,) * (total // size) + ((total % size,) if total % size else ())


@dataclass(frozen=True)
class Runs:
    """The runs of a batch as tensors; R is the longest run. Indices count tokens from a segment's first.

    Attributes:
        members: `[B, M, R]` int64, the tokens of each run; 0 where it is shorter.
        weights: `[B, M, R]` float32, one over the run's length at its tokens; 0 elsewhere.
        last: `[B, M]` int64, each run's last token.
        mask: `[B, M]` bool, True where a row has a run.
    """

    members: Tensor
    weights: Tensor
    last: Tensor
    mask: Tensor

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> Runs:
        """The runs of one segment per row."""
        width = max(segment.slots for segment in segments)
        lengths = torch.tensor([segment.runs + (0,) * (width - segment.slots) for segment in segments]).to(device)
        steps = torch.arange(int(max(max(segment.runs) for segment in segments)), device=device)
        inside = steps < lengths.unsqueeze(-1)
        ends = lengths.cumsum(1)
        return Runs(
            members=((ends - lengths).unsqueeze(-1) + steps) * inside,
            weights=inside / lengths.clamp(min=1).unsqueeze(-1),
            last=(ends - 1) * (lengths > 0),
            mask=lengths > 0,
        )

    def shifted(self, by: Tensor) -> Runs:
        """The same runs where each row's segment begins ``by`` `[B]` places further on."""
        return Runs(self.members + by.view(-1, 1, 1), self.weights, self.last + by.view(-1, 1), self.mask)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` `[B, T, …]` over each run, `[B, M, …]`, summed in float32 or better."""
        rows = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        weights = self.weights.to(torch.promote_types(x.dtype, torch.float32))
        return torch.einsum("bmr,bmr...->bm...", weights, x[rows, self.members].to(weights.dtype)).to(x.dtype)

    def centres(self) -> Tensor:
        """The middle of each run, `[B, M]` float32."""
        return (self.members * self.weights).sum(-1)
