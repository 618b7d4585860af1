"""The operation as the paper writes it, in plain loops: for reading, and as the truth that the fast form is held to.

In-Place Test-Time Training (ICLR 2026), Algorithm 1, for one document cut into chunks of C tokens:

    Δ_i = V_iᵀ Z_i                               the update that chunk i writes           [D, F]
    O_i = Z_i (W0 + η Σ_{j<i} Δ_j)ᵀ              apply before update: a chunk never reads its own Δ

Two things are added here. ``exposure`` α lets a chunk read αΔ_i of itself (training experiments; 0 is the paper).
``documents`` cuts a row into documents: at a document's first token the sum is emptied and the chunk grid starts anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.fastweight.operation import check_operands
from inlay.fastweight.state import FastWeightState


def fast_weight_linear_reference(
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
    """The fast-weight linear, token by token and row by row, in any floating dtype.

    Same arguments, results and errors as :func:`inlay.fastweight.fast_weight_linear`. Gradients come from autograd.
    """
    check_operands(z, v, weight, chunk_size, exposure, documents, state)
    batch, tokens, inner = z.shape
    width = v.shape[-1]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if state is None:
        state = FastWeightState.empty(batch, width, inner, chunk_size, dtype=z.dtype, device=z.device)

    out = torch.zeros(batch, tokens, width, dtype=dtype, device=z.device)
    rows: list[tuple[Tensor, int, int, Tensor, Tensor]] = []
    for b in range(batch):
        total = state.sum[b].to(dtype)
        document = int(state.document[b])
        phase = int(state.phase[b])
        open_z = [state.z[b, s] for s in range(phase)]  # the open chunk's tokens so far
        open_v = [state.x[b, s] for s in range(phase)]
        waiting: list[int] = []  # positions of this call in the open chunk

        def read(positions: list[int], zs: list[Tensor], vs: list[Tensor], total: Tensor, b: int = b) -> None:
            """Outputs of one chunk's tokens: with the sum before it, and α of its own Δ."""
            own = exposure * _delta(zs, vs, dtype) if exposure and zs else 0.0
            for t in positions:
                fast = total + own
                out[b, t] = z[b, t].to(dtype) @ weight.to(dtype).T + eta * (z[b, t].to(dtype) @ fast.T)

        for t in range(tokens):
            new = max(document, 0) if documents is None else int(documents[b, t])
            if new < 0:  # padding: read by the plain projection, counted nowhere
                out[b, t] = z[b, t].to(dtype) @ weight.to(dtype).T
                continue
            if documents is not None and new != document:
                read(waiting, open_z, open_v, total)
                total, open_z, open_v, waiting = torch.zeros_like(total), [], [], []
            document = new
            open_z.append(z[b, t])
            open_v.append(v[b, t])
            waiting.append(t)
            if len(open_z) == chunk_size:
                read(waiting, open_z, open_v, total)
                total, open_z, open_v, waiting = total + _delta(open_z, open_v, dtype), [], [], []
        read(waiting, open_z, open_v, total)
        rows.append((total, len(open_z), document, _buffer(open_z, z, chunk_size), _buffer(open_v, v, chunk_size)))

    sums, phases, ids, zs, vs = zip(*rows, strict=True)
    return out, FastWeightState(
        torch.stack(sums),
        torch.tensor(phases, dtype=torch.long, device=z.device),
        torch.tensor(ids, dtype=torch.long, device=z.device),
        torch.stack(zs),
        torch.stack(vs),
    )


def _delta(zs: list[Tensor], vs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Δ = Vᵀ Z of one chunk, ``[D, F]``."""
    return torch.stack(vs).to(dtype).T @ torch.stack(zs).to(dtype)


def _buffer(tokens: list[Tensor], like: Tensor, chunk_size: int) -> Tensor:
    """``tokens`` in a buffer of ``chunk_size`` slots, zero beyond them."""
    zero = like.new_zeros(like.shape[-1])
    return torch.stack(tokens + [zero] * (chunk_size - len(tokens)))
