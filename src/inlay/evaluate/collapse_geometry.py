"""How alike slots are: cosines within and across contexts, and effective ranks.

The effective rank of a matrix is exp(H(p)), p its singular values over their sum (Roy and Vetterli, 2007): 1 where all
rows are multiples of one, at most the smaller side. Nothing is centred, so that slots with a large common part have a
low one, and equal slots exactly 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.softtoken.tokens import SoftTokens


@dataclass(frozen=True)
class Geometry:
    """Likeness of the slots of C contexts.

    Attributes:
        cosine_within: Mean over pairs of slots of one context, and over contexts; NaN where none has two slots.
        cosine_across: Mean over pairs of contexts of the cosine of their slots, first to first, second to second.
        rank_within: Effective rank of a context's slots `[M, D]`, the mean over contexts.
        rank_across: Effective rank of the contexts' mean slots `[C, D]`.
        map: `[C][C]`, the cosine of each context with each, as in ``cosine_across``.
    """

    cosine_within: float
    cosine_across: float
    rank_within: float
    rank_across: float
    map: tuple[tuple[float, ...], ...]


def geometry(memory: SoftTokens) -> Geometry:
    """Of the slots in ``memory``, one row a context; in form ``kv`` a slot is its values of all layers.

    (Keys are rotated by where a slot stands, which makes slots differ that say the same.)
    """
    slots, mask = _vectors(memory), memory.mask
    lengths = mask.sum(1)
    units = torch.nn.functional.normalize(slots, dim=-1).masked_fill(~mask.unsqueeze(-1), 0)
    several = lengths > 1
    pairs = (lengths * (lengths - 1))[several]
    within = (units.sum(1).square().sum(-1)[several] - lengths[several]) / pairs
    shared = mask.float() @ mask.float().T
    across = units.flatten(1) @ units.flatten(1).T / shared
    others = ~torch.eye(len(across), dtype=torch.bool, device=across.device)
    means = slots.sum(1) / lengths.unsqueeze(1)
    return Geometry(
        cosine_within=float(within.mean()),
        cosine_across=float(across[others].mean()),
        rank_within=sum(effective_rank(one[used]) for one, used in zip(slots, mask, strict=True)) / len(slots),
        rank_across=effective_rank(means),
        map=tuple(map(tuple, across.tolist())),
    )


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values of `[N, D]`; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum())) if values.sum() > 0 else 0.0


def _vectors(memory: SoftTokens) -> Tensor:
    """`[C, M, D]` float32, 0 where a row has no slot."""
    if memory.embeddings is not None:
        vectors = memory.embeddings
    else:
        vectors = torch.cat([values.transpose(1, 2).flatten(2) for _, values in memory.kv or ()], dim=-1)
    return vectors.float().masked_fill(~memory.mask.unsqueeze(-1), 0)
