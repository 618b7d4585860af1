"""Kyutai's attention over a window, for training, in memory that is linear in the length.

Kyutai's ``StreamingMultiheadAttention`` makes a T × T matrix of distances for its mask: 8 GB at T = 32,000, before
attention itself. But a query at frame t sees only the frames t − W + 1 … t. So the queries are taken in blocks of b,
each against its own and the W − 1 frames before it, with one mask ``[b, b + W − 1]`` that all of them share:

    queries  s … s + b − 1     keys  s − W + 1 … s + b − 1     sees  0 ≤ query − key < W

The backward goes through the blocks again and recomputes each, so that nothing but q, k and v is kept: autograd over
the slices would keep (b + W) / b copies of the keys, and fill a gradient of the whole length for each slice. The extra
forward is about 3 % of a training step of the 7B.

With documents a query sees those of its own alone, and positions count from the document's first frame: what a stream
of that document alone would see, rounding included (scores depend on distances, so the count itself changes nothing).

The depformer, whose sequences are 8 long, and streaming keep Kyutai's own forward.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformer
from torch import Tensor

from inlay.fastweight.errors import InlayError
from inlay.moshi.yarn import rotate, self_attentions

QUERIES = 512
"""Queries in a block b, at most."""

_FEWEST = 64
"""Below so many a block is too small to be quick."""

_documents: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("documents", default=None)


def use_windowed_attention(
    transformer: StreamingTransformer, *, block: int = QUERIES, most_blocks: int | None = None
) -> Callable[[], None]:
    """Let the attention of a transformer's layers run in blocks of queries, outside streaming.

    Only these modules are changed, each by an attribute of its own.

    Args:
        transformer: The main transformer of an ``LMModel``.
        block: Most queries in a block b; memory is O(b · (b + W)) for the mask, work (b + W) / W of what is needed,
            so where the window is small a block has no more queries than it (but 64).
        most_blocks: Compute the last blocks alone, for a dry run: each needs the same memory, and none is kept.

    Returns:
        What takes it off again.

    Raises:
        InlayError: A layer's attention is not causal self-attention with one set of weights.
    """
    if block < 1:
        raise InlayError(f"a block holds at least one query; got block={block}")
    layers = self_attentions(transformer)
    for index, attention in enumerate(layers):
        if not attention.causal or attention.cross_attention or attention.mult != 1:
            raise InlayError(
                f"the attention of layer {index} is not causal self-attention with one set of weights, so it cannot "
                "run in blocks; give the main transformer (lm.transformer)"
            )
    before = [attention.__dict__.get("forward") for attention in layers]
    for attention in layers:
        attention.__dict__["forward"] = functools.partial(_forward, attention, block, most_blocks)

    def undo() -> None:
        for attention, forward in zip(layers, before, strict=True):
            del attention.__dict__["forward"]
            if forward is not None:
                attention.__dict__["forward"] = forward

    return undo


@contextmanager
def attention_within(documents: Tensor | None) -> Iterator[None]:
    """Within the block, windowed attention ends at the borders of ``documents`` ``[B, T]`` (−1 is padding).

    Gradient checkpointing through :func:`inlay.fastweight.checkpointing.checkpoint_blocks` recomputes with the same.
    """
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)


def _forward(
    attention: StreamingMultiheadAttention,
    block: int,
    most_blocks: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """In place of ``StreamingMultiheadAttention.forward``: ``[B, T, D]`` to ``[B, T, D]``."""
    if attention.is_streaming:
        out: Tensor = type(attention).forward(attention, query, key, value)
        return out
    batch, frames, _ = query.shape
    heads, groups = attention.num_heads, attention.kv_repeat
    head_dim = attention.embed_dim // heads
    projected = attention.in_projs[0](query).view(batch, frames, -1, head_dim).transpose(1, 2)
    q, k, v = projected.split([heads, heads // groups, heads // groups], dim=1)
    documents = _documents.get()
    if attention.rope is not None:
        positions = torch.arange(frames, device=query.device).unsqueeze(0)
        if documents is not None:
            positions = positions - document_starts(documents)
        q, k = rotate(attention.rope, q, k, positions)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if attention.context is not None:
        block = min(block, max(_FEWEST, attention.context))
    x = windowed_attention(q, k, v, attention.context, documents=documents, block=block, most_blocks=most_blocks)
    mixed: Tensor = attention.out_projs[0](x.transpose(1, 2).reshape(batch, frames, -1))
    return mixed


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: int | None,
    *,
    documents: Tensor | None = None,
    block: int = QUERIES,
    most_blocks: int | None = None,
) -> Tensor:
    """Causal attention in which each query sees ``context`` frames, its own among them.

    Args:
        q: ``[B, H, T, d]`` queries, as ``k`` and ``v``.
        context: W; None: all frames before.
        documents: ``[B, T]`` ids that attention does not cross; None: a row is one document.
        block: Queries in a block.
        most_blocks: See :func:`use_windowed_attention`.

    Returns:
        ``[B, H, T, d]``.
    """
    frames = q.shape[2]
    if documents is None and (context is None or context >= frames):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    walk = _Walk(min(context or frames, frames), block, most_blocks)
    return _Windowed.apply(q, k, v, documents, walk)  # type: ignore[no-untyped-call]


def document_starts(documents: Tensor) -> Tensor:
    """``[B, T]`` index of the first frame of each frame's document, of runs of equal ids."""
    place = torch.arange(documents.shape[1], device=documents.device)
    changes = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(changes, place, 0).cummax(1).values


class _Walk(NamedTuple):
    """How attention is walked: its window, the queries of a block, and how many blocks at most."""

    context: int
    block: int
    most_blocks: int | None


class _Windowed(torch.autograd.Function):
    """Keeps q, k and v and nothing per block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, walk: _Walk) -> Tensor:
        ctx.save_for_backward(q, k, v, documents)
        ctx.walk = walk
        out = torch.empty_like(q)
        for queries, keys, mask in _blocks(q, documents, walk):
            out[:, :, queries] = F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, mask in _blocks(q, documents, ctx.walk):
            parts = [x.detach().requires_grad_() for x in (q[:, :, queries], k[:, :, keys], v[:, :, keys])]
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], mask)
            of_q, of_k, of_v = torch.autograd.grad(out, parts, grad[:, :, queries])
            dq[:, :, queries] = of_q
            dk[:, :, keys] += of_k
            dv[:, :, keys] += of_v
        return dq, dk, dv, None, None


def _blocks(q: Tensor, documents: Tensor | None, walk: _Walk) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each block's queries, the keys that any of them sees, and ``[1 or B, 1, queries, keys]`` who sees what."""
    frames, (context, block, most) = q.shape[2], walk
    own = torch.arange(block, device=q.device).unsqueeze(1) + context - 1
    distance = own - torch.arange(block + context - 1, device=q.device)
    band = (distance >= 0) & (distance < context)
    for start in range(0, frames, block)[0 if most is None else -most :]:
        end, first = min(start + block, frames), max(0, start - context + 1)
        mask = band[: end - start, context - 1 - (start - first) : context - 1 + end - start][None, None]
        if documents is not None:
            mask = mask & (documents[:, None, start:end, None] == documents[:, None, None, first:end])
        yield slice(start, end), slice(first, end), mask
