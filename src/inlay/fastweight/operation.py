"""The operation: a linear layer whose weight grows, chunk by chunk, with what it has read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.fastweight.chunks import check_documents, chunk_layout
from inlay.fastweight.scan import ScanPlan, scan
from inlay.fastweight.state import FastWeightState


@torch.compiler.disable
def fast_weight_linear(
    z: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    eta: float,
    chunk_size: int,
    exposure: float = 0.0,
    documents: Tensor | None = None,
    state: FastWeightState | None = None,
) -> tuple[Tensor, FastWeightState]:
    """Apply ``weight`` plus the updates of the chunks before, then write this chunk's.

    O_i = Z_i (W0 + η Σ_{j<i} V_jᵀ Z_j)ᵀ

    In-Place Test-Time Training (ICLR 2026), Algorithm 1. The scan of :mod:`inlay.fastweight.scan`: memory flat in the
    number of chunks, 14·T·D·F flops forward and backward (the plain linear: 6·T·D·F). Its slow twin is
    :func:`inlay.fastweight.fast_weight_linear_reference`.

    Args:
        z: ``[B, T, F]`` inputs of the down projection.
        v: ``[B, T, D]`` targets.
        weight: ``[D, F]`` slow weight W0; may require a gradient.
        eta: Step size η of the fast weights.
        chunk_size: Tokens per chunk C. Counted per row over real tokens, from each document's start.
        exposure: Share α of its own update that a chunk reads, in [0, 1]. Above 0 a token reads what comes after it.
        documents: ``[B, T]`` integer ids, −1 for padding. Where the id changes the sum is emptied and the chunk grid
            starts anew. None: no padding, and every row goes on with its document.
        state: What the rows have read before; None for nothing. Not changed.

    Returns:
        The output ``[B, T, D]``, in float32 (float64 for float64 input) so that a small sum is not rounded away, and
        the state after the call. An incomplete last chunk is read with the sum before it and stays open in the state.
        Both are differentiable, through the state's sum too.

    Raises:
        ValueError: Shapes, dtypes, ``chunk_size``, ``exposure`` or the state do not fit together.
    """
    check_operands(z, v, weight, chunk_size, exposure, documents, state)
    layout = chunk_layout(z.shape[0], z.shape[1], chunk_size, documents=documents, state=state, device=z.device)
    v = v.to(z.dtype)
    initial = None if state is None else state.sum
    plan = ScanPlan(layout, eta, exposure, final_sum=True, fused=True)
    z_packed = layout.pack(z, None if state is None else state.z)
    v_packed = layout.pack(v, None if state is None else state.x)
    if layout.aligned:
        out, total = scan(z_packed, v_packed, initial, plan, weight=weight)
    else:
        fast, total = scan(z_packed, v_packed, initial, plan)
        out = F.linear(z, weight).to(fast.dtype) + layout.unpack(fast)
    assert total is not None
    after = FastWeightState(
        total, layout.phase, layout.document, layout.open_chunk(z_packed), layout.open_chunk(v_packed)
    )
    return out, after


def check_operands(
    z: Tensor,
    v: Tensor,
    weight: Tensor,
    chunk_size: int,
    exposure: float,
    documents: Tensor | None,
    state: FastWeightState | None,
) -> None:
    """Make sure that the arguments of a fast-weight linear fit together.

    Raises:
        ValueError: They do not; names what does not.
    """
    if z.dim() != 3 or v.dim() != 3 or z.shape[:2] != v.shape[:2]:
        raise ValueError(f"z must be [B, T, F] and v [B, T, D] of the same B and T; got {[*z.shape]} and {[*v.shape]}")
    if tuple(weight.shape) != (v.shape[-1], z.shape[-1]):
        raise ValueError(f"weight must be [D, F] = {[v.shape[-1], z.shape[-1]]}; got {[*weight.shape]}")
    if not z.is_floating_point():
        raise ValueError(f"z must be of a floating-point dtype; got {z.dtype}")
    if z.dtype != weight.dtype and not torch.is_autocast_enabled(z.device.type):
        raise ValueError(f"z and weight must have one dtype outside autocast; got {z.dtype} and {weight.dtype}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1; got {chunk_size!r}")
    if not 0.0 <= exposure <= 1.0:
        raise ValueError(f"exposure must lie in [0, 1]; got {exposure}")
    if documents is not None:
        check_documents(documents, *z.shape[:2])
    if state is not None:
        expected = (z.shape[0], v.shape[-1], z.shape[-1])
        if tuple(state.sum.shape) != expected or state.chunk_size != chunk_size:
            raise ValueError(
                f"the state is of another memory: its sum is {[*state.sum.shape]} with chunks of {state.chunk_size}, "
                f"this call needs {[*expected]} with chunks of {chunk_size}"
            )
