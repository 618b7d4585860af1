"""The configuration of a fast-weight memory."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inlay.fastweight.errors import AttachError


class NormalInit(BaseModel):
    """Initialise convolution and projection from N(0, std²)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    normal: float = Field(gt=0)
    """Standard deviation."""


class FastWeightConfig(BaseModel):
    """How a fast-weight memory is built and used (In-Place Test-Time Training, ICLR 2026; symbols as in the paper)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: str | list[int] = "every:6"
    """Which blocks get a memory: ``"every:k"`` (blocks 0, k, 2k, …), ``"all"``, or indices (negative from the end)."""

    chunk_size: int = Field(default=1024, ge=1)
    """Tokens per chunk C: what is written becomes readable when its chunk is full."""

    eta: float = Field(default=3e-4, ge=0)
    """Step size η. The knob that decides: too small is no memory, too large is worse than none."""

    target: Literal["embeddings", "hidden"] = "embeddings"
    """What the target V is made from: the token embeddings X0 (the paper), or the input of the block's MLP."""

    init: Literal["zero", "next_token"] | NormalInit = "zero"
    """``zero``: convolution 0, projection identity, so a fresh memory changes nothing. ``next_token``: tap +1 is 1,
    projection identity (training from scratch). ``{"normal": std}``: both random."""

    conv_kernel: int = Field(default=5, ge=1)
    """Taps of the depthwise convolution, odd: centred on the token, so half of them look ahead inside the chunk."""

    normalize_target: bool = False
    """Divide each token's X0 by its RMS over channels before the convolution (the paper does not)."""

    boundary: Literal["reset", "carry"] = "reset"
    """At a document's start, empty the sum (``reset``, the paper) or keep it (``carry``: parts of one conversation)."""

    exposure: float = Field(default=0.0, ge=0, le=1)
    """Share α of its own update that a chunk reads while training. Above 0 the model reads ahead. Off in eval mode."""

    max_update_norm: float | None = Field(default=None, gt=0)
    """Largest Frobenius norm of one update Δ_i (the paper's τ); None does not clip."""

    max_update_ratio: float | None = Field(default=None, gt=0)
    """Largest ‖Δ_i‖ / ‖W0‖, in whose gradient ‖W0‖ counts as a constant; None does not clip."""

    projection: str | None = None
    """Path of the down projections in a model that is not known, with ``{layer}`` for the block's index,
    e.g. ``"model.layers.{layer}.mlp.down_proj"``. None: found by the model's family."""

    @field_validator("layers")
    @classmethod
    def _layers_are_readable(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, str) and value != "all" and not re.fullmatch(r"every:[1-9]\d*", value):
            raise ValueError(f'layers must be "every:k", "all" or a list of block indices; got {value!r}')
        if isinstance(value, list) and not value:
            raise ValueError('layers is empty; name at least one block, e.g. [0, 6] or "every:6"')
        return value

    @field_validator("conv_kernel")
    @classmethod
    def _kernel_is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"conv_kernel must be odd (it is centred on the token); got {value}, use {value + 1}")
        return value

    @field_validator("projection")
    @classmethod
    def _projection_has_a_layer(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"([^{}]+)\.\{layer\}\.([^{}]+)", value):
            raise ValueError(
                "projection must hold one {layer} between dots, like 'model.layers.{layer}.mlp.down_proj'; "
                f"got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _next_token_has_a_tap(self) -> FastWeightConfig:
        if self.init == "next_token" and self.conv_kernel < 3:
            raise ValueError("init='next_token' needs a tap ahead of the token: set conv_kernel to 3 or more")
        if self.max_update_norm is not None and self.max_update_ratio is not None:
            raise ValueError("max_update_norm and max_update_ratio are two ways to say one thing; set one of them")
        return self

    @property
    def clips(self) -> bool:
        """Whether updates are clipped."""
        return self.max_update_norm is not None or self.max_update_ratio is not None

    def layer_indices(self, blocks: int) -> list[int]:
        """The blocks that get a memory in a model of ``blocks`` blocks, ascending.

        Raises:
            AttachError: An index is out of range or named twice.
        """
        if self.layers == "all":
            return list(range(blocks))
        if isinstance(self.layers, str):
            return list(range(0, blocks, int(self.layers.removeprefix("every:"))))
        wrong = [i for i in self.layers if not -blocks <= i < blocks]
        if wrong:
            raise AttachError(
                f"layers {wrong} do not exist: the model has {blocks} blocks, so indices run from 0 to {blocks - 1} "
                f"(or -{blocks} to -1 from the end)"
            )
        indices = sorted(i % blocks for i in self.layers)
        if len(set(indices)) < len(indices):
            raise AttachError(f"layers {self.layers} names a block twice (the model has {blocks} blocks)")
        return indices
