"""Slots at the scale of the decoder's embeddings.

A frozen decoder has only ever read vectors of its embedding table's size. Slots that are 95 times as large, as in
seed 003, drown what else it reads. So every slot is normalised to RMS 1 and multiplied by a gain, learned or not, that
starts at the RMS of the table:

    slot = gain · x / RMS(x),    gain = factor · RMS(table)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS_AT_A_TIME = 4096
_EPSILON = 1e-12  # of the mean square: far below pooled embeddings of RMS 0.001


def embedding_rms(embedding: Any) -> float:
    """RMS of what ``embedding`` gives for the tokens of its vocabulary, any scaling it does included.

    Rows that are all zero (padding) do not count.

    Args:
        embedding: The decoder's input embedding module, `[…]` ids to `[…, D]`.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in torch.split(torch.arange(embedding.num_embeddings, device=embedding.weight.device), _ROWS_AT_A_TIME):
            squares = embedding(ids).double().square().mean(-1)
            total, count = total + float(squares.sum()), count + int((squares > 0).sum())
    return float((total / max(count, 1)) ** 0.5)


def normalised(x: Tensor) -> Tensor:
    """`x` `[…, D]` with an RMS of 1 over D."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPSILON)


class Calibration(nn.Module):
    """`[…, D]` to the same directions at the RMS of the embeddings.

    Attributes:
        rms: RMS of the embeddings.
        factor: What slots have of it, 1 at first; a parameter where it is learned, else a buffer. Relative, so that a
            step of the optimizer is as large for embeddings of RMS 0.01 as for those of RMS 1.
    """

    rms: Tensor
    factor: Tensor

    def __init__(self, rms: float, *, learned: bool) -> None:
        super().__init__()
        self.register_buffer("rms", torch.tensor(rms))
        if learned:
            self.factor = nn.Parameter(torch.ones(()))
        else:
            self.register_buffer("factor", torch.ones(()))

    @property
    def gain(self) -> float:
        """RMS of every slot."""
        return float(self.factor.detach() * self.rms)

    def forward(self, x: Tensor) -> Tensor:
        """`[…, D]` in the dtype of the factor."""
        return normalised(x.to(self.factor.dtype)) * (self.factor * self.rms)


class Projector(nn.Module):
    """An MLP from the encoder's hidden states into the embedding space, `[…, D]` to `[…, D]`, without biases."""

    def __init__(self, width: int, inner: int | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, inner or width, bias=False)
        self.down = nn.Linear(inner or width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """In the dtype of the parameters."""
        return self.down(nn.functional.gelu(self.up(self.norm(hidden.to(self.up.weight.dtype)))))
