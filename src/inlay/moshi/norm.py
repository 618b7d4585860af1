"""Kyutai's norms over a long sequence, for training, without the copies of it in float32 that they make and keep.

Kyutai's ``rms_norm_f32`` computes in float32, so a bfloat16 sequence is there in float32 up to four times while it
runs, and twice until its backward: 0.5 GB each at 32,000 frames of the 7B. A frame is normed by itself, so here the
frames are taken slice by slice, and the backward runs each slice again: nothing but the sequence as it came is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from moshi.modules.transformer import RMSNorm
from torch import Tensor, nn

from inlay.moshi.loss import uncompiled

FRAMES = 4096
"""Frames in a slice."""


def use_sliced_norms(modules: Iterable[nn.Module], *, frames: int = FRAMES) -> Callable[[], None]:
    """Let every ``rms_norm_f32`` among ``modules`` run in slices wherever gradients are wanted.

    Outputs are theirs bit for bit, and so are the gradients of their input; that of a weight is summed in slices.

    Args:
        modules: Of these only the norms are changed, each by an attribute of its own.
        frames: Frames in a slice.

    Returns:
        What takes it off again.
    """
    norms = [module for module in modules if isinstance(module, RMSNorm) and module.dtype is not None]
    for norm in norms:
        norm.__dict__["forward"] = functools.partial(_forward, norm, frames)

    def undo() -> None:
        for norm in norms:
            del norm.__dict__["forward"]

    return undo


def _forward(norm: RMSNorm, frames: int, x: Tensor) -> Tensor:
    """In place of ``RMSNorm.forward``: ``[B, T, D]`` to ``[B, T, D]``."""
    if x.shape[1] <= frames:
        return type(norm).forward(norm, x)
    out: Tensor = _Sliced.apply(x, norm.alpha, norm, frames)  # type: ignore[no-untyped-call]
    return out


class _Sliced(torch.autograd.Function):
    """Keeps x and nothing per slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, norm: RMSNorm, frames: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.norm, ctx.frames = norm, frames
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], frames):
            span = slice(start, start + frames)
            out[:, span] = type(norm).forward(norm, x[:, span])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        dx, dalpha = torch.empty_like(x), torch.zeros_like(alpha) if alpha.requires_grad else None
        for start in range(0, x.shape[1], ctx.frames):
            span = slice(start, start + ctx.frames)
            part = x[:, span].detach().requires_grad_()
            with torch.enable_grad(), uncompiled(x.device):
                out = type(ctx.norm).forward(ctx.norm, part)
            wanted = [part] if dalpha is None else [part, alpha]
            of_x, *of_alpha = torch.autograd.grad(out, wanted, grad[:, span])
            dx[:, span] = of_x
            if dalpha is not None:
                dalpha += of_alpha[0]
        return dx, dalpha, None, None
