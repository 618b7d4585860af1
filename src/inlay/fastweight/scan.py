"""The scan: the fast form of the operation, with its own backward.

For chunks i = 1 … n of one row (η step size, α exposure, Δ_i = V_iᵀ Z_i, S_i = Σ_{j<i} Δ_j):

    forward      O_i  = Z_i W0ᵀ + η Z_i (S_i + α Δ_i)ᵀ

    backward     dZ_i = dO_i (W0 + η (S_i + α Δ_i)) + η V_i (G_i + α g_i)          g_i = dO_iᵀ Z_i
                 dV_i = η Z_i (G_i + α g_i)ᵀ                                       G_i = Σ_{j>i} g_j
                 dW0  = Σ_i g_i

S runs forwards through the chunks, G backwards. So the backward walks twice: once forwards, building S again exactly as
the forward built it, for the terms that need S; once backwards, for those that need G. Nothing per chunk is kept, one
``[B, D, F]`` buffer serves S and then G, and since no Δ is ever taken back out of a sum, nothing is lost to
cancellation however many chunks there are (a backward that subtracts would need the same 14·T·D·F flops). Where
documents start, S and G are emptied.

Numbers: S and G are float32 (float64 for float64 input). The fast term is a product of its own, added to Z W0ᵀ in
float32, so that a sum far below the resolution of a bf16 W0 still acts. Only for the gradient of a bf16 z, which is
itself rounded to bf16, are the two weights added first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.fastweight.chunks import ChunkLayout


@dataclass(frozen=True)
class ScanPlan:
    """What the scan needs to know beyond its tensors.

    Attributes:
        layout: The chunk grid of the packed operands.
        eta: Step size η.
        exposure: Share α of a chunk's own Δ that it reads.
        final_sum: Whether the sum after the last chunk is wanted; without it the last Δ is not made.
        fused: Add η S to the slow weight before the product, where the accumulator's dtype is the operands' own: one
            product less, but where S is zero the output is that of the plain linear only up to rounding.
        rounded: Give the output in the dtype that the plain linear gives, each chunk rounded from the accumulator's.
            Neither the output nor its gradient is then ever held in the accumulator's as a whole.
    """

    layout: ChunkLayout
    eta: float
    exposure: float
    final_sum: bool
    fused: bool = False
    rounded: bool = False


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sum for operands of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scan(
    z: Tensor,
    v: Tensor,
    initial: Tensor | None,
    plan: ScanPlan,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the chunks of ``plan.layout`` over packed operands.

    Args:
        z: ``[B, T', F]`` inputs of the down projection in chunk order.
        v: ``[B, T', D]`` targets in chunk order.
        initial: ``[B, D, F]`` sum before the first chunk; None for zero.
        plan: The chunk grid and the constants.
        weight: ``[D, F]`` slow weight W0, whose product is added; None for the memory's part alone.
        bias: ``[D]`` added along with ``weight``.

    Returns:
        The output ``[B, T', D]`` in the accumulator's dtype (or ``plan.rounded``), and the final sum ``[B, D, F]`` if
        ``plan.final_sum``.
    """
    out, final = _Scan.apply(z, v, initial, weight, bias, plan)  # type: ignore[no-untyped-call]
    return out, final if plan.final_sum else None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        v: Tensor,
        initial: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: ScanPlan,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(z, v, initial, weight)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        dtype = accumulator_dtype(z.dtype)
        shape = (*z.shape[:2], v.shape[-1])
        fused = weight if plan.fused and weight is not None and z.dtype == weight.dtype == dtype else None
        if fused is not None:
            out = torch.empty(shape, dtype=dtype, device=z.device)
        elif weight is not None:  # in the caller's autocast: what the plain projection gives, bit for bit
            out = F.linear(z, weight, bias)
            out = out if plan.rounded else out.to(dtype)
        else:
            out = torch.zeros(shape, dtype=dtype, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            total = _start(z, v, initial)
            effective = torch.empty_like(total) if fused is not None else total
            for chunk in _chunks(plan):
                zi, vi = operand(z, chunk), operand(v, chunk)
                _empty_rows(total, chunk.resets)
                read = total + plan.exposure * torch.bmm(vi.mT, zi) if plan.exposure else total
                if fused is not None:
                    torch.add(fused, read, alpha=plan.eta, out=effective)
                    add_product(out[:, chunk.span], zi, effective.mT, 1.0, overwrite=True)
                elif chunk.index > 0 or initial is not None or plan.exposure:
                    part = out[:, chunk.span].to(dtype)  # a copy if the output is rounded, else the output's own
                    add_product(part, zi, read.mT, plan.eta)
                    if part.dtype != out.dtype:
                        out[:, chunk.span] = part
                if plan.final_sum or not chunk.last:
                    _write(total, zi, vi, chunk, 1.0)
            if fused is not None and bias is not None:
                out += bias
        return out, total if plan.final_sum else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        z, v, initial, weight = ctx.saved_tensors
        plan: ScanPlan = ctx.plan
        need_initial, need_weight, need_bias = ctx.needs_input_grad[2:5]
        dtype = accumulator_dtype(z.dtype)
        d_out = torch.zeros(*z.shape[:2], v.shape[-1], dtype=z.dtype, device=z.device) if d_out is None else d_out
        d_out = d_out.to(z.dtype)

        # Forwards, for dZ_i = dO_i (W0 + η (S_i + α Δ_i)). Only that sum is needed here, so it is built as one.
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        total = _start(z, v, initial).mul_(plan.eta)
        slow = total.new_zeros(1, 1, 1) if weight is None else weight.to(dtype).unsqueeze(0)
        total += slow
        for chunk in _chunks(plan):
            zi, vi, di = operand(z, chunk), operand(v, chunk), operand(d_out, chunk)
            if chunk.resets is not None:
                total = torch.where(chunk.resets.view(-1, 1, 1), slow, total)
            read = total + plan.eta * plan.exposure * torch.bmm(vi.mT, zi) if plan.exposure else total
            add_product(dz[:, chunk.span], di, read, 1.0, overwrite=True)
            if not chunk.last:
                _write(total, zi, vi, chunk, plan.eta)

        # Backwards, for the terms with G. Unscaled, G ends as dW0, together with what was in it where it was emptied;
        # not if it starts with the gradient of the final sum: then η is taken into it, and dW0 is made by itself.
        shared = need_weight and d_final is None
        inner, outer = (1.0, plan.eta) if shared else (plan.eta, 1.0)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        later = total.zero_() if d_final is None else total.copy_(d_final)  # dL/dS after the chunk
        d_weight: Tensor | None = None
        for chunk in reversed(_chunks(plan)):
            zi, vi, di = operand(z, chunk), operand(v, chunk), operand(d_out, chunk)
            d_update = _written(later, chunk)  # dL/dΔ_i
            if plan.exposure:
                own = torch.bmm(di.mT, zi)
                d_update = (later.new_zeros(()) if d_update is None else d_update) + plan.exposure * inner * own
            if d_update is None or (chunk.last and d_final is None and not plan.exposure):
                dv[:, chunk.span] = 0
            else:
                d_update = d_update.to(zi.dtype)
                add_product(dz[:, chunk.span], vi, d_update, outer)
                add_product(dv[:, chunk.span], zi, d_update.mT, outer, overwrite=True)
            if chunk.index > 0 or shared or need_initial:
                add_product(later, di.mT, zi, inner)
            if need_weight and not shared:
                d_weight = _plus(d_weight, torch.bmm(di.mT, zi).sum(0, dtype=dtype))
            if shared and chunk.resets is not None:
                d_weight = _plus(d_weight, (later * chunk.resets.view(-1, 1, 1)).sum(0))
            _empty_rows(later, chunk.resets)

        if shared:
            d_weight = _plus(d_weight, later.sum(0))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = d_out.sum((0, 1), dtype=dtype).to(weight.dtype) if need_bias else None
        d_initial = later * outer if need_initial else None
        return dz, dv, d_initial, d_weight, d_bias, None


@dataclass(frozen=True)
class _Chunk:
    index: int
    last: bool
    span: slice
    resets: Tensor | None
    writes: Tensor | bool


def _chunks(plan: ScanPlan) -> list[_Chunk]:
    layout = plan.layout
    size = layout.chunk_size
    return [
        _Chunk(n, n == layout.chunks - 1, slice(n * size, (n + 1) * size), layout.resets[n], layout.writes[n])
        for n in range(layout.chunks)
    ]


def operand(x: Tensor, chunk: _Chunk | None = None) -> Tensor:
    """``x`` (or a chunk of it) in the dtype of its products: bf16 on CUDA as it is, else float32 or more."""
    part = x if chunk is None else x[:, chunk.span]
    if part.is_cuda and part.dtype == torch.bfloat16:
        return part
    return part.to(accumulator_dtype(part.dtype))


def _start(z: Tensor, v: Tensor, initial: Tensor | None) -> Tensor:
    """A fresh ``[B, D, F]`` sum to accumulate in."""
    dtype = accumulator_dtype(z.dtype)
    if initial is not None:
        return initial.to(dtype, copy=True)
    return torch.zeros(z.shape[0], v.shape[-1], z.shape[-1], dtype=dtype, device=z.device)


def add_product(target: Tensor, a: Tensor, b: Tensor, alpha: float, *, overwrite: bool = False) -> None:
    """``target += alpha · a @ b`` in place (``=`` if ``overwrite``), batched; b is rounded to a's dtype."""
    if target.dtype == a.dtype:
        target.baddbmm_(a, b.to(a.dtype), alpha=alpha, beta=0 if overwrite else 1)
    elif overwrite:
        target.copy_(torch.bmm(a, b.to(a.dtype)).mul_(alpha))
    else:
        target.add_(torch.bmm(a, b.to(a.dtype)), alpha=alpha)


def in_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` ``[B, ·, ·]`` where ``rows`` ``[B]`` holds, zero elsewhere.

    Not the product with the mask: what an open chunk gives could be infinite, and 0 · ∞ is not 0.
    """
    return x.masked_fill(~rows.view(-1, 1, 1), 0)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _empty_rows(total: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        total.masked_fill_(rows.view(-1, 1, 1), 0.0)


def _written(later: Tensor, chunk: _Chunk) -> Tensor | None:
    """The rows of ``later`` whose chunk was written; None if none was."""
    if isinstance(chunk.writes, bool):
        return later if chunk.writes else None
    return later * chunk.writes.view(-1, 1, 1)


def _write(total: Tensor, zi: Tensor, vi: Tensor, chunk: _Chunk, alpha: float) -> None:
    """Add α Δ_i to the sum of the rows whose chunk is complete."""
    if chunk.writes is False:
        return
    if isinstance(chunk.writes, Tensor):
        vi = in_rows(vi, chunk.writes)
    add_product(total, vi.mT, zi, alpha)
