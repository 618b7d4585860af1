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

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    sum: Tensor
    phase: Tensor
    document: Tensor
    z: Tensor
    x: Tensor

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
        """Bytes of all tensors; constant over the life of the state."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def select(self, indices: Tensor) -> FastWeightState:
        """The rows ``indices`` (``[K]`` int64, repeats allowed), copied: beam search and batch selection."""
        return FastWeightState(*(t.index_select(0, indices.to(t.device)) for t in self._tensors()))

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
        )

    def detach(self) -> FastWeightState:
        """The same tensors without their autograd history (truncated backpropagation through time)."""
        return FastWeightState(*(t.detach() for t in self._tensors()))

    def to(self, device: torch.device | str) -> FastWeightState:
        """The state on another device."""
        return FastWeightState(*(t.to(device) for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.sum, self.phase, self.document, self.z, self.x
