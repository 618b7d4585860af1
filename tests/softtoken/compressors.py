"""The compressors that the tests share, and what goes into and comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from inlay.softtoken.compressors import (
    Compressor,
    CrossAttentionConfig,
    EncoderPoolConfig,
    EncoderTokensConfig,
    LoraSettings,
    PoolConfig,
    build_compressor,
)
from inlay.softtoken.tokens import SoftTokens

WIDTH, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8

KINDS: dict[str, Callable[..., Any]] = {
    "encoder-pool": EncoderPoolConfig,
    "encoder-pool-bidirectional": partial(EncoderPoolConfig, attention="bidirectional"),
    "encoder-tokens": EncoderTokensConfig,
    "crossattention": CrossAttentionConfig,
    "crossattention-layer": partial(CrossAttentionConfig, source="layer:1", blocks=2),
    "pool": PoolConfig,
}
ALL = [(kind, form) for kind in KINDS for form in ("embeddings", "kv")]
TRAINED = [(k, form) for k, form in ALL if k in ("encoder-pool", "encoder-tokens", "crossattention")]


def llama(seed: int = 0, **changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        | changes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def built(kind: str, model: Any, *, seed: int = 1, **changes: Any) -> Compressor[Any]:
    """A compressor whose adapter does something, as a trained one's does."""
    torch.manual_seed(seed)
    if kind != "pool":
        few = model.config.model_type == "llama"  # PEFT takes its time for each
        changes["lora"] = LoraSettings(r=2, target_modules=("q_proj", "v_proj", "down_proj") if few else "all-linear")
    compressor = build_compressor(KINDS[kind](**changes), model)
    for name, parameter in compressor.named_trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return compressor


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def numbers(memory: SoftTokens) -> Tensor:
    """Everything a memory holds, `[B, M, …]` flattened behind M."""
    if memory.embeddings is not None:
        return memory.embeddings
    assert memory.kv is not None
    return torch.cat([t.transpose(1, 2).flatten(2) for pair in memory.kv for t in pair], dim=-1)


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as a batch, with ids at the padding that are no tokens."""
    width = max(map(len, texts)) + 2
    ids, mask = torch.full((len(texts), width), -1), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, place], mask[row, place] = text, True
    return ids, mask


@contextmanager
def adapter_on(compressor: Compressor[Any]) -> Iterator[None]:
    """The adapter switched on by PEFT's own means."""
    layers = [m for m in compressor.lm.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_adapter([compressor.adapter.name])
    yield
    for layer in layers:
        layer.set_adapter([])
