"""Small Moshis made directly from Kyutai's class: Moshi's own settings but for the sizes."""

from __future__ import annotations

from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import Tensor, nn

STREAMS = 17
CARD = 16
TEXT_CARD = 24
WIDTH = 16
BLOCKS = 4

_SIZES: dict[str, Any] = {
    "dim": WIDTH,
    "text_card": TEXT_CARD,
    "card": CARD,
    "num_heads": 2,
    "num_layers": BLOCKS,
    "context": 12,
    "depformer_dim": 8,
    "depformer_dim_feedforward": 24,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
}


def make_lm(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LMModel:
    """A random Moshi in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LMModel(**loaders._lm_kwargs | _SIZES | changes, dtype=dtype).eval()


def make_codes(batch: int = 2, frames: int = 40, seed: int = 1) -> Tensor:
    """Random codes ``[B, 17, T]``: text, then 8 codebooks of Moshi and 8 of the user."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CARD, (batch, STREAMS, frames), generator=generator)
    codes[:, 0] = torch.randint(0, TEXT_CARD, (batch, frames), generator=generator)
    return codes


def outputs(lm: nn.Module, codes: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Audio and text logits of Kyutai's own forward, where they mean anything."""
    out = lm(codes, **kwargs)
    return out.logits[out.mask], out.text_logits[out.text_mask]
