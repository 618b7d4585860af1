"""The target V of the updates: what the memory is taught to answer.

    V = W_target · conv(X0)

with a depthwise convolution over time inside the chunk, centred on the token and zero-padded at the chunk's edges, so
that nothing of the next chunk enters, then a D×D projection without bias (In-Place TTT, section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.fastweight.config import FastWeightConfig, NormalInit


class TargetGenerator(nn.Module):
    """Convolution and projection of one memory layer: the memory's own trainable parameters.

    They are bare parameters rather than submodules, so that tools that look for every ``nn.Linear`` of a model (PEFT's
    ``all-linear``, quantizers) leave them alone. Kept in float32 beside a bf16 model, computed in the input's dtype.

    Attributes:
        conv: ``[D, K]`` taps; column ``K // 2`` is the token itself, later columns look ahead.
        projection: ``[D, D]``.
    """

    def __init__(
        self, width: int, config: FastWeightConfig, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size
        self.normalize = config.normalize_target
        self.conv = nn.Parameter(torch.zeros(width, config.conv_kernel, dtype=dtype, device=device))
        self.projection = nn.Parameter(torch.eye(width, dtype=dtype, device=device))
        with torch.no_grad():
            if config.init == "next_token":
                self.conv[:, config.conv_kernel // 2 + 1] = 1.0
            elif isinstance(config.init, NormalInit):
                self.conv.normal_(std=config.init.normal)
                self.projection.normal_(std=config.init.normal)

    def forward(self, x: Tensor) -> Tensor:
        """Targets ``[B, T', D]`` of tokens ``x [B, T', D]`` in chunk order (the last chunk may be short)."""
        if self.normalize:
            x = _unit_rms(x)
        batch, tokens, width = x.shape
        size = min(self.chunk_size, tokens)
        chunks = -(-tokens // size)
        missing = chunks * size - tokens
        grid = (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(batch * chunks, size, width)
        taps = self.conv.to(x.dtype).unsqueeze(1)
        mixed = F.conv1d(grid.mT, taps, padding=taps.shape[-1] // 2, groups=width).mT
        mixed = mixed.reshape(batch, chunks * size, width)[:, :tokens]
        return F.linear(mixed, self.projection.to(mixed.dtype))


def _unit_rms(x: Tensor) -> Tensor:
    """Each token divided by its RMS over channels; a token that is all zero stays so, and gets no gradient."""
    wide = x if x.dtype == torch.float64 else x.float()
    square = wide.pow(2).mean(-1, keepdim=True)
    tiny = torch.finfo(square.dtype).tiny
    return (wide * square.clamp(min=tiny).rsqrt() * (square > tiny)).to(x.dtype)
