"""Clipping of updates, outside the core: a scale on V.

The Frobenius norm of an update is known without making it, from two C×C Gram matrices:

    ‖Vᵀ Z‖² = Σ (V Vᵀ) ∘ (Z Zᵀ)

and scaling Δ is scaling V. So the scan never needs to know. Once an update is clipped it no longer depends on the scale
of the parameters behind V: their gradient then falls as one over their norm. Clip only what diverges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.fastweight.scan import accumulator_dtype


def update_norms(z: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """‖Δ_i‖ of every chunk, ``[B, N]``, differentiable.

    Args:
        z: ``[B, T', F]`` inputs of the down projection in chunk order (the last chunk may be short).
        v: ``[B, T', D]`` targets.
        chunk_size: Tokens per chunk C.
    """
    dtype = accumulator_dtype(z.dtype)
    squares = [z.new_zeros(z.shape[0], 0, dtype=dtype)]
    with torch.autocast(z.device.type, enabled=False):
        for zi, vi in zip(torch.split(z, chunk_size, 1), torch.split(v, chunk_size, 1), strict=True):
            zi, vi = zi.to(dtype), vi.to(dtype)  # no copy of the whole
            squares.append(((vi @ vi.mT) * (zi @ zi.mT)).sum((-1, -2)).unsqueeze(1))
    # Rounding can leave a tiny negative number, and the root has no derivative at 0.
    return torch.cat(squares, 1).clamp(min=torch.finfo(dtype).tiny).sqrt()


def clip_targets(z: Tensor, v: Tensor, chunk_size: int, max_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``v`` so that no chunk's update is longer than ``max_norm``.

    Args:
        z: ``[B, T', F]`` inputs of the down projection in chunk order.
        v: ``[B, T', D]`` targets.
        chunk_size: Tokens per chunk C.
        max_norm: Largest ‖Δ_i‖ (Frobenius), the paper's τ.

    Returns:
        The scaled targets ``[B, T', D]`` (differentiable, through the scale too) and the scales ``[B, N]`` in (0, 1].
    """
    scale = (max_norm / update_norms(z, v, chunk_size)).clamp(max=1.0)
    per_token = scale.repeat_interleave(chunk_size, dim=1)[:, : v.shape[1], None]
    return (v * per_token).to(v.dtype), scale
