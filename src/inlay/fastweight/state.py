"""The state of a fast-weight memory: what a row has read so far, in a size that does not grow.

A row is one sequence of a batch. Four things describe where it stands:

* ``sum``: Σ Δ_j over the committed chunks of the current document, ``[D, F]``, in float32 (float64 when the model is);
* ``phase``: how many tokens of the open chunk have been read, ``0 ≤ phase < C``;
* ``z`` and ``x``: those tokens' operands, in buffers of ``C`` slots. ``z`` is the input of the down projection, ``x``
  whatever the target is made from: the target V itself in the bare operation, the token embeddings X0 in the layer,
  where V can be made only when the chunk is full, because its convolution looks two tokens ahead;
* ``document``: the id of the document being read (``NO_DOCUMENT`` before the first token).

A chunk is committed (its Δ added to the sum) when its last token arrives, never earlier: an incomplete chunk stays
pending however the tokens are cut into calls. That is what makes a whole forward and any run of smaller ones agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from inlay.fastweight.deferred import Products

NO_DOCUMENT = -1


@dataclass
class FastWeightState:
    """What each row of a batch has read (see the module's text).

    Attributes:
        sum: ``[B, D, F]`` accumulated updates, float32 or float64.
        phase: ``[B]`` int64, tokens in the open chunk.
        document: ``[B]`` int64, id of the current document, ``NO_DOCUMENT`` (−1) before the first token.
        z: ``[B, C, F]`` inputs of the down projection in the open chunk; zero from ``phase`` on.
        x: ``[B, C, D]`` what the target of the open chunk is made from; zero from ``phase`` on.
        products: The committed tokens in place of their sum, while they are few; ``sum`` is ``[B, 0, 0]`` then.
        history: ``[B, n, 2]`` norm ‖Δ‖ and clip scale of each chunk in the sum, in order; zero where a row committed
            nothing. A log of two numbers a chunk, not counted in ``nbytes``; None if nothing was logged.
    """

    sum: Tensor
    phase: Tensor
    document: Tensor
    z: Tensor
    x: Tensor
    products: Products | None = None
    history: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        width: int,
        inner: int,
        chunk_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FastWeightState:
        """A state that has read nothing.

        Args:
            batch_size: Rows B.
            width: Model width D.
            inner: MLP inner width F.
            chunk_size: Tokens per chunk C.
            dtype: Of the operands z and x; the sum is float64 for float64, else float32.
            device: Where the tensors live.
        """
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            sum=torch.zeros(batch_size, width, inner, dtype=accumulator, device=device),
            phase=torch.zeros(batch_size, dtype=torch.long, device=device),
            document=torch.full((batch_size,), NO_DOCUMENT, dtype=torch.long, device=device),
            z=torch.zeros(batch_size, chunk_size, inner, dtype=dtype, device=device),
            x=torch.zeros(batch_size, chunk_size, width, dtype=dtype, device=device),
        )

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.sum.shape[0]

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk C."""
        return self.z.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; constant once the sum is dense."""
        held = sum(t.numel() * t.element_size() for t in self._tensors())
        return held if self.products is None else held + self.products.nbytes

    def log(self, norms: Tensor, scales: Tensor, emptied: Tensor | None = None) -> None:
        """Add committed chunks (``[B, n]`` norms and clip scales, zero where there is none) to the history; the rows
        where ``emptied`` ``[B]`` holds lose theirs first."""
        new = torch.stack([norms, scales], dim=-1).detach().float()
        old = self.history
        if old is not None and emptied is not None:
            old = old.masked_fill(emptied.view(-1, 1, 1), 0.0)
        self.history = new if old is None else torch.cat([old, new], dim=1)

    def total(self) -> Tensor:
        """The sum ``[B, D, F]``, made from the products if it is not held."""
        return self.sum if self.products is None else self.products.total()

    def select(self, indices: Tensor) -> FastWeightState:
        """The rows ``indices`` (``[K]`` int64, repeats allowed), copied: beam search and batch selection."""
        return self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def reset(self, rows: Tensor) -> FastWeightState:
        """A copy in which the rows where ``rows`` (``[B]`` bool) holds have read nothing."""

        def cleared(t: Tensor, value: int = 0) -> Tensor:
            mask = rows.to(t.device).view(-1, *(1,) * (t.dim() - 1))
            return t.masked_fill(mask, value)

        return FastWeightState(
            cleared(self.sum),
            cleared(self.phase),
            cleared(self.document, NO_DOCUMENT),
            cleared(self.z),
            cleared(self.x),
            None if self.products is None else self.products.map(cleared),
            None if self.history is None else cleared(self.history),
        )

    def detach(self) -> FastWeightState:
        """The same tensors without their autograd history (truncated backpropagation through time)."""
        return self._map(Tensor.detach)

    def clone(self) -> FastWeightState:
        """A copy in memory of its own."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> FastWeightState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> FastWeightState:
        total, phase, document, z, x = (function(t) for t in self._tensors())
        products = None if self.products is None else self.products.map(function)
        history = None if self.history is None else function(self.history)
        return FastWeightState(total, phase, document, z, x, products, history)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.sum, self.phase, self.document, self.z, self.x
