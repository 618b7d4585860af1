"""Context parallelism: the tokens of a row on several ranks, one part after the other.

The sum is associative, so all that a rank needs of the ranks before it is their sum. With Δ_r what the chunks of rank r
add to it, S_r what was there before them, and H_r the gradient of S_{r+1}:

    forward    S_{r+1} = S_r + Δ_r         handed on        O_r: the scan of rank r's chunks, beginning at S_r
    backward   H_{r−1} = H_r + dL_r/dS_r   handed back      dL/dΔ_r = H_r

Where a document begins within a rank's part, what came before ends there: S_{r+1} is what was written since, and
nothing of H_r is handed back. Two ``[B, D, F]`` pass between neighbours for each layer and step, however long the rows
are. The price is Δ_r as a product of its own before the scan: 20·T·D·F flops forward and backward in place of 14,
divided by the ranks. The handing on itself goes from rank to rank; everything else runs on all of them at once.

A chunk lies on one rank: where a document goes on from one rank to the next, the border must be one of its chunks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.fastweight.chunks import ChunkLayout, chunk_layout
from inlay.fastweight.operation import check_operands
from inlay.fastweight.scan import ScanPlan, accumulator_dtype, add_product, operand, scan
from inlay.fastweight.state import NO_DOCUMENT, FastWeightState

_GOES_ON = -2
"""Stands for the id of a document that nobody named: the one before goes on."""


@torch.compiler.disable
def fast_weight_linear_parallel(
    z: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    eta: float,
    chunk_size: int,
    exposure: float = 0.0,
    documents: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`inlay.fastweight.fast_weight_linear` of rows whose tokens are spread over the ranks of a group.

    Every rank gives its part, in the order of the ranks, and gets the output of that part. All of them have to call it,
    and to go backward through it. The gradient of ``weight`` is that of the rank's own tokens: add them up as for data
    parallelism, without dividing.

    Args:
        z: ``[B, T, F]`` this rank's inputs of the down projection; T may differ from rank to rank.
        v: ``[B, T, D]`` this rank's targets.
        weight: ``[D, F]`` slow weight W0, the same everywhere.
        eta: Step size η.
        chunk_size: Tokens per chunk C.
        exposure: Share α of its own update that a chunk reads.
        documents: ``[B, T]`` integer ids, −1 for padding; a document on two ranks has one id. None: no padding, and the
            document before goes on.
        group: Of processes; None for all.

    Returns:
        ``[B, T, D]`` in float32 (float64 for float64 input).

    Raises:
        ValueError: On every rank: a document goes on from one rank to the next within a chunk. Or as the other.
    """
    check_operands(z, v, weight, chunk_size, exposure, documents, None)
    layout = part_layout(z.shape[0], z.shape[1], chunk_size, documents=documents, group=group, device=z.device)
    z_packed, v_packed = layout.pack(z), layout.pack(v.to(z.dtype))
    before = sum_before(z_packed, v_packed, layout, group)
    plan = ScanPlan(layout, eta, exposure, final_sum=False, fused=True)
    if layout.aligned:
        return scan(z_packed, v_packed, before, plan, weight=weight)[0]
    fast, _ = scan(z_packed, v_packed, before, plan)
    return F.linear(z, weight).to(fast.dtype) + layout.unpack(fast)


def part_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    *,
    documents: Tensor | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> ChunkLayout:
    """The chunk grid of this rank's part of ``batch`` rows, known to begin where the parts before it end.

    Args:
        batch: Rows B.
        tokens: Tokens per row T of this part.
        chunk_size: Tokens per chunk C.
        documents: ``[B, T]`` ids of this part, −1 for padding; None: the document before goes on, without padding.
        group: Of processes, each with its part.
        device: Where the parts are.

    Raises:
        ValueError: On every rank: a document goes on from one rank to the next within a chunk.
    """
    first, last = _gathered(_ends(documents, batch, tokens, device), group).unbind(-1)
    before = [torch.full((batch,), NO_DOCUMENT, dtype=torch.long, device=device)]
    for ends in last:
        named = torch.where(ends == NO_DOCUMENT, before[-1], ends)
        before.append(torch.where(ends == _GOES_ON, before[-1].clamp(min=0), named))
    nothing = FastWeightState.empty(batch, 0, 0, chunk_size, device=device)
    begun = replace(nothing, document=before[dist.get_rank(group)])
    layout = chunk_layout(batch, tokens, chunk_size, documents=documents, state=begun)

    phases = _gathered(layout.phase, group)
    open_tokens = torch.zeros_like(before[0])
    broken = []  # tokens into a chunk at which a document goes on, by rank and row
    for rank, begins in enumerate(first):
        goes_on = (begins == _GOES_ON) | ((begins == before[rank]) & (begins != NO_DOCUMENT))
        broken.append(open_tokens * goes_on)
        open_tokens = torch.where(begins == NO_DOCUMENT, open_tokens, phases[rank])
    for rank, into in enumerate(torch.stack(broken).tolist()):  # one transfer for all ranks
        for row, count in enumerate(into):
            if count > 0:
                raise ValueError(
                    f"the document of row {row} goes on on rank {rank}, {count} tokens into a chunk: give every rank "
                    f"a multiple of chunk_size={chunk_size} tokens of it"
                )
    return layout


def refuse_unnamed_documents(positions: Tensor, documents: Tensor, group: dist.ProcessGroup | None) -> None:
    """See that ``position_ids`` count on through a row, within a part and from part to part.

    Where they do not a document begins, and only ids can say which one goes on.

    Args:
        positions: ``[B, T]`` of this part; −1 where there is none, or where ids are given.
        documents: ``[B, T]`` as the positions tell them apart within the part, from 0 on; −1 for padding.
        group: Of processes, all of which call this.

    Raises:
        ValueError: On every rank: they begin anew somewhere.
    """
    batch, tokens = positions.shape
    ends = _ends(positions.masked_fill(documents < 0, -1), batch, tokens, positions.device)
    begins = (documents > 0).any(1, keepdim=True).long()
    before = torch.full_like(begins[:, 0], -1)
    begun = []
    for first, last, anew in _gathered(torch.cat([ends, begins], 1).T, group):
        begun.append((anew > 0) | ((before >= 0) & (first >= 0) & (first != before + 1)))
        before = torch.where(last >= 0, last, before)
    if bool(torch.stack(begun).any()):
        raise ValueError(
            "position_ids begin anew within a row, which holds several documents then, but only ids say which of "
            "them go on from rank to rank: pass document_ids too"
        )


def sum_before(z: Tensor, v: Tensor, layout: ChunkLayout, group: dist.ProcessGroup | None) -> Tensor:
    """``[B, D, F]`` what the ranks before this one have written, differentiable, while this one's part is handed on.

    Args:
        z: ``[B, T', F]`` this rank's inputs of the down projection in chunk order.
        v: ``[B, T', D]`` its targets in chunk order.
        layout: From :func:`part_layout`.
        group: Of processes.
    """
    chunks, emptied = layout.committed(z.shape[0], z.device)
    added = _Updates.apply(z, v, chunks, layout.chunk_size)  # type: ignore[no-untyped-call]
    before: Tensor = _HandOn.apply(added, ~emptied, group)  # type: ignore[no-untyped-call]
    return before


class _Updates(torch.autograd.Function):
    """Σ V_iᵀ Z_i over the chunks where ``chunks`` ``[B, N]`` holds: ``[B, D, F]``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, chunks: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(z, v, chunks)
        ctx.chunk_size = chunk_size
        dtype = accumulator_dtype(z.dtype)
        total = torch.zeros(z.shape[0], v.shape[-1], z.shape[-1], dtype=dtype, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            for zi, vi, counts in _by_chunk(z, v, chunks, chunk_size):
                add_product(total, (operand(vi) * counts).mT, operand(zi), 1.0)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        z, v, chunks = ctx.saved_tensors
        dz, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (z, v))
        parts = _by_chunk(z, v, chunks, ctx.chunk_size)
        for (zi, vi, counts), dzi, dvi in zip(
            parts, torch.split(dz, ctx.chunk_size, 1), torch.split(dv, ctx.chunk_size, 1), strict=True
        ):
            d_update = d_total.to(operand(zi).dtype)
            add_product(dzi, operand(vi) * counts, d_update, 1.0, overwrite=True)
            add_product(dvi, operand(zi) * counts, d_update.mT, 1.0, overwrite=True)
        return dz, dv, None, None


class _HandOn(torch.autograd.Function):
    """Receives S_r, sends S_{r+1} = Δ_r + S_r where ``keeps`` ``[B]`` holds; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, keeps: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(keeps)
        ctx.group = group
        rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
        before = torch.zeros_like(added)
        if rank > 0:
            dist.recv(before, group=group, group_src=rank - 1)
        if rank < last:
            dist.send(added + before * keeps.view(-1, 1, 1), group=group, group_dst=rank + 1)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor) -> tuple[Tensor | None, ...]:
        (keeps,) = ctx.saved_tensors
        rank, last = dist.get_rank(ctx.group), dist.get_world_size(ctx.group) - 1
        d_added = torch.zeros_like(d_before)
        if rank < last:
            dist.recv(d_added, group=ctx.group, group_src=rank + 1)
        if rank > 0:
            dist.send(d_before + d_added * keeps.view(-1, 1, 1), group=ctx.group, group_dst=rank - 1)
        return d_added, None, None


def _by_chunk(z: Tensor, v: Tensor, chunks: Tensor, chunk_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``z``, ``v`` and whether it counts (``[B, 1, 1]``), chunk by chunk."""
    counts = chunks.view(*chunks.shape, 1, 1).unbind(1)
    return list(zip(torch.split(z, chunk_size, 1), torch.split(v, chunk_size, 1), counts, strict=True))


def _ends(documents: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """``[B, 2]`` first and last id of each row; −1 where there is none."""
    if tokens == 0:
        return torch.full((batch, 2), NO_DOCUMENT, dtype=torch.long, device=device)
    if documents is None:
        return torch.full((batch, 2), _GOES_ON, dtype=torch.long, device=device)
    real = documents >= 0
    places = torch.arange(documents.shape[1], device=device)
    first = torch.where(real, places, documents.shape[1]).amin(1).clamp(max=documents.shape[1] - 1)
    last = torch.where(real, places, -1).amax(1).clamp(min=0)
    ends = documents.gather(1, torch.stack([first, last], 1))
    return torch.where(real.any(1, keepdim=True), ends, NO_DOCUMENT).long()


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[ranks, …]``: every rank's ``tensor``, all of one shape."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
