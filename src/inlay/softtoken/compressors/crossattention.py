"""``crossattention``: learned queries that attend to the context, as in Perceiver, and as in seed 003, done right.

The seed added sinusoids of RMS 0.71 to embeddings of RMS 0.011. Every key and value was then its position and every
context the same; and its slots were left at 95 times the scale of the embeddings. Here

- the source is normalised per token before sinusoids of the same RMS are added, and values carry no positions at all;
- slot j asks from the middle of its run: its learned query is added to that place's sinusoid, and query and key
  projections start equal, so that before any training it reads around that place;
- padding is masked, and what comes out is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.softtoken.compressors.base import Compressor
from inlay.softtoken.compressors.calibration import normalised
from inlay.softtoken.compressors.config import CrossAttentionConfig
from inlay.softtoken.compressors.errors import CompressorError
from inlay.softtoken.compressors.language_model import refuse_cut_off
from inlay.softtoken.compressors.passages import Passage, Written

_LONGEST_WAVE = 10_000.0


def sinusoids(places: Tensor, width: int) -> Tensor:
    """Position vectors (Vaswani et al., 2017) of RMS √½.

    Args:
        places: `[…]` float, positions in tokens.
        width: D.

    Returns:
        `[…, D]` float32: sines in the first half, cosines in the second (of an odd D, one sine fewer).
    """
    waves = torch.arange((width + 1) // 2, device=places.device) / ((width + 1) // 2)
    angles = places.float().unsqueeze(-1) * _LONGEST_WAVE**-waves
    return torch.cat([angles[..., : width // 2].sin(), angles.cos()], dim=-1)


class CrossAttentionBlock(nn.Module):
    """Cross-attention and an MLP, both behind a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm, self.value_norm, self.mlp_norm = (nn.RMSNorm(width) for _ in range(4))
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.orthogonal_(self.query.weight)
        self.key.weight.data.copy_(self.query.weight)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, slots: Tensor, places: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Let the slots read.

        Args:
            slots: `[B, M, D]`.
            places: `[B, M, D]`, where each asks from.
            keys: `[B, T, D]`, what is asked.
            values: `[B, T, D]`, what is read.
            mask: `[B, T]` bool, False at padding.
        """
        q = self._heads(self.query(self.query_norm(slots + places)))
        k = self._heads(self.key(self.key_norm(keys)))
        v = self._heads(self.value(self.value_norm(values)))
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        slots = slots + self.output(read.transpose(1, 2).flatten(2))
        return slots + self.mlp(self.mlp_norm(slots))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class CrossAttentionCompressor(Compressor[CrossAttentionConfig]):
    """Learned queries over the token embeddings or a middle layer.

    Attributes:
        queries: `[max_slots, D]`; a segment of M slots uses the first M. Small beside what is read, so that slots of
            different contexts differ from the start.
        blocks: The blocks.
    """

    def __init__(self, config: CrossAttentionConfig, model: Any) -> None:
        super().__init__(config, model)
        width, heads = self.lm.width, config.heads or self.lm.heads
        if width % heads:
            raise CompressorError(f"heads ({heads}) must divide the model's width ({width})")
        if config.layer > len(self.lm.blocks):
            raise CompressorError(f"source {config.source!r}: the model has {len(self.lm.blocks)} blocks")
        self.queries = nn.Parameter(torch.randn(config.table_size, width) * 0.02)
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, heads) for _ in range(config.blocks))
        if config.form == "kv":
            self.use_adapter(config.lora)

    @property
    def most_slots(self) -> int | None:
        """The size of the table."""
        return self.config.table_size

    def room(self, tokens: int, slots: int) -> int:
        """The LM reads only up to a middle layer."""
        return tokens if self.config.layer else 0

    def write(self, passage: Passage) -> Written:
        """The queries of one passage, after they have read."""
        text = passage.joined()
        content = self.source(text.embeds, text.mask).to(self.queries.dtype)
        steps = torch.arange(content.shape[1], device=content.device)
        waves, places = (sinusoids(at, self.lm.width).to(content.dtype) for at in (steps, text.runs.centres()))
        if self.config.positions == "raw":
            keys = values = content + waves
        else:
            values = normalised(content)
            keys, places = values + math.sqrt(2) * waves, math.sqrt(2) * places
        slots = self.queries[: places.shape[1]].expand(len(content), -1, -1)
        for block in self.blocks:
            slots = block(slots, places, keys, values, text.mask)
        return Written(self.calibrated(slots))

    def source(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """What is attended to, `[B, T, D]`, before any positions: the embeddings, or the hidden states they lead to."""
        if self.config.layer == 0:
            return embeds
        block = self.lm.blocks[self.config.layer - 1]
        outputs: list[Tensor] = []
        hidden = self.lm.read(embeds, mask, adapter=None, around=[_noting(block, outputs)])
        refuse_cut_off(hidden, outputs[0], f"source {self.config.source!r}")
        return outputs[0]


@contextmanager
def _noting(block: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Within it, what ``block`` gives is appended to ``outputs``."""

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
