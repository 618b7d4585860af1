"""The configuration of a compressor: one model per kind, told apart by ``kind``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, model_validator

from inlay.softtoken.tokens import Form

DEFAULT_TABLE = 128
"""Learned vectors, one per slot, where neither ``max_slots`` nor ``slots`` says how many are needed."""


class LoraSettings(BaseModel):
    """The PEFT LoRA adapter that turns the decoder's own weights into the encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(default=16, ge=1)
    """Rank."""

    lora_alpha: float = Field(default=32, gt=0)
    """Scaling: the adapter's output is multiplied by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, while the model is in training mode."""

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get one; ``all-linear`` is every one inside the decoder's blocks (in a mixture of
    experts, every one of its attention)."""


class BaseCompressorConfig(BaseModel):
    """What every kind has: how many slots a context gets, and in which form."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    form: Form = "embeddings"
    """``embeddings``: a vector per slot. ``kv``: keys and values of every layer per slot (500xCompressor)."""

    ratios: tuple[int, ...] = (4, 8)
    """Ratios that a call may ask for; the first is what a call that asks for nothing gets, unless ``slots`` is set. A
    context of n tokens gets ceil(n / ratio) slots."""

    slots: int | None = Field(default=None, ge=1)
    """Fixed number of slots M that a call which asks for nothing gets, whatever the length of the context."""

    max_slots: int | None = Field(default=None, ge=1)
    """Most slots that one segment may get. Kinds that learn a vector per slot have a table of this size; when it is not
    given, ``slots`` or 128 of them. For the others None is no limit."""

    segment_tokens: int | None = Field(default=None, ge=1)
    """Longer contexts are read in segments of this many tokens; None reads each context whole. A multiple of every
    ratio, so that a context gets ceil(n / ratio) slots in however many segments it is read."""

    segments: Literal["concatenate", "recursive"] = "concatenate"
    """``concatenate``: each segment is read alone. ``recursive``: with the slots of the segments before it in front
    (AutoCompressor). Either way the memory is the slots of all segments in order, and equally many."""

    calibrate: bool = True
    """Bring each slot to the RMS of the decoder's embeddings. Off only to show what happens without."""

    @model_validator(mode="after")
    def _numbers_go_together(self) -> BaseCompressorConfig:
        if not self.ratios and self.slots is None:
            raise ValueError("ratios is empty and slots is not set; give one of them, e.g. ratios: [4, 8]")
        if any(ratio < 1 for ratio in self.ratios):
            raise ValueError(f"a ratio is at least 1 (tokens per slot); got {list(self.ratios)}")
        if self.slots is not None and self.max_slots is not None and self.slots > self.max_slots:
            raise ValueError(f"slots ({self.slots}) is more than max_slots ({self.max_slots}); raise max_slots")
        uneven = [ratio for ratio in self.ratios if (self.segment_tokens or 0) % ratio]
        if self.segment_tokens is not None and uneven:
            down = self.segment_tokens - self.segment_tokens % uneven[0]
            raise ValueError(
                f"segment_tokens ({self.segment_tokens}) must be a multiple of every ratio, and is not of {uneven}; "
                f"use e.g. {down or uneven[0]}"
            )
        return self

    @property
    def table_size(self) -> int:
        """Vectors in a table of one learned vector per slot."""
        return self.max_slots or self.slots or DEFAULT_TABLE


class EncoderPoolConfig(BaseCompressorConfig):
    """The LM itself, with mean-pooled queries in its last block (ARC-Encoder)."""

    kind: Literal["encoder-pool"] = "encoder-pool"

    attention: Literal["causal", "bidirectional"] = "causal"
    """What a token reads: the tokens before it, as the weights were trained (a slot then depends on nothing behind its
    run, so appending text keeps the slots there are), or all tokens, as the published encoder does."""

    residual: bool = False
    """Add the projector's output, zero at first, to the mean of the run's embeddings: training then begins at
    mean-pooled embeddings, which a frozen decoder half understands, and not at noise. Published encoders project
    alone."""

    projector_width: int | None = Field(default=None, ge=1)
    """Inner width of the MLP projector; the model's width when not given."""

    lora: LoraSettings = LoraSettings()
    """The adapter that is on while the context is read."""


class EncoderTokensConfig(BaseCompressorConfig):
    """The LM itself, which writes into learned memory tokens behind the context (ICAE)."""

    kind: Literal["encoder-tokens"] = "encoder-tokens"

    projector_width: int | None = Field(default=None, ge=1)
    """Inner width of the MLP projector; the model's width when not given."""

    lora: LoraSettings = LoraSettings()
    """The adapter that is on while the context is read."""


class CrossAttentionConfig(BaseCompressorConfig):
    """Learned queries that attend to the token embeddings or to a middle layer of the frozen LM."""

    kind: Literal["crossattention"] = "crossattention"

    source: str = "embeddings"
    """What is attended to: ``embeddings``, or ``layer:k``, the hidden states after k blocks (adapters off)."""

    blocks: int = Field(default=1, ge=1)
    """Blocks of cross-attention and MLP."""

    heads: int | None = Field(default=None, ge=1)
    """Attention heads; the model's when not given."""

    positions: Literal["calibrated", "raw"] = "calibrated"
    """Sinusoids at the scale of what they are added to, in queries and keys; or ``raw``: of RMS 0.71 whatever the scale
    and in the values too, which collapses all contexts to one. ``raw`` is for showing that."""

    lora: LoraSettings = LoraSettings()
    """The adapter that turns slots into keys and values; in form ``kv`` only."""

    @model_validator(mode="after")
    def _source_is_readable(self) -> CrossAttentionConfig:
        if self.source != "embeddings" and not re.fullmatch(r"layer:[1-9]\d*", self.source):
            raise ValueError(f'source must be "embeddings" or "layer:k" with k from 1; got {self.source!r}')
        return self

    @property
    def layer(self) -> int:
        """Blocks before the source; 0 for the embeddings."""
        return 0 if self.source == "embeddings" else int(self.source.removeprefix("layer:"))


class PoolConfig(BaseCompressorConfig):
    """Token embeddings, mean-pooled over runs: nothing is learned. The baseline."""

    kind: Literal["pool"] = "pool"

    @model_validator(mode="after")
    def _reads_segments_alone(self) -> PoolConfig:
        if self.segments == "recursive":
            raise ValueError("a pooled slot depends on nothing before its run; set segments: concatenate")
        return self


_Kinds: TypeAlias = EncoderPoolConfig | EncoderTokensConfig | CrossAttentionConfig | PoolConfig


def _with_kind(value: Any) -> Any:
    return {"kind": "encoder-pool"} | value if isinstance(value, dict) else value


def _dump_with_kind(value: _Kinds) -> dict[str, Any]:
    # A kind is its own class's default, so it would be left out of a dump without defaults.
    return {"kind": value.kind} | value.model_dump(mode="json", exclude_defaults=True)


CompressorConfig = Annotated[
    _Kinds, Field(discriminator="kind"), BeforeValidator(_with_kind), PlainSerializer(_dump_with_kind)
]
"""A section of any kind: ``encoder-pool`` when none is named, and named whenever it is dumped."""

CONFIG: TypeAdapter[_Kinds] = TypeAdapter(CompressorConfig)
"""Reads a configuration of any kind from a mapping."""
