"""Audio into Mimi's codes, files of any length in bounded memory.

A whole file in one forward would need attention's T×T mask: 8 GB for an hour. So Mimi streams over the file, and gives
the codes of that one forward: its convolutions keep their last samples between calls, and its attention keeps the last
keys. Kyutai's ring of keys is as long as the attention's context, which is right for one step at a time; with more
steps a call, the newest keys overwrite the oldest ones that the call's first queries still see. Here the ring is longer
by a call's steps less one, and every query finds its whole context.

How close this is to the whole forward: latents to float32 rounding (3e-7 relative at Mimi's full size), so a code
differs only where two entries of a codebook are as near to the latent as that; see `tests/moshi/test_codes.py`. That is
on the CPU; on CUDA, PyTorch lets convolutions multiply in TF32, and the codes are those that Mimi gives there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention

BLOCK_SECONDS = 4
"""Seconds of audio in one call of Mimi: 50 frames."""


@torch.inference_mode()
def mimi_codes(mimi: MimiModel, samples: Iterable[np.ndarray], *, seconds: int = BLOCK_SECONDS) -> np.ndarray:
    """Encode two channels that come in blocks.

    Args:
        mimi: The codec.
        samples: Blocks of `[2, seconds · 24,000]` float32, only the last one shorter, as
            `inlay.data.audio_reader.blocks` yields them.
        seconds: Length of a block.

    Returns:
        `[16, T]`: the left channel's 8 codebooks, then the right one's; T = ceil(samples / 1,920). int16 while codes
        fit into it.
    """
    size = seconds * mimi.sample_rate
    device = next(mimi.parameters()).device
    dtype = np.int16 if mimi.cardinality <= np.iinfo(np.int16).max else np.int32
    codes = [np.zeros((2 * mimi.num_codebooks, 0), dtype)]
    with _streaming(mimi, frames=size // mimi.frame_size):
        for block in samples:
            frames = -(-block.shape[1] // mimi.frame_size)
            # Calls of one length suit CUDA graphs; Mimi is causal, so the zeros behind the end change nothing.
            padded = np.pad(block, ((0, 0), (0, size - block.shape[1])))
            encoded = mimi.encode(torch.from_numpy(padded)[:, None].to(device))  # [2, 8, frames]
            codes.append(encoded[..., :frames].flatten(0, 1).cpu().numpy().astype(dtype))
    return np.concatenate(codes, axis=1)


@contextmanager
def _streaming(mimi: MimiModel, frames: int) -> Iterator[None]:
    with mimi.streaming(2):
        steps = frames * round(mimi.encoder_frame_rate / mimi.frame_rate)
        modules = mimi.encoder_transformer.modules() if mimi.encoder_transformer is not None else ()
        for module in modules:
            if isinstance(module, StreamingMultiheadAttention):
                state = module._streaming_state
                assert state is not None
                assert state.kv_cache is not None
                keys = state.kv_cache.cache  # [2, rows, heads, context, width]
                _, rows, heads, context, width = keys.shape
                state.kv_cache = RingKVCache(
                    rows, heads, width, context + steps - 1, device=keys.device, dtype=keys.dtype
                )
        yield
