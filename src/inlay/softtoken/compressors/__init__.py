"""Compressors: a long context in, soft tokens out. A new kind is one file and one line of ``KINDS``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inlay.softtoken.compressors.base import Compressor, freeze
from inlay.softtoken.compressors.config import (
    BaseCompressorConfig,
    CompressorConfig,
    CrossAttentionConfig,
    EncoderPoolConfig,
    EncoderTokensConfig,
    LoraSettings,
    PoolConfig,
)
from inlay.softtoken.compressors.crossattention import CrossAttentionCompressor
from inlay.softtoken.compressors.encoder_pool import EncoderPoolCompressor
from inlay.softtoken.compressors.encoder_tokens import EncoderTokensCompressor
from inlay.softtoken.compressors.errors import CompressorError
from inlay.softtoken.compressors.pool import PoolCompressor
from inlay.softtoken.compressors.storage import check_model, describe_model, load_tensors, read

KINDS: dict[type[BaseCompressorConfig], type[Compressor[Any]]] = {
    EncoderPoolConfig: EncoderPoolCompressor,
    EncoderTokensConfig: EncoderTokensCompressor,
    CrossAttentionConfig: CrossAttentionCompressor,
    PoolConfig: PoolCompressor,
}


def build_compressor(config: BaseCompressorConfig, model: Any) -> Compressor[Any]:
    """A new compressor for ``model``.

    The model's base weights are frozen. Kinds that read with the LM put a LoRA adapter into it, which is off until
    :meth:`Compressor.compress`; adapters that the model has already keep working and keep their gradients, so give the
    decoder its own first. Several compressors may share one model.

    Args:
        config: One of the kinds' configurations.
        model: The decoder, a Hugging Face causal LM, or a PEFT model around one.

    Raises:
        CompressorError: The configuration does not fit the model, which then has no adapter more than before.
    """
    compressor = KINDS[type(config)](config, model)
    freeze(compressor.lm.model)
    return compressor.to(compressor.lm.device)


def load_compressor(directory: str | Path, model: Any) -> Compressor[Any]:
    """The compressor that :meth:`Compressor.save_pretrained` wrote to ``directory``; it writes the same slots.

    Args:
        directory: Where it lies.
        model: The decoder it was trained for.

    Raises:
        CompressorError: The files are missing or damaged, or ``model`` is another one. The model is unchanged.
    """
    config, saved_model, own, adapter = read(Path(directory))
    check_model(Path(directory), saved_model, model)
    compressor = build_compressor(config, model)
    try:
        load_tensors(Path(directory), compressor, own, adapter)
    except CompressorError:
        compressor.detach()
        raise
    return compressor


__all__ = [
    "KINDS",
    "BaseCompressorConfig",
    "Compressor",
    "CompressorConfig",
    "CompressorError",
    "CrossAttentionCompressor",
    "CrossAttentionConfig",
    "EncoderPoolCompressor",
    "EncoderPoolConfig",
    "EncoderTokensCompressor",
    "EncoderTokensConfig",
    "LoraSettings",
    "PoolCompressor",
    "PoolConfig",
    "build_compressor",
    "describe_model",
    "load_compressor",
]
