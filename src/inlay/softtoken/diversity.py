"""How alike slots are: a penalty for training, off by default.

A compressor that writes the same slots for every context has collapsed. The seed of this memory blamed the missing of a
diversity loss; the cause was the scale of its inputs, and with that mended none was needed. Diverse slots say nothing
about whether they hold the context (noise is diverse): see the evaluation for what does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.softtoken.tokens import SoftTokens

SPREAD_FLOOR = 0.5
"""Standard deviation over all slots, of slots at RMS 1, below which a dimension is penalised. Slots without any common
direction have 1."""


def likeness(memory: SoftTokens) -> Tensor:
    """The sum of three penalties, 0 to 2.5: 0 where slots are orthogonal and vary in every dimension, 2.5 where all
    are one.

    - the mean squared cosine of two slots of a row,
    - the mean squared cosine of the mean slots of two rows,
    - the mean of ``max(0, SPREAD_FLOOR − std)`` over the dimensions (the variance floor of VICReg).

    Args:
        memory: Rows that stand for different contexts. In form ``kv`` a slot is its values in all layers.
    """
    mask = memory.mask
    slots = _vectors(memory).float().masked_fill(~mask.unsqueeze(-1), 0)
    within = _mean_squared_cosine(slots, mask)
    means = slots.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    between = _mean_squared_cosine(means.unsqueeze(0), mask.any(dim=1).unsqueeze(0))
    used = F.normalize(slots[mask], dim=-1) * slots.shape[-1] ** 0.5
    # The variance has an epsilon: where slots are equal, the root has no gradient.
    spread = (used.var(dim=0, correction=0) + 1e-6).sqrt()
    return within + between + F.relu(SPREAD_FLOOR - spread).mean()


def _vectors(memory: SoftTokens) -> Tensor:
    """One vector per slot, `[B, M, …]`."""
    if memory.embeddings is not None:
        return memory.embeddings
    return torch.cat([values.transpose(1, 2).flatten(2) for _, values in memory.kv or ()], dim=-1)


def _mean_squared_cosine(vectors: Tensor, mask: Tensor) -> Tensor:
    """The mean over all pairs of different vectors `[B, N, D]` in one row, of those at ``mask`` `[B, N]`; 0 without a
    pair."""
    unit = F.normalize(vectors, dim=-1)
    pairs = (mask.unsqueeze(1) & mask.unsqueeze(2)).tril(-1)
    squares = (unit @ unit.transpose(1, 2)).square() * pairs
    return squares.sum() / pairs.sum().clamp(min=1)
