"""YaRN: a longer attention window for a Moshi that was trained with a shorter one.

RoPE turns pair i of a head by the angle p · θ_i at position p, with θ_i = base^(−2i/d). Beyond the distances that the
model has seen, the slow pairs reach angles that it has not. YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071,
section 3) divides the frequency of those by the factor s of the longer window, leaves the pairs that turn round more
than ``beta_fast`` times within the old window as they are, blends between the two, and sharpens the attention by
scaling queries and keys with 0.1 ln s + 1.

The frequencies are those of transformers' ``modeling_rope_utils``; here they turn pairs that lie side by side, as
Kyutai's attention has them. Attention's scores depend on distances alone, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from moshi.models.lm import LMModel
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformer, StreamingTransformerLayer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from inlay.fastweight.errors import InlayError


class YarnConfig(BaseModel):
    """How far the window is stretched."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    factor: float = Field(gt=1)
    """The longer window over the one that the model was trained with: 2 makes 3,000 frames 6,000."""

    original_context: int | None = Field(default=None, ge=7)
    """Frames of the window that the model was trained with; its own when not given."""

    beta_fast: float = Field(default=32.0, gt=0)
    """Pairs that turn round more often than this within the original window keep their frequency."""

    beta_slow: float = Field(default=1.0, gt=0)
    """Pairs that turn round less often than this are interpolated fully."""

    attention_factor: float | None = Field(default=None, gt=0)
    """What queries and keys are multiplied with; 0.1 ln(factor) + 1 when not given."""

    @model_validator(mode="after")
    def _fast_is_faster(self) -> YarnConfig:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow; got {self.beta_fast} and {self.beta_slow}")
        return self


def yarn_frequencies(config: YarnConfig, head_dim: int, base: float, original_context: int) -> tuple[Tensor, float]:
    """The angle per frame of each pair ``[head_dim / 2]`` in float32, and the factor on queries and keys.

    Args:
        config: Factor and blend.
        head_dim: d, channels of a head.
        base: RoPE's longest period over 2π (``max_period``).
        original_context: Frames of the window that the model was trained with.
    """

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that turns round so often within the original window."""
        return head_dim * math.log(original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolated = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    plain = 1 / base ** (2 * pairs / head_dim)
    scaling = config.attention_factor or 0.1 * math.log(config.factor) + 1
    return plain / config.factor * interpolated + plain * (1 - interpolated), scaling


class YarnRotaryEmbedding(RotaryEmbedding):
    """Kyutai's rotary embedding with YaRN's frequencies.

    Attributes:
        scaling: What queries and keys are multiplied with.
        config: What it was made from, the original window among it; None if by hand.
    """

    def __init__(
        self,
        frequencies: Tensor,
        scaling: float,
        *,
        interleave: bool,
        max_period: float,
        config: YarnConfig | None = None,
    ) -> None:
        super().__init__(interleave=interleave, max_period=max_period)
        self.config = config
        # Not a buffer: a model cast to bfloat16 must not round it. It follows the queries' device when it is used.
        self._frequencies = frequencies
        self.scaling = scaling

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """Angle per frame of each pair, ``[head_dim / 2]``."""
        assert self._frequencies.shape[0] * 2 == head_dim
        self._frequencies = self._frequencies.to(device)
        return self._frequencies

    def forward(self, q: Tensor, k: Tensor, offset: Tensor, time_before_heads: bool = False) -> tuple[Tensor, Tensor]:
        """Turn ``q`` and ``k`` ``[B, H, T, d]`` from ``offset [B]`` on; ``time_before_heads``: ``[B, T, H, d]``."""
        frames = q.shape[1 if time_before_heads else 2]
        positions = offset.view(-1, 1) + torch.arange(frames, device=q.device)
        if time_before_heads:
            q, k = rotate(self, q.transpose(1, 2), k.transpose(1, 2), positions)
            return q.transpose(1, 2), k.transpose(1, 2)
        return rotate(self, q, k, positions)


def rotate(rope: RotaryEmbedding, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions, in float32.

    Args:
        rope: Kyutai's rotary embedding, or YaRN's.
        q: ``[B, H, T, d]``.
        k: ``[B, H', T, d]``.
        positions: ``[B, T]`` or ``[1, T]`` in frames.
    """
    head_dim = q.shape[-1]
    if isinstance(rope, YarnRotaryEmbedding):
        frequencies, scaling = rope.frequencies(head_dim, q.device), rope.scaling
    else:
        pairs = torch.arange(head_dim // 2, device=q.device, dtype=torch.float32)
        frequencies, scaling = torch.exp(pairs * (-math.log(rope.max_period) * 2 / head_dim)), 1.0
    angle = positions.float()[:, None, :, None] * frequencies
    cos, sin = angle.cos() * scaling, angle.sin() * scaling

    def turn(x: Tensor) -> Tensor:
        if rope.interleave:
            real, imaginary = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
        else:
            real, imaginary = x.float().chunk(2, dim=-1)
        parts = real * cos - imaginary * sin, real * sin + imaginary * cos
        turned = torch.stack(parts, dim=-1).flatten(-2) if rope.interleave else torch.cat(parts, dim=-1)
        return turned.to(x.dtype)

    return turn(q), turn(k)


def self_attentions(transformer: StreamingTransformer) -> list[StreamingMultiheadAttention]:
    """The self-attention of each layer."""
    return [cast(StreamingTransformerLayer, layer).self_attn for layer in transformer.layers]


def yarn_of(lm: LMModel) -> YarnConfig | None:
    """How far the window of ``lm`` is stretched, its original one named; None if it is not."""
    rope = lm.transformer.rope
    return rope.config if isinstance(rope, YarnRotaryEmbedding) else None


def apply_yarn(lm: LMModel, config: YarnConfig) -> Callable[[], None]:
    """Give the main transformer of ``lm`` a window ``factor`` times as long, with YaRN's frequencies.

    For training and streaming alike; a stream that has begun keeps its shorter cache.

    Returns:
        What gives the model its own window and frequencies back.

    Raises:
        InlayError: The model has no RoPE or no window, is streaming, or has YaRN already.
    """
    transformer, context = lm.transformer, config.original_context or lm.context
    if transformer.rope is None:
        raise InlayError(
            f"YaRN stretches RoPE, but this model's positions are {transformer.positional_embedding!r}; leave yarn out"
        )
    if isinstance(transformer.rope, YarnRotaryEmbedding):
        raise InlayError("this model has YaRN already; take it off before another is applied")
    if context is None or context < 7:  # below 2π no pair turns round within the window
        raise InlayError(
            f"YaRN needs the window that the model was trained with, 7 frames or more; this model's is {context}: give "
            "yarn.original_context"
        )
    if transformer.is_streaming:
        raise InlayError("the model is streaming, with a cache of its shorter window; apply YaRN before streaming")
    layers = self_attentions(transformer)
    before = (lm.context, transformer.rope, [attention.context for attention in layers])
    head_dim = layers[0].embed_dim // layers[0].num_heads
    frequencies, scaling = yarn_frequencies(config, head_dim, transformer.max_period, context)
    rope = YarnRotaryEmbedding(
        frequencies,
        scaling,
        interleave=transformer.rope.interleave,
        max_period=transformer.max_period,
        config=config.model_copy(update={"original_context": context}),
    )
    longer = round(context * config.factor)

    def put(lm_context: int | None, rope: RotaryEmbedding, contexts: list[int | None]) -> None:
        lm.context, transformer.rope = lm_context, rope
        for attention, value in zip(layers, contexts, strict=True):
            attention.rope, attention.context = rope, value

    put(longer, rope, [longer] * len(layers))
    return lambda: put(*before)
