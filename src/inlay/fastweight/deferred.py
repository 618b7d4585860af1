"""The sum, not multiplied out: the cheaper form of a short history.

What a row has committed is a ``[D, F]`` sum of products Δ = Vᵀ Z. While few tokens have been committed it is smaller,
and cheaper to read, to keep Z and V themselves and apply them by attention without softmax (the block-attention form of
the operation):

    z (Σ_j V_jᵀ Z_j)ᵀ = (z Zᵀ) V

A token then costs H (D + F) multiplications for a history of H tokens, against D·F for the sum, and H (D + F) numbers
are held against D·F. Both are even at H = D·F / (D + F) tokens (3,003 for Moshi 7B), which is where the switch is. So
many short sessions can share one W0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.fastweight.chunks import ChunkLayout
from inlay.fastweight.scan import accumulator_dtype, operand


def break_even(width: int, inner: int) -> int:
    """Tokens of history H = D·F / (D + F) above which the sum itself is cheaper."""
    return width * inner // (width + inner)


@dataclass
class Products:
    """The committed tokens of a batch, whose Δ have not been multiplied out.

    Attributes:
        z: ``[B, capacity, F]``; zero where a row has no token.
        v: ``[B, capacity, D]``.
        used: Slots in use, the same for all rows; a row that committed nothing in one holds zero there.
    """

    z: Tensor
    v: Tensor
    used: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.z, self.v))

    def read(self, z: Tensor) -> Tensor:
        """``z (Σ Vᵀ Z)ᵀ`` for ``z [B, T, F]``: ``[B, T, D]`` in the accumulator's dtype."""
        keys, values = operand(self.z[:, : self.used]), operand(self.v[:, : self.used])
        weights = torch.bmm(z.to(keys.dtype), keys.mT)
        return torch.bmm(weights, values).to(accumulator_dtype(z.dtype))

    def total(self) -> Tensor:
        """The sum ``[B, D, F]`` in the accumulator's dtype."""
        keys, values = operand(self.z[:, : self.used]), operand(self.v[:, : self.used])
        return torch.bmm(values.mT, keys).to(accumulator_dtype(self.z.dtype))

    def append(self, z: Tensor, v: Tensor) -> None:
        """Commit ``z [B, C, F]`` and ``v [B, C, D]``, zero in rows that commit nothing. Room doubles when short,
        up to where the sum is cheaper."""
        needed = self.used + z.shape[1]
        if needed > self.z.shape[1]:
            most = break_even(self.v.shape[-1], self.z.shape[-1])
            room = max(needed, min(2 * self.z.shape[1], most)) - self.z.shape[1]
            self.z, self.v = F.pad(self.z, (0, 0, 0, room)), F.pad(self.v, (0, 0, 0, room))
        self.z[:, self.used : needed] = z
        self.v[:, self.used : needed] = v
        self.used = needed

    def map(self, function: Callable[[Tensor], Tensor]) -> Products:
        """The same with ``function`` applied to both tensors."""
        return Products(function(self.z), function(self.v), self.used)


def products_after(before: Products | None, z: Tensor, v: Tensor, layout: ChunkLayout) -> Products:
    """The products after a call: those before it, of rows that no document start emptied, and the chunks it committed.

    Args:
        before: Products before the call.
        z: ``[B, T', F]`` inputs in chunk order.
        v: ``[B, T', D]`` targets in chunk order.
        layout: The call's chunk grid.
    """
    chunks, emptied = layout.committed(z.shape[0], z.device)
    committed = (layout.chunks - 1) * layout.chunk_size  # the last chunk is open in every row
    kept = chunks[:, :-1].repeat_interleave(layout.chunk_size, dim=1).unsqueeze(-1)
    z, v = z[:, :committed] * kept, v[:, :committed] * kept
    if before is None:
        return Products(z, v, z.shape[1])
    old = ~emptied.view(-1, 1, 1)
    return Products(
        torch.cat([before.z[:, : before.used] * old, z], dim=1),
        torch.cat([before.v[:, : before.used] * old, v], dim=1),
        before.used + z.shape[1],
    )
