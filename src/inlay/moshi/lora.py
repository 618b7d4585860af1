"""LoRA on Moshi as moshi-finetune has it: Kyutai's ``LoRALinear`` around every linear layer, the depformer's too.

    W x + B (s A x)

Theirs multiplies B A x by s, and holds four results of the layer's width at once; :class:`LeanLoRALinear` holds two.
On 32,000 frames of the 7B each is 1.4 GB around ``linear_in``, where a training step with a memory has its peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from inlay.fastweight.errors import InlayError


class LoraConfig(BaseModel):
    """The adapters, under moshi-finetune's names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enable: bool = False
    """Whether the model gets adapters."""

    rank: int = Field(default=64, ge=1)
    """Rank of an adapter."""

    scaling: float = Field(default=2.0, gt=0)
    """What an adapter's output is multiplied with."""

    ft_embed: bool = False
    """Train the embeddings too, the depformer's among them."""


class LeanLoRALinear(LoRALinear):
    """Kyutai's ``LoRALinear``, with its parameters and its output, in half the memory."""

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in_features]`` to ``[…, out_features]``."""
        out: Tensor = self.lora_B(self.lora_A(x) * self.scaling)
        out += self.frozen_W(x)
        return out


def add_lora(lm: LMModel, config: LoraConfig, *, dtype: torch.dtype | None = None) -> None:
    """Put fresh adapters around the linear layers of ``lm``: A drawn, B zero, so that the model's outputs stay.

    Args:
        lm: A model without adapters; with or without a memory.
        config: Rank and scaling.
        dtype: Of the adapters; their layer's when not given.

    Raises:
        InlayError: The model has adapters already.
    """
    if any(True for _ in lora_layers(lm)):
        raise InlayError("this model has LoRA adapters already")
    linears = [
        (module, name, child)
        for module in lm.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    for module, name, linear in linears:
        weight = linear.weight
        sizes = linear.in_features, linear.out_features, config.rank, config.scaling
        layer = LeanLoRALinear(*sizes, device=weight.device, dtype=dtype or weight.dtype)
        layer.frozen_W = linear
        nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(layer.lora_B.weight)
        setattr(module, name, layer)


@torch.no_grad()
def fuse_lora(lm: nn.Module) -> None:
    """Add every adapter to the weight of its layer, W + scaling · B A, and take it off; a memory stays where it is.

    Upstream's ``replace_lora_with_linear`` makes new linear layers, so a memory would be lost.
    """
    for module in list(lm.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, LoRALinear):
                weight = child.frozen_W.weight
                weight += child.scaling * (child.lora_B.weight @ child.lora_A.weight).to(weight.dtype)
                module._modules[name] = child.frozen_W


def lora_layers(lm: nn.Module) -> Iterator[LoRALinear]:
    """The adapters of a model."""
    return (module for module in lm.modules() if isinstance(module, LoRALinear))


def embedding_parameters(lm: LMModel) -> dict[str, nn.Parameter]:
    """What ``ft_embed`` trains: every parameter whose name holds ``emb``, as in moshi-finetune, but no adapter."""
    return {name: p for name, p in lm.named_parameters() if "emb" in name and ".lora_" not in name}
